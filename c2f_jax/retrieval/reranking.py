"""Fine ranking: match the first k candidates of each query by the multimodal encoder (SIM).

Tie rule: among equal scores the item with the better coarse place ranks first. So a matcher that
scores all alike leaves the coarse ranking as it is, k = 1 gives exactly the coarse R@1, and
k = gallery size gives the full SIM ranking (equal match logits in coarse order).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from c2f_jax.errors import UserError
from c2f_jax.retrieval.checks import check_rank
from c2f_jax.retrieval.ranking import fixed_blocks

PAIR_CHUNK = 256
SCORES = ("sic", "sim", "sum", "prob", "joint")

# (speech tokens (b, T, W), speech lengths (b,), image tokens (b, P, W)) -> logits (b, 2)
MatchFunction: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], ArrayLike]


@dataclass(frozen=True)
class StagedMatch:
    """A match function in two stages, so that what all pairs of an item share is computed once.

    Attributes:
      prepare_speech: (tokens (r, T, W), lengths (r,), size) -> array of size rows, the first r of
        them of these recordings.
      prepare_image: (tokens (g, P, W), size) -> the same of images.
      match: (prepared speech (s, ...), lengths (s,), prepared images (s, ...), rows of speech (b,),
        rows of images (b,)) -> logits (b, 2).
      most_items: recordings, or images, to be prepared at once, for the memory they take.
    """

    prepare_speech: Callable[[np.ndarray, np.ndarray, int], Any]
    prepare_image: Callable[[np.ndarray, int], Any]
    match: Callable[..., ArrayLike]
    most_items: int


# (work) -> results of work(p, n) for each of n processes p, as ``training.distributed.share_work``
ShareWork: TypeAlias = Callable[[Callable[[int, int], Any]], list]


def do_alone(work: Callable[[int, int], Any]) -> list:
    """Do all of some work in this process."""
    return [work(0, 1)]


def match_candidates(
    match_fn: MatchFunction | StagedMatch,
    query_tokens: np.ndarray,
    gallery_tokens: np.ndarray,
    candidates: ArrayLike,
    *,
    direction: str,
    speech_lengths: ArrayLike,
    pair_chunk: int = PAIR_CHUNK,
    length_buckets: int = 1,
    share_work: ShareWork = do_alone,
) -> np.ndarray:
    """Compute the match logit of every (query, candidate) pair: logits[:, 1] - logits[:, 0].

    Tokens stay on the host, and one chunk of pairs travels at a time.

    Args:
      match_fn: SIM logits (b, 2) of b pairs; always called with b = pair_chunk (the last chunk is
        padded with copies of a pair), so a jitted function compiles once per length bucket. Or the
        same in two stages.
      query_tokens: "s2i": (Q, T, W) of recordings; "i2s": (Q, P, W) of images.
      gallery_tokens: "s2i": (G, P, W) of images; "i2s": (G, T, W) of recordings.
      candidates: (Q, k) gallery rows.
      direction: "s2i" or "i2s".
      speech_lengths: valid tokens of each recording, (Q,) for "s2i", (G,) for "i2s".
      pair_chunk: b, pairs matched at once.
      length_buckets: number of lengths that T is cut to; a pair is matched at the shortest that
        holds its recording, or the longest of a single chunk. More buckets mean fewer padding
        tokens and more compilations.
      share_work: divides the chunks over processes, all of which have the same arguments.

    Returns:
      (Q, k) float32.

    Raises:
      UserError: unknown direction, shapes that do not fit, or match logits that are not finite.
    """
    candidates = np.asarray(candidates)
    pairs = _pair_up(query_tokens, gallery_tokens, candidates, direction, speech_lengths)

    chunks = list(_cut(pairs, pair_chunk, length_buckets))

    def match_share(process: int, processes: int) -> np.ndarray:
        """Return the match logits of the pairs of every n-th chunk, one after the other."""
        share = chunks[process::processes]
        total = sum(len(chunk.members) for chunk in share)
        # The first process alone shows its progress, and only on a terminal.
        bar_style = {"unit": "pair", "disable": True if process else None, "leave": False}
        found = [np.empty(0, np.float32)]
        with tqdm(total=total, desc=f"matching {direction}", **bar_style) as bar:
            for members, logits in _matched_chunks(match_fn, pairs, share):
                # The last chunk of a bucket was padded with copies.
                values = np.asarray(logits, np.float32)
                found.append((values[:, 1] - values[:, 0])[: len(members)])
                bar.update(len(members))
        return np.concatenate(found)

    # Back to the order of the pairs.
    match_logits = np.empty(candidates.size, np.float32)
    shares = share_work(match_share)
    for process, values in enumerate(shares):
        start = 0
        for chunk in chunks[process :: len(shares)]:
            stop = start + len(chunk.members)
            match_logits[chunk.members] = values[start:stop]
            start = stop

    bad = int(np.sum(~np.isfinite(match_logits)))
    if bad:
        raise UserError(
            f"match logits ({direction}): {bad} of {match_logits.size} are NaN or infinite; the "
            "multimodal encoder diverged, evaluate an earlier checkpoint"
        )
    return match_logits.reshape(candidates.shape)


def fine_scores(cosine: ArrayLike, match_logit: ArrayLike, tau: float) -> dict[str, np.ndarray]:
    """Compute the five scores that can order the k candidates of a query.

    sic = cosine;  sim = match logit;  sum = cosine + match logit (BLIP);
    prob = sigmoid(match logit);  joint = cosine / tau + match logit

    Why joint: SIM's negatives are drawn by SIC, an image for each speech with
    q(i|s) = p(i) exp(cosine / tau) / Z(s), a speech for each image with q(s|i) likewise. That is
    noise-contrastive estimation with SIC as the noise: the best match logit is
    log p(s,i) - log[p(s) q(i|s) + p(i) q(s|i)]
    = log p(i|s)/p(i) - cosine / tau - log[1/Z(s) + 1/Z(i)], the residual that SIC left. Alone it
    ranks by what SIC did not know; with cosine / tau added it is the posterior log-odds
    log p(i|s)/p(i), up to a constant if Z varies little. Negatives mined at a temperature T above
    tau leave the residual over cosine / T, which repeats part of what the cosine knows; the sum
    then pools two estimates of the same log-odds, SIC's and SIM's.

    Args:
      cosine: (Q, k), or any shape.
      match_logit: the same shape.
      tau: temperature that divides the cosine.

    Returns:
      Score name -> float64 array of the shape of cosine.

    Raises:
      UserError: tau is not above 0.

    Reference:
      Gutmann and Hyvarinen, Noise-contrastive estimation, AISTATS 2010.

    >>> {name: float(value) for name, value in fine_scores(0.5, 0.0, tau=0.1).items()}
    {'sic': 0.5, 'sim': 0.0, 'sum': 0.5, 'prob': 0.5, 'joint': 5.0}
    """
    if not tau > 0:
        raise UserError(f"tau must be above 0, the temperature that divides the cosine; got {tau}")
    # float64: a large match logit must not swallow small differences of the cosine.
    cosine, match_logit = np.asarray(cosine, np.float64), np.asarray(match_logit, np.float64)
    if cosine.shape != match_logit.shape:
        raise UserError(
            f"match_logit must have the shape of cosine, {cosine.shape}; got {match_logit.shape}"
        )
    return {
        "sic": cosine,
        "sim": match_logit,
        "sum": cosine + match_logit,
        "prob": 0.5 * (1.0 + np.tanh(0.5 * match_logit)),
        "joint": cosine / tau + match_logit,
    }


def fine_order(scores: ArrayLike) -> np.ndarray:
    """Order the candidates of each query by falling score; equal scores keep their coarse order.

    Args:
      scores: (Q, k), candidates in coarse order.

    Returns:
      (Q, k) int, places of the candidates.

    >>> fine_order([[1.0, 3.0, 3.0]]).tolist()
    [[1, 2, 0]]
    """
    scores = np.asarray(scores)
    check_rank("scores", scores, "Q", "k")
    return np.argsort(-scores, axis=1, kind="stable")


def rerank(lists: ArrayLike, scores: ArrayLike) -> np.ndarray:
    """Put the first k items of each ranked list in order of their scores.

    Args:
      lists: (Q, L) ranked lists in coarse order: gallery rows, hits or anything else per item.
      scores: (Q, k) scores of the first k items, k <= L.

    Returns:
      (Q, L); the items after the first k stay where they are.

    >>> rerank([[7, 8, 9]], [[0.0, 1.0]]).tolist()
    [[8, 7, 9]]
    """
    lists, order = np.asarray(lists), fine_order(scores)
    check_rank("lists", lists, "Q", "L")

    if len(lists) != len(order):
        raise UserError(f"{len(lists)} lists, but scores of {len(order)} queries; give one each")
    k = order.shape[1]
    if k > lists.shape[1]:
        raise UserError(f"{k} scores per query, but lists of {lists.shape[1]} items")
    return np.concatenate([np.take_along_axis(lists[:, :k], order, axis=1), lists[:, k:]], axis=1)


def fine_ranks(coarse_rank: ArrayLike, scores: ArrayLike, relevant: ArrayLike) -> np.ndarray:
    """Compute the rank of the first correct item after the k candidates were reranked.

    All other items keep their coarse order behind the candidates, so a query whose correct item is
    not among them keeps its coarse rank.

    Args:
      coarse_rank: (Q,) int, rank before.
      scores: (Q, k) scores of the candidates, in coarse order.
      relevant: (Q, k) bool, which candidates are correct.

    Returns:
      (Q,) int64.

    >>> fine_ranks([2, 9], [[0.0, 1.0], [0.0, 1.0]], [[False, True], [False, False]]).tolist()
    [1, 9]
    """
    coarse_rank = np.asarray(coarse_rank)
    check_rank("coarse_rank", coarse_rank, "Q")

    # A correct item among the candidates decides the rank: all others are behind them.
    hits = rerank(np.asarray(relevant, bool), scores)
    return np.where(hits.any(1), hits.argmax(1) + 1, coarse_rank).astype(np.int64)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a recording and an image: the tokens of both sides and the rows of each pair."""

    speech_tokens: np.ndarray  # (R, T, W)
    speech_lengths: np.ndarray  # (R,)
    image_tokens: np.ndarray  # (G, P, W)
    speech_rows: np.ndarray  # (pairs,)
    image_rows: np.ndarray  # (pairs,)

    def gather(self, pairs: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the arguments of the match function for some pairs, speech cut to ``frames``."""
        speech = self.speech_rows[pairs]
        return (
            self.speech_tokens[speech, :frames],
            self.speech_lengths[speech],
            self.image_tokens[self.image_rows[pairs]],
        )


def _pair_up(
    query_tokens: np.ndarray,
    gallery_tokens: np.ndarray,
    candidates: np.ndarray,
    direction: str,
    speech_lengths: ArrayLike,
) -> _Pairs:
    """Check the arguments of ``match_candidates`` and list its pairs, query by query."""
    if direction not in ("s2i", "i2s"):
        raise UserError(
            f"direction must be 's2i' (speech queries) or 'i2s' (image queries); got {direction!r}"
        )
    check_rank("candidates", candidates, "Q", "k")
    check_rank("query_tokens", query_tokens, "Q", "tokens", "W")
    check_rank("gallery_tokens", gallery_tokens, "G", "tokens", "W")
    if len(candidates) != len(query_tokens):
        raise UserError(
            f"{len(candidates)} rows of candidates for {len(query_tokens)} queries; give one each"
        )

    # Whatever the direction, SIM gets speech first and image second.
    lengths = np.asarray(speech_lengths, np.int32)
    query_rows = np.repeat(np.arange(len(candidates)), candidates.shape[1])
    gallery_rows = candidates.ravel()
    if direction == "s2i":
        pairs = _Pairs(query_tokens, lengths, gallery_tokens, query_rows, gallery_rows)
    else:
        pairs = _Pairs(gallery_tokens, lengths, query_tokens, gallery_rows, query_rows)

    if len(lengths) != len(pairs.speech_tokens):
        raise UserError(
            f"{len(lengths)} speech_lengths for {len(pairs.speech_tokens)} recordings; give one "
            "each"
        )
    return pairs


@dataclass(frozen=True)
class _Chunk:
    """Pairs that are matched at once: their places, and the same filled up with copies of one."""

    members: np.ndarray  # (b,), or fewer in the last chunk of a bucket
    filled: np.ndarray  # (b,)
    frames: int  # that speech is cut to


def _cut(pairs: _Pairs, pair_chunk: int, length_buckets: int) -> Iterator[_Chunk]:
    """Yield all pairs in chunks, one length bucket after another."""
    # The bucket of each pair: the shortest length that holds its recording.
    longest = pairs.speech_tokens.shape[1]
    shares = np.arange(1, length_buckets + 1) / length_buckets
    frames = np.ceil(shares * longest).astype(int)
    bucket = np.searchsorted(frames[:-1], pairs.speech_lengths)[pairs.speech_rows]
    if 0 < len(bucket) <= pair_chunk:
        bucket[:] = bucket.max()  # a call for each length would take longer than the padding
    for number in range(length_buckets):
        members = np.flatnonzero(bucket == number)
        for start, filled in fixed_blocks(members, pair_chunk, members[:1]):
            yield _Chunk(members[start : start + pair_chunk], filled, frames[number])


def _matched_chunks(
    match_fn: MatchFunction | StagedMatch, pairs: _Pairs, chunks: Sequence[_Chunk]
) -> Iterator[tuple[np.ndarray, ArrayLike]]:
    """Yield (places of the pairs, their logits) of each chunk."""
    if isinstance(match_fn, StagedMatch):
        started = _start_staged(match_fn, pairs, chunks)
    else:
        started = (
            (chunk.members, match_fn(*pairs.gather(chunk.filled, chunk.frames))) for chunk in chunks
        )
    # One chunk is computed on the device while the host gathers the next.
    waiting = None
    for one in started:
        if waiting is not None:
            yield waiting
        waiting = one
    if waiting is not None:
        yield waiting


def _start_staged(
    match_fn: StagedMatch, pairs: _Pairs, chunks: Sequence[_Chunk]
) -> Iterator[tuple[np.ndarray, ArrayLike]]:
    """Yield (places of the pairs, their logits) of each chunk, items prepared for many chunks."""
    if not chunks:
        return
    size = len(chunks[0].filled)
    if len(chunks) > 1:
        size = max(size, match_fn.most_items)
    for group in _group(pairs, chunks, size):
        members = np.concatenate([chunk.filled for chunk in group])
        speech_rows = np.unique(pairs.speech_rows[members])
        image_rows = np.unique(pairs.image_rows[members])
        lengths = np.zeros(size, np.int32)
        lengths[: len(speech_rows)] = pairs.speech_lengths[speech_rows]
        tokens = pairs.speech_tokens[speech_rows, : group[0].frames]
        speech = match_fn.prepare_speech(tokens, lengths[: len(speech_rows)], size)
        image = match_fn.prepare_image(pairs.image_tokens[image_rows], size)
        for chunk in group:
            rows = (
                np.searchsorted(speech_rows, pairs.speech_rows[chunk.filled]),
                np.searchsorted(image_rows, pairs.image_rows[chunk.filled]),
            )
            yield chunk.members, match_fn.match(speech, lengths, image, *rows)


def _group(pairs: _Pairs, chunks: Sequence[_Chunk], size: int) -> Iterator[list[_Chunk]]:
    """Yield runs of chunks of one length, with at most ``size`` recordings and images each."""
    group: list[_Chunk] = []
    speech: set[int] = set()
    image: set[int] = set()
    for chunk in chunks:
        more_speech = speech.union(pairs.speech_rows[chunk.filled].tolist())
        more_image = image.union(pairs.image_rows[chunk.filled].tolist())
        too_many = max(len(more_speech), len(more_image)) > size
        if group and (too_many or chunk.frames != group[0].frames):
            yield group
            group = []
            more_speech = set(pairs.speech_rows[chunk.filled].tolist())
            more_image = set(pairs.image_rows[chunk.filled].tolist())
        group.append(chunk)
        speech, image = more_speech, more_image
    yield group
