"""Coarse and fine evaluation of one split in both directions, from embeddings and tokens."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from c2f_jax.errors import UserError
from c2f_jax.retrieval import ranking, recall, reranking
from c2f_jax.retrieval.calibration import (
    Calibration,
    Reliability,
    fit_calibration,
    measure_reliability,
)
from c2f_jax.retrieval.checks import check_finite
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.retrieval.recall import Metric
from c2f_jax.retrieval.reranking import SCORES, MatchFunction, ShareWork, StagedMatch, do_alone
from c2f_jax.retrieval.result import (
    DIRECTIONS,
    Bootstrap,
    EvaluationResult,
    QueryCounts,
    RankedLists,
    StageMetrics,
)

LEAST_DEPTH = 10  # items of a ranked list that metrics and pages look at
MOST_NORM_ERROR = 0.02  # of an L2-normalized embedding, as bfloat16 rounds it


@dataclass(frozen=True)
class EvalConfig:
    """Options of an evaluation.

    Attributes:
      k: number of candidates for each query that SIM reranks; all of a gallery smaller than k.
      score: score that orders the candidates: "sic", "sim", "sum", "prob" or "joint".
      batch_size: rows encoded at once.
      pair_batch_size: pairs matched at once.
      resamples: number of bootstrap resamples behind the confidence intervals.
    """

    k: int = field(default=32, metadata={"min": 1})
    score: str = field(default="joint", metadata={"choices": SCORES})
    batch_size: int = field(default=100, metadata={"min": 1})
    pair_batch_size: int = field(default=256, metadata={"min": 1})
    resamples: int = field(default=1000, metadata={"min": 1})


def evaluate_retrieval(
    encoded: EncodedSplit,
    config: EvalConfig,
    match_fn: MatchFunction | StagedMatch | None = None,
    *,
    tau: float,
    length_buckets: int = 1,
    seed: int = 0,
    share_work: ShareWork = do_alone,
    calibrate: bool = False,
    calibrations: Mapping[str, Calibration] | None = None,
) -> EvaluationResult:
    """Compute all retrieval numbers of one split, in both directions.

    Queries without a correct item are left out and counted. SIM reranks the k best candidates of
    each query; ``result.fine`` is by ``config.score``, ``result.fine_scores`` has all five scores.

    Args:
      encoded: the split; tokens and lengths are needed only with match_fn.
      config: k, score, pair_batch_size and resamples.
      match_fn: SIM logits of pairs; None to report the coarse stage alone.
      tau: temperature that divides the cosine in the score "joint".
      length_buckets: see ``reranking.match_candidates``.
      seed: seed of the bootstrap.
      share_work: divides the matching over processes, all of which have the same arguments.
      calibrate: whether to fit what turns scores into probabilities, with match_fn.
      calibrations: "s2i" and "i2s" -> what was fitted on another split, to measure how reliable its
        probabilities are, with match_fn.

    Returns:
      The result with its ranked lists.

    Raises:
      UserError: values that are not finite, embeddings that are not normalized, shapes that do not
        fit, or an option out of range.
    """
    _check_config(config)
    speech, image = encoded.speech.embedding, encoded.image.embedding
    sides = {
        "s2i": _Side("speech", np.asarray(speech, np.float32), encoded.speech_ids),
        "i2s": _Side("image", np.asarray(image, np.float32), encoded.image_ids),
    }
    _check_sides(sides)
    matcher = None
    if match_fn is not None:
        _check_tokens(encoded)
        matcher = _Matcher(encoded, match_fn, tau, config, length_buckets, share_work)

    # Both directions, ranked and measured.
    seconds: dict[str, float] = {}
    lists, measured, pairs = {}, {}, {}
    for direction in DIRECTIONS:
        ranked = _rank_direction(sides, direction, config, matcher, share_work)
        if ranked.pairs is not None:
            pairs[direction] = ranked.pairs
        seconds |= ranked.seconds
        lists[direction] = ranked.lists(config.score)
        measured[direction] = _measure(ranked, config.resamples, seed)

    fitted: Mapping[str, Calibration] | None = None
    reliability = None
    if calibrate and pairs:
        fitted = _fit(pairs, config.score)
    elif calibrations and pairs:
        fitted, reliability = calibrations, _check_calibrations(pairs, calibrations)
    return EvaluationResult(
        **_stages(measured, config.score),
        calibrations=fitted,
        reliability=reliability,
        k=config.k,
        score=config.score,
        tau=float(tau),
        seconds=seconds,
        queries=_count_queries(sides, lists),
        bootstrap=_describe_bootstrap(sides, config.resamples, seed),
        lists=lists,
    )


@dataclass(frozen=True)
class _Side:
    """The rows of one modality, as queries or as gallery."""

    kind: str
    embeddings: np.ndarray  # (n, D)
    ids: np.ndarray  # (n,)

    def select(self, rows: np.ndarray) -> "_Side":
        return _Side(self.kind, self.embeddings[rows], self.ids[rows])


@dataclass(frozen=True)
class _Ranking:
    """The ranked lists of q queries."""

    items: np.ndarray  # (q, L) gallery rows, best first
    hits: np.ndarray  # (q, L) bool
    ranks: np.ndarray  # (q,) of the first correct item in the whole gallery


@dataclass(frozen=True)
class _RankedDirection:
    """All rankings of the queries of one direction."""

    queries: _Side  # q queries, those with a correct item
    gallery: _Side
    rows: np.ndarray  # (q,) row of each query among all recordings or images
    rankings: dict[str, _Ranking]  # "coarse", and one for each score if there is a matcher
    seconds: dict[str, float]
    pairs: "_Pairs | None" = None  # with a matcher

    def lists(self, score: str) -> RankedLists:
        """Return the lists for pages, the fine ones by ``score``."""
        coarse, fine = self.rankings["coarse"], self.rankings.get(score)
        lists = RankedLists(self.rows, coarse.items, coarse.hits, coarse.ranks)
        if fine is None:
            return lists
        return dataclasses.replace(
            lists, fine=fine.items, fine_hits=fine.hits, fine_rank=fine.ranks
        )


@dataclass(frozen=True)
class _Pairs:
    """The queries of one direction and their k candidates."""

    scores: dict[str, np.ndarray]  # name -> (q, k)
    hits: np.ndarray  # (q, k) bool
    gallery: int  # different ids


@dataclass(frozen=True)
class _Measured:
    """The metrics of one ranking and their bootstrap samples."""

    metrics: dict[str, float]
    samples: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Matcher:
    """What SIM says about the pairs of one split."""

    encoded: EncodedSplit
    match_fn: MatchFunction | StagedMatch
    tau: float
    config: EvalConfig
    length_buckets: int
    share_work: ShareWork

    def rerank(
        self, direction: str, rows: np.ndarray, coarse: _Ranking, cosine: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, _Ranking]]:
        """Rerank the first k items of each query by each of the five scores.

        Args:
          direction: "s2i" or "i2s".
          rows: (q,) row of each query among all recordings or images.
          coarse: their coarse ranking.
          cosine: (q, L) cosines of its items.

        Returns:
          The scores (q, k), and the rankings by them.
        """
        # One pass of SIM serves all five scores.
        k = self.config.k
        logits = self._match(direction, rows, coarse.items[:, :k])
        rankings = {}
        scored = reranking.fine_scores(cosine[:, :k], logits, self.tau)
        for name, scores in scored.items():
            rankings[name] = _Ranking(
                reranking.rerank(coarse.items, scores),
                reranking.rerank(coarse.hits, scores),
                reranking.fine_ranks(coarse.ranks, scores, coarse.hits[:, :k]),
            )
        return scored, rankings

    def _match(self, direction: str, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the match logits (q, k) of some queries and their candidates."""
        speech, image = self.encoded.speech, self.encoded.image
        queries, gallery = (speech, image) if direction == "s2i" else (image, speech)

        chosen: np.ndarray | slice = rows
        if len(rows) == len(queries.tokens):
            chosen = slice(None)  # copies no tokens

        return reranking.match_candidates(
            self.match_fn,
            np.asarray(queries.tokens)[chosen],
            np.asarray(gallery.tokens),
            candidates,
            direction=direction,
            speech_lengths=speech.lengths[chosen] if direction == "s2i" else speech.lengths,
            pair_chunk=self.config.pair_batch_size,
            length_buckets=self.length_buckets,
            share_work=self.share_work,
        )


