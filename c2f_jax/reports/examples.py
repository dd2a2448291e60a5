"""Queries with their answers, chosen for a page."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from c2f_jax.objectives.keys import Stream, host_rng
from c2f_jax.reports.html import Media
from c2f_jax.retrieval.evaluation import RankedLists


@dataclasses.dataclass(frozen=True)
class Example:
    """One query with its best gallery items before and after re-ranking; hits mark the right ones.

    fine is None when there was no fine stage; ranks are None for a query whose right answer nobody knows.
    """

    query: Media
    coarse: Sequence[Media]
    coarse_hits: Sequence[bool]
    coarse_rank: int | None = None
    fine: Sequence[Media] | None = None
    fine_hits: Sequence[bool] | None = None
    fine_rank: int | None = None
    answer: Media | None = None  # a right item, shown beside the query


def random_queries(ranked: RankedLists, count: int, seed: int = 0) -> np.ndarray:
    """Places in `ranked` of queries drawn at random, without a look at how they did."""
    total = len(ranked.queries)
    return np.sort(
        host_rng(seed, Stream.EXAMPLE_QUERIES).choice(total, min(count, total), replace=False)
    )


def worst_queries(ranked: RankedLists, count: int) -> np.ndarray:
    """Places in `ranked` of the queries whose right item ends furthest down, the worst first, none that ends first."""
    final = ranked.coarse_rank if ranked.fine_rank is None else ranked.fine_rank
    worst = np.argsort(-final, kind="stable")[:count]
    return worst[final[worst] > 1]


def make_examples(
    ranked: RankedLists,
    places: Iterable[int],
    query_media: Callable[[int], Media],
    gallery_media: Callable[[int], Media],
    answer: Callable[[int], Media] | None = None,
    top: int = 5,
) -> list[Example]:
    """Examples for the page. query_media and gallery_media turn a row of their table into Media; answer a query row."""
    examples = []
    for place in places:
        query = int(ranked.queries[place])
        fine = (
            {}
            if ranked.fine is None
            else {
                "fine": [gallery_media(int(row)) for row in ranked.fine[place, :top]],
                "fine_hits": ranked.fine_hits[place, :top].tolist(),
                "fine_rank": int(ranked.fine_rank[place]),
            }
        )
        examples.append(
            Example(
                query_media(query),
                [gallery_media(int(row)) for row in ranked.coarse[place, :top]],
                ranked.coarse_hits[place, :top].tolist(),
                int(ranked.coarse_rank[place]),
                **fine,
                answer=answer(query) if answer else None,
            )
        )
    return examples
