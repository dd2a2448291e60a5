"""Queries with their answers, chosen for a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from c2f_jax.objectives.keys import Stream, host_rng
from c2f_jax.reports.html import Media
from c2f_jax.retrieval.result import RankedLists

SHOWN = 5  # answers to a query on a page


@dataclass(frozen=True)
class Example:
    """One query with its best gallery items.

    Attributes:
      query: the query.
      coarse: best items of the coarse ranking.
      coarse_hits: which of them are correct.
      coarse_rank: rank of the first correct item, from 1; None if the correct items are unknown.
      fine: the same after reranking; None without a fine stage.
      fine_hits: see coarse_hits.
      fine_rank: see coarse_rank.
      answer: a correct item, shown beside the query.
    """

    query: Media
    coarse: Sequence[Media]
    coarse_hits: Sequence[bool]
    coarse_rank: int | None = None
    fine: Sequence[Media] | None = None
    fine_hits: Sequence[bool] | None = None
    fine_rank: int | None = None
    answer: Media | None = None


@dataclass(frozen=True)
class PageExamples:
    """The examples on the page of an evaluation.

    Attributes:
      speech: spoken queries drawn at random.
      failures: the spoken queries that did worst.
      image: image queries drawn at random.
    """

    speech: Sequence[Example] = ()
    failures: Sequence[Example] = ()
    image: Sequence[Example] = ()


def random_queries(ranked: RankedLists, count: int, seed: int = 0) -> np.ndarray:
    """Draw queries at random, without looking at how well they did.

    Args:
      ranked: lists of q queries.
      count: queries to draw; at most q are.
      seed: seed of the draw.

    Returns:
      (n,) int, places in ``ranked``, sorted.
    """
    total = len(ranked.queries)
    return np.sort(
        host_rng(seed, Stream.EXAMPLE_QUERIES).choice(total, min(count, total), replace=False)
    )


def worst_queries(ranked: RankedLists, count: int) -> np.ndarray:
    """Choose the queries whose correct item ends up furthest down.

    Args:
      ranked: lists of q queries.
      count: number of queries to choose at most; one whose correct item is first is never chosen.

    Returns:
      (n,) int, places in ``ranked``, the worst first.
    """
    # The last stage there is decides.
    final = ranked.coarse_rank if ranked.fine_rank is None else ranked.fine_rank
    worst = np.argsort(-final, kind="stable")[:count]
    return worst[final[worst] > 1]


def make_examples(
    ranked: RankedLists,
    places: Iterable[int],
    query_media: Callable[[int], Media],
    gallery_media: Callable[[int], Media],
    answer: Callable[[int], Media] | None = None,
    top: int = SHOWN,
) -> list[Example]:
    """Make the examples of some queries.

    Args:
      ranked: lists of q queries.
      places: places in ``ranked``.
      query_media: returns the media of a row among the queries.
      gallery_media: returns the media of a row of the gallery.
      answer: returns a correct item for a row of the queries; None to show none.
      top: answers per query.
    """
    examples = []
    for place in places:
        # Lists have rows of the gallery; ranked.queries has the rows of the queries.
        query = int(ranked.queries[place])
        example = Example(
            query=query_media(query),
            coarse=[gallery_media(int(row)) for row in ranked.coarse[place, :top]],
            coarse_hits=ranked.coarse_hits[place, :top].tolist(),
            coarse_rank=int(ranked.coarse_rank[place]),
            answer=answer(query) if answer else None,
        )
        examples.append(_with_fine(example, ranked, place, gallery_media, top))
    return examples


def _with_fine(
    example: Example,
    ranked: RankedLists,
    place: int,
    gallery_media: Callable[[int], Media],
    top: int,
) -> Example:
    """Add the fine ranking to an example, if there is one."""
    if ranked.fine is None or ranked.fine_hits is None or ranked.fine_rank is None:
        return example
    return dataclasses.replace(
        example,
        fine=[gallery_media(int(row)) for row in ranked.fine[place, :top]],
        fine_hits=ranked.fine_hits[place, :top].tolist(),
        fine_rank=int(ranked.fine_rank[place]),
    )