def _rank_direction(
    sides: Mapping[str, _Side],
    direction: str,
    config: EvalConfig,
    matcher: _Matcher | None,
    share_work: ShareWork,
) -> _RankedDirection:
    """Rank the gallery for the queries of one direction, coarse and, with a matcher, fine."""
    gallery = sides["i2s" if direction == "s2i" else "s2i"]
    # Queries without a correct item are left out; the gallery stays whole.
    rows = np.flatnonzero(np.isin(sides[direction].ids, gallery.ids))
    queries = sides[direction].select(rows)

    # Coarse: the best items by cosine.
    start = time.perf_counter()
    depth = max(config.k, LEAST_DEPTH)
    # By one process for all: rounding on their devices may differ, and so may the order of items
    # that are nearly equal.
    cosine, coarse = share_work(
        lambda process, _: None if process else _rank_coarse(queries, gallery, depth)
    )[0]
    seconds = {f"coarse_{direction}": time.perf_counter() - start}
    rankings = {"coarse": coarse}

    # Fine: the first k of them in another order.
    pairs = None
    if matcher is not None:
        start = time.perf_counter()
        scored, reranked = matcher.rerank(direction, rows, coarse, cosine)
        rankings |= reranked
        pairs = _Pairs(scored, coarse.hits[:, : config.k], len(np.unique(gallery.ids)))
        seconds[f"fine_{direction}"] = time.perf_counter() - start
    return _RankedDirection(queries, gallery, rows, rankings, seconds, pairs)


