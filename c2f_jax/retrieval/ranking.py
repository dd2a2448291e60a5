"""Ranking in two stages: coarse by cosine (SIC), fine by the multimodal encoder (SIM). Fixed shapes, bounded memory.

Coarse tie rule: among equal scores the item that comes first in the gallery ranks first. Fine tie rule: among equal
scores the earlier coarse place. So a matcher without an opinion leaves the coarse ranking as it was, k = 1 gives the
coarse R@1 exactly, and k = gallery size gives the full SIM ranking (equal match logits in coarse order).
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from c2f_jax.errors import UserError

QUERY_CHUNK = 512
GALLERY_CHUNK = 8192
PAIR_CHUNK = 256


def coarse_top_k(
    queries, gallery, k: int, *, chunk: int = QUERY_CHUNK, gallery_chunk: int = GALLERY_CHUNK
):
    """The k gallery items nearest to each query by inner product, best first.

    queries (Q, D), gallery (G, D), L2-normalised -> scores (Q, k) float32, indices (Q, k) int32. k above G is cut to G.
    Holds chunk x gallery_chunk scores at a time. Raises UserError on NaN or infinity, k < 1, an empty side, unequal D.
    """
    queries, gallery = _matched(queries, gallery)
    if k < 1:
        raise UserError(
            f"k must be at least 1, the number of items to return for each query; got {k}."
        )
    k, size = min(k, len(gallery)), len(gallery)
    chunk, gallery_chunk = min(chunk, len(queries)), min(gallery_chunk, size)
    empty = jnp.full((chunk, k), -jnp.inf, jnp.float32), jnp.zeros((chunk, k), jnp.int32)
    best = [empty] * -(-len(queries) // chunk)
    for start, items in _blocks(gallery, gallery_chunk):
        items = jnp.asarray(items)
        for number, (_, block) in enumerate(_blocks(queries, chunk)):
            best[number] = _merge_top_k(block, items, start, size, *best[number])
    scores, indices = (
        np.concatenate([np.asarray(part) for part in parts])[: len(queries)]
        for parts in zip(*best, strict=True)
    )
    return scores, indices


def first_relevant_rank(
    queries,
    gallery,
    query_ids,
    gallery_ids,
    *,
    chunk: int = QUERY_CHUNK,
    gallery_chunk: int = GALLERY_CHUNK,
) -> np.ndarray:
    """The exact 1-based coarse rank of each query's best right item in the whole gallery: (Q,) int64.

    rank = 1 + #{wrong j: s_j > s*} + #{wrong j: s_j = s*, j < j*}, (s*, j*) the best right item, the first of equals.

    An item is right when its id equals the query's. Raises UserError when a query has no right item.
    """
    queries, gallery = _matched(queries, gallery)
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    if len(query_ids) != len(queries) or len(gallery_ids) != len(gallery):
        raise UserError(
            f"{len(query_ids)} query ids for {len(queries)} queries and {len(gallery_ids)} gallery ids for "
            f"{len(gallery)} items; give one id each."
        )
    orphans = np.flatnonzero(~np.isin(query_ids, gallery_ids))
    if len(orphans):
        raise UserError(
            f"{len(orphans)} queries have no right item in the gallery, the first is query {orphans[0]}, "
            f"id {query_ids[orphans[0]]}; leave such queries out."
        )
    # Dense ids fit int32 whatever the caller's ids are; -1 and -2 pad queries and gallery and never meet.
    dense = np.unique(np.concatenate([query_ids, gallery_ids]), return_inverse=True)[1].astype(
        np.int32
    )
    query_ids, gallery_ids = dense[: len(queries)], dense[len(queries) :]
    chunk, gallery_chunk = min(chunk, len(queries)), min(gallery_chunk, len(gallery))

    def walk(step, carries):
        gallery_blocks = zip(
            _blocks(gallery, gallery_chunk), _blocks(gallery_ids, gallery_chunk, -2), strict=True
        )
        for (start, items), (_, item_ids) in gallery_blocks:
            items = jnp.asarray(items)
            query_blocks = zip(_blocks(queries, chunk), _blocks(query_ids, chunk, -1), strict=True)
            for number, ((_, block), (_, ids)) in enumerate(query_blocks):
                carries[number] = step(block, items, ids, item_ids, start, *carries[number])
        return carries

    blocks = -(-len(queries) // chunk)
    best = walk(_best_relevant, [(jnp.full(chunk, -jnp.inf), jnp.zeros(chunk, jnp.int32))] * blocks)
    counted = walk(_count_ahead, [(*pair, jnp.ones(chunk, jnp.int32)) for pair in best])
    return np.concatenate([np.asarray(ranks) for *_, ranks in counted])[: len(queries)].astype(
        np.int64
    )


def rerank(
    match_fn: Callable,
    query_tokens,
    gallery_tokens,
    candidates,
    *,
    direction: str,
    speech_lengths,
    pair_chunk: int = PAIR_CHUNK,
    length_buckets: int = 1,
) -> np.ndarray:
    """The match logit of every (query, candidate) pair: logits[:, 1] - logits[:, 0], (Q, k) float32.

    match_fn(speech_tokens (b, T, W), speech_lengths (b,), image_tokens (b, P, W)) -> (b, 2), always called with
    b = pair_chunk (the last chunk is padded with copies of a pair), so a jitted match_fn compiles once.
    direction "s2i": queries are recordings (Q, T, W), the gallery pictures (G, P, W); "i2s": the other way round.
    speech_lengths: valid tokens of each recording, (Q,) or (G,). Tokens stay on the host, one chunk of pairs travels.
    length_buckets > 1 cuts T to that many lengths and hands each pair over at the shortest that holds its recording:
    fewer padding tokens for as many compilations; every token that counts must then lie below speech_lengths.
    Raises UserError on an unknown direction, lengths that do not fit and match logits that are not finite.
    """
    if direction not in ("s2i", "i2s"):
        raise UserError(
            f"direction must be 's2i' (speech queries) or 'i2s' (image queries); got {direction!r}."
        )
    candidates = np.asarray(candidates)
    query_rows, gallery_rows = (
        np.repeat(np.arange(len(candidates)), candidates.shape[1]),
        candidates.ravel(),
    )
    speech_tokens, image_tokens, speech_rows, image_rows = (
        (query_tokens, gallery_tokens, query_rows, gallery_rows)
        if direction == "s2i"
        else (gallery_tokens, query_tokens, gallery_rows, query_rows)
    )
    speech_lengths = np.asarray(speech_lengths, np.int32)
    if len(speech_lengths) != len(speech_tokens):
        raise UserError(
            f"{len(speech_lengths)} speech_lengths for {len(speech_tokens)} recordings; give one each."
        )

    frames = np.ceil(
        np.arange(1, length_buckets + 1) / length_buckets * speech_tokens.shape[1]
    ).astype(int)
    bucket = np.searchsorted(frames[:-1], speech_lengths)[speech_rows]
    match_logits = np.empty(len(query_rows), np.float32)
    waiting = None  # one chunk computes while the host gathers the next
    with tqdm(
        total=len(query_rows),
        desc=f"re-ranking {direction}",
        unit="pair",
        disable=None,
        leave=False,
    ) as bar:
        for number in range(length_buckets):
            members = np.flatnonzero(bucket == number)
            for start, pairs in _blocks(members, pair_chunk, members[:1]):
                speech, image = speech_rows[pairs], image_rows[pairs]
                logits = match_fn(
                    speech_tokens[speech, : frames[number]],
                    speech_lengths[speech],
                    image_tokens[image],
                )
                if waiting is not None:
                    bar.update(_store(match_logits, *waiting))
                waiting = members[start : start + pair_chunk], logits
        if waiting is not None:
            bar.update(_store(match_logits, *waiting))
    if not np.isfinite(match_logits).all():
        bad = np.sum(~np.isfinite(match_logits))
        raise UserError(
            f"match logits ({direction}): {bad} of {match_logits.size} are NaN or infinite; the multimodal "
            "encoder diverged, evaluate an earlier checkpoint."
        )
    return match_logits.reshape(candidates.shape)


def fine_scores(cosine, match_logit, tau: float) -> dict[str, np.ndarray]:
    """The five scores that can rank k candidates: float64 arrays of the shape of cosine, (Q, k).

    sic = cosine;  sim = match logit;  sum = cosine + match logit (BLIP);  prob = sigmoid(match logit)
    joint = cosine / tau + match logit

    Why joint: SIM's negatives are drawn by SIC, an image for each speech with q(i|s) = p(i) exp(cosine / tau) / Z(s),
    a speech for each image with q(s|i) likewise. That is noise-contrastive estimation (Gutmann and Hyvarinen, 2010)
    with SIC as the noise: the best match logit is log p(s,i) - log[p(s) q(i|s) + p(i) q(s|i)]
    = log p(i|s)/p(i) - cosine / tau - log[1/Z(s) + 1/Z(i)], the residual that SIC left. Alone it ranks by what SIC did
    not know; cosine / tau added, it is the posterior log-odds log p(i|s)/p(i), up to a constant where Z varies little.
    Negatives mined at a temperature T above tau leave the residual over cosine / T, which repeats part of what the
    cosine knows; the sum then pools two estimates of the same log-odds, SIC's and SIM's.

    >>> {name: float(value) for name, value in fine_scores(0.5, 0.0, tau=0.1).items()}
    {'sic': 0.5, 'sim': 0.0, 'sum': 0.5, 'prob': 0.5, 'joint': 5.0}
    """
    if not tau > 0:
        raise UserError(f"tau must be above 0, the temperature that divides the cosine; got {tau}.")
    cosine, match_logit = np.asarray(cosine, np.float64), np.asarray(match_logit, np.float64)
    return {
        "sic": cosine,
        "sim": match_logit,
        "sum": cosine + match_logit,
        "prob": 0.5 * (1.0 + np.tanh(0.5 * match_logit)),
        "joint": cosine / tau + match_logit,
    }


def fine_order(scores) -> np.ndarray:
    """The places (Q, k) of the candidates by falling score; equal scores keep their coarse order.

    >>> fine_order([[1.0, 3.0, 3.0]]).tolist()
    [[1, 2, 0]]
    """
    return np.argsort(-np.asarray(scores), axis=1, kind="stable")


def fine_ranks(coarse_rank, scores, relevant) -> np.ndarray:
    """The rank of the first right item after the k candidates were put in order of score: (Q,) int64.

    coarse_rank (Q,); scores (Q, k) of the candidates in coarse order; relevant (Q, k) bool. All other items keep their
    coarse order behind the candidates, so a query whose right item is not among them keeps its coarse rank.

    >>> fine_ranks([2, 9], [[0.0, 1.0], [0.0, 1.0]], [[False, True], [False, False]]).tolist()
    [1, 9]
    """
    hits = np.take_along_axis(np.asarray(relevant, bool), fine_order(scores), axis=1)
    return np.where(hits.any(1), hits.argmax(1) + 1, np.asarray(coarse_rank)).astype(np.int64)


def check_finite(name: str, values) -> None:
    """Raises UserError, naming the array and its first bad row, when a value is NaN or infinite."""
    bad = np.flatnonzero(
        ~np.isfinite(np.asarray(values, np.float32)).reshape(len(values), -1).all(1)
    )
    if len(bad):
        raise UserError(
            f"{name}: {len(bad)} of {len(values)} rows hold NaN or infinity, the first is row {bad[0]}; "
            "training diverged or an input is broken: evaluate an earlier checkpoint, check the data."
        )


def _matched(queries, gallery) -> tuple[np.ndarray, np.ndarray]:
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"queries (Q, D) and gallery (G, D) must share D; got {queries.shape} and {gallery.shape}."
        )
    if not len(queries) or not len(gallery):
        raise UserError(
            f"nothing to search: {len(queries)} queries and {len(gallery)} gallery items."
        )
    check_finite("queries", queries)
    check_finite("gallery", gallery)
    return queries, gallery


def _blocks(rows: np.ndarray, size: int, fill=0) -> Iterator[tuple[int, np.ndarray]]:
    """(start, block) over rows, every block with exactly `size` rows, the last one filled up."""
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        if len(block) < size:
            block = np.concatenate(
                [block, np.full((size - len(block), *rows.shape[1:]), fill, rows.dtype)]
            )
        yield start, block


def _store(match_logits: np.ndarray, pairs: np.ndarray, logits) -> int:
    logits = np.asarray(logits, np.float32)
    match_logits[pairs] = (logits[:, 1] - logits[:, 0])[: len(pairs)]
    return len(pairs)


def _inner_products(queries, items):
    # (q, D) . (c, D) -> (q, c). Full float32: TPU and GPU defaults would round the ranking.
    return jnp.matmul(queries, items.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _merge_top_k(queries, items, start, size, best_scores, best_indices):
    columns = start + jnp.arange(items.shape[0], dtype=jnp.int32)
    scores = jnp.where(columns[None, :] < size, _inner_products(queries, items), -jnp.inf)
    # Earlier blocks stand first, and top_k takes the first of equals: the tie rule holds over blocks too.
    scores = jnp.concatenate([best_scores, scores], axis=1)
    columns = jnp.broadcast_to(columns[None, :], (queries.shape[0], columns.size))
    top, places = jax.lax.top_k(scores, best_scores.shape[1])
    return top, jnp.take_along_axis(
        jnp.concatenate([best_indices, columns], axis=1), places, axis=1
    )


@jax.jit
def _best_relevant(queries, items, query_ids, item_ids, start, best_score, best_index):
    right = query_ids[:, None] == item_ids[None, :]
    scores = jnp.where(right, _inner_products(queries, items), -jnp.inf)
    place, score = scores.argmax(1), scores.max(1)
    better = score > best_score
    return jnp.where(better, score, best_score), jnp.where(
        better, start + place.astype(jnp.int32), best_index
    )


@jax.jit
def _count_ahead(queries, items, query_ids, item_ids, start, best_score, best_index, rank):
    scores = _inner_products(queries, items)
    columns = start + jnp.arange(items.shape[0], dtype=jnp.int32)
    wrong = (query_ids[:, None] != item_ids[None, :]) & (item_ids[None, :] >= 0)
    tied_before = (scores == best_score[:, None]) & (columns[None, :] < best_index[:, None])
    ahead = wrong & ((scores > best_score[:, None]) | tied_before)
    return best_score, best_index, rank + ahead.sum(1, dtype=jnp.int32)