def _rank_coarse(queries: _Side, gallery: _Side, depth: int) -> tuple[np.ndarray, _Ranking]:
    """Rank by cosine: the cosines (q, L) of the best L = depth items, and their ranking."""
    cosine, items = ranking.coarse_top_k(queries.embeddings, gallery.embeddings, depth)
    hits = gallery.ids[items] == queries.ids[:, None]
    ranks = ranking.first_relevant_rank(
        queries.embeddings, gallery.embeddings, queries.ids, gallery.ids
    )
    # Within the list its order decides, so that rounding never makes ranks and lists differ.
    beyond = np.maximum(ranks, hits.shape[1] + 1)
    ranks = np.where(hits.any(1), hits.argmax(1) + 1, beyond)
    return cosine, _Ranking(items, hits, ranks)


def _measure(ranked: _RankedDirection, resamples: int, seed: int) -> dict[str, _Measured]:
    """Compute the metrics of each ranking of one direction."""
    # How many correct items the gallery has for each query.
    ids, counts = np.unique(ranked.gallery.ids, return_counts=True)
    relevant_counts = counts[np.searchsorted(ids, ranked.queries.ids)]

    measured = {}
    for name, one in ranked.rankings.items():
        metrics = recall.rank_metrics(one.ranks)
        metrics |= recall.list_metrics(one.hits, relevant_counts)
        samples = recall.bootstrap_metrics(
            one.ranks, ranked.queries.ids, resamples=resamples, seed=seed
        )
        measured[name] = _Measured(metrics, samples)
    return measured


def _stages(measured: Mapping[str, Mapping[str, _Measured]], score: str) -> dict[str, Any]:
    """Collect direction -> ranking -> metrics into the stages of an EvaluationResult."""
    s2i, i2s = measured["s2i"], measured["i2s"]
    stages: dict[str, Any] = {"coarse": _stage(s2i["coarse"], i2s["coarse"])}
    # Without a matcher, "coarse" is all there is.
    if score in s2i:
        stages["fine"] = _stage(s2i[score], i2s[score])
        stages["fine_scores"] = {name: _stage(s2i[name], i2s[name]) for name in SCORES}
        stages["difference"] = _difference(s2i, i2s, score)
    return stages


def _stage(s2i: _Measured, i2s: _Measured) -> StageMetrics:
    """Give the metrics of both directions, and their mean, their intervals."""
    mean, samples = _mean_recall(s2i, i2s)
    return StageMetrics(
        recall.with_intervals(s2i.metrics, s2i.samples),
        recall.with_intervals(i2s.metrics, i2s.samples),
        _mean_metric(mean, samples),
    )


def _difference(
    s2i: Mapping[str, _Measured], i2s: Mapping[str, _Measured], score: str
) -> StageMetrics:
    """Compute fine - coarse with paired intervals."""
    gains = []
    for measured in (s2i, i2s):
        fine, coarse = measured[score], measured["coarse"]
        gain = recall.difference_with_intervals(
            fine.metrics, coarse.metrics, fine.samples, coarse.samples
        )
        gains.append(gain)

    # The mean of six is paired like its parts.
    fine_mean, fine_samples = _mean_recall(s2i[score], i2s[score])
    coarse_mean, coarse_samples = _mean_recall(s2i["coarse"], i2s["coarse"])
    mean = _mean_metric(fine_mean - coarse_mean, fine_samples - coarse_samples)
    return StageMetrics(gains[0], gains[1], mean)


def _fit(pairs: Mapping[str, _Pairs], score: str) -> dict[str, Calibration]:
    """Fit what turns scores into probabilities, where that can be done."""
    fitted = {}
    for direction, one in pairs.items():
        found = fit_calibration(one.scores[score], one.hits, score=score, gallery=one.gallery)
        if found is not None:
            fitted[direction] = found
    return fitted


def _check_calibrations(
    pairs: Mapping[str, _Pairs], calibrations: Mapping[str, Calibration]
) -> dict[str, dict[str, Reliability]]:
    """Measure the probabilities of SIM as it is, and those of the calibrations."""
    checked = {}
    for direction, found in calibrations.items():
        one = pairs[direction]
        probability = found.probability(one.scores[found.score], one.gallery)
        checked[direction] = {
            "before": measure_reliability(one.scores["prob"], one.hits),
            "after": measure_reliability(probability, one.hits),
        }
    return checked


def _mean_recall(s2i: _Measured, i2s: _Measured) -> tuple[float, np.ndarray]:
    """Average the six R@K: the value, and its bootstrap samples.

    Both directions draw the same images (same ids, same seed), so samples are averaged one by one.
    """
    value = recall.mean_recall(s2i.metrics, i2s.metrics)
    return value, recall.mean_recall(s2i.samples, i2s.samples)


def _mean_metric(value: float, samples: np.ndarray) -> Metric:
    return recall.with_intervals({"mean_recall": value}, {"mean_recall": samples})["mean_recall"]


def _count_queries(sides: Mapping[str, _Side], lists: Mapping[str, RankedLists]) -> QueryCounts:
    recordings, images = len(sides["s2i"].ids), len(sides["i2s"].ids)
    s2i, i2s = len(lists["s2i"].queries), len(lists["i2s"].queries)
    return QueryCounts(
        speech_to_image=s2i,
        image_to_speech=i2s,
        gallery_images=images,
        gallery_recordings=recordings,
        recordings_without_image=recordings - s2i,
        images_without_recording=images - i2s,
    )


def _describe_bootstrap(sides: Mapping[str, _Side], resamples: int, seed: int) -> Bootstrap:
    shared = np.intersect1d(sides["s2i"].ids, sides["i2s"].ids)
    return Bootstrap(resamples, seed, recall.INTERVAL, unit="image id", units=len(shared))


def _check_config(config: EvalConfig) -> None:
    if config.score not in SCORES:
        raise UserError(f"score must be one of {', '.join(SCORES)}; got {config.score!r}")
    if config.k < 1:
        raise UserError(f"k must be at least 1, the number of candidates to rerank; got {config.k}")


def _check_sides(sides: Mapping[str, _Side]) -> None:
    """Raise UserError unless both sides are normalized, finite and share ids."""
    for side in sides.values():
        name, embeddings = f"{side.kind}_embeddings", side.embeddings
        if embeddings.ndim != 2 or side.ids.shape != embeddings.shape[:1]:
            raise UserError(
                f"{name} must be (rows, D), with one id a row; got {embeddings.shape} and ids "
                f"{side.ids.shape}"
            )
        check_finite(name, embeddings)

        # Cosines are computed as plain products.
        norms = np.linalg.norm(embeddings, axis=1)
        errors = np.abs(norms - 1.0)
        if np.any(errors > MOST_NORM_ERROR):
            row = int(np.argmax(errors))
            raise UserError(
                f"{name} must be L2-normalized, so that their products are cosines; row {row} has "
                f"norm {norms[row]:.3g}. Divide each row by its norm"
            )

    # Ids of different numberings would leave out every query.
    if not np.isin(sides["s2i"].ids, sides["i2s"].ids).any():
        raise UserError(
            "no recording shares its id with an image; speech_ids and image_ids must name the same "
            "images"
        )


def _check_tokens(encoded: EncodedSplit) -> None:
    """Raise UserError unless each recording and each image has its tokens."""
    recordings, images = len(encoded.speech_ids), len(encoded.image_ids)
    for name, values, rows in (
        ("speech_tokens", encoded.speech.tokens, recordings),
        ("speech_lengths", encoded.speech.lengths, recordings),
        ("image_tokens", encoded.image.tokens, images),
    ):
        if values is None or len(values) != rows:
            found = "none" if values is None else len(values)
            raise UserError(
                f"{name} must have {rows} rows for the fine stage, one for each embedding; got "
                f"{found}"
            )
