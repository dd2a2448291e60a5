"""Retrieval metrics from ranks, with bootstrap intervals over images.

The rank of a query is the 1-based place of its first correct item. Tie rule: among equal scores the
item that comes first in the gallery ranks first (as in jax.lax.top_k), so a collapsed model, which
gives every item the same score, gets chance.

R@K and fraction_recall@K are percentages; MRR and nDCG@10 lie in [0, 1]; median_rank counts places.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from c2f_jax.errors import UserError
from c2f_jax.objectives.keys import Stream, host_rng
from c2f_jax.retrieval.checks import check_rank

RECALL_AT = (1, 5, 10)
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles of the bootstrap samples, 95 % between them
LIST_DEPTH = 10  # items of a ranked list that nDCG@10 looks at
MEDIAN_BLOCK = 64  # resamples whose medians are computed at once


@dataclass(frozen=True)
class Metric:
    """One number with its 95 % confidence interval.

    Attributes:
      value: the metric on all queries.
      interval: lower and upper bound; None for a metric without bootstrap samples.
    """

    value: float
    interval: tuple[float, float] | None = None


def rank_metrics(ranks: ArrayLike) -> dict[str, float]:
    """Compute the metrics that need the rank of the first correct item.

    R@K = 100 mean[rank <= K],  K = 1, 5, 10;  MRR = mean[1 / rank];  and the median rank.

    Args:
      ranks: (Q,) integers, at least 1.

    Returns:
      "R@1", "R@5", "R@10", "median_rank" and "MRR".

    Raises:
      UserError: there is no rank, or one is below 1.

    >>> rank_metrics([1, 2, 7, 20])["R@5"], rank_metrics([1, 2, 7, 20])["median_rank"]
    (50.0, 4.5)
    >>> rank_metrics([1, 2, 4])["MRR"] == (1 + 1 / 2 + 1 / 4) / 3
    True
    """
    checked = _checked_ranks(ranks)

    metrics = {}
    for cut in RECALL_AT:
        metrics[f"R@{cut}"] = 100.0 * float(np.mean(checked <= cut))
    metrics["median_rank"] = float(np.median(checked))
    metrics["MRR"] = float(np.mean(1.0 / checked))
    return metrics


def list_metrics(hits: ArrayLike, relevant_counts: ArrayLike) -> dict[str, float]:
    """Compute MTEB's metrics, which ask for all correct items of a query, not only for the first.

    nDCG@10 = mean[ sum_j hit_j / log2(j + 1)  /  sum_{j <= min(R, 10)} 1 / log2(j + 1) ],
    j = 1..10

    fraction_recall@K = 100 mean[ sum_{j <= K} hit_j / R ]

    Args:
      hits: (Q, L) bool, the ranked list of each query, best first; L >= 10 unless the gallery is
        smaller.
      relevant_counts: (Q,) int, R, the number of correct items in the whole gallery, at least 1.

    Returns:
      "nDCG@10" and "fraction_recall@K" for K = 1, 5, 10.

    Raises:
      UserError: the shapes do not fit, or a query has no correct item.

    Reference:
      Muennighoff et al., MTEB, https://arxiv.org/abs/2210.07316

    >>> metrics = list_metrics([[False, True, False]], [2])
    >>> round(metrics["nDCG@10"], 4), metrics["fraction_recall@5"]
    (0.3869, 50.0)
    """
    hits = np.asarray(hits, bool)
    relevant_counts = np.asarray(relevant_counts, np.int64)
    check_rank("hits", hits, "Q", "L")
    if relevant_counts.shape != hits.shape[:1] or np.any(relevant_counts < 1):
        raise UserError(
            f"relevant_counts must be ({len(hits)},) integers of at least 1, one per query; got "
            f"shape {relevant_counts.shape}"
        )

    # nDCG: found gains over those of an ideal list, which has all correct items first.
    gains = 1.0 / np.log2(np.arange(2, LIST_DEPTH + 2))
    top = hits[:, :LIST_DEPTH]
    ideal = np.cumsum(gains)[np.minimum(relevant_counts, LIST_DEPTH) - 1]
    found = (top * gains[None, : top.shape[1]]).sum(1)

    metrics = {"nDCG@10": float(np.mean(found / ideal))}
    for cut in RECALL_AT:
        fraction = hits[:, :cut].sum(1) / relevant_counts
        metrics[f"fraction_recall@{cut}"] = 100.0 * float(np.mean(fraction))
    return metrics


def mean_recall(speech_to_image: Mapping[str, Any], image_to_speech: Mapping[str, Any]) -> Any:
    """Average the six R@K, three of each direction.

    Args:
      speech_to_image: R@K of one direction: numbers, or arrays of bootstrap samples.
      image_to_speech: R@K of the other direction.

    Returns:
      A number, or an array of samples.

    >>> mean_recall({"R@1": 10, "R@5": 20, "R@10": 30}, {"R@1": 40, "R@5": 50, "R@10": 60})
    35.0
    """
    total = 0
    for direction in (speech_to_image, image_to_speech):
        for cut in RECALL_AT:
            total = total + direction[f"R@{cut}"]
    return total / (2 * len(RECALL_AT))


def bootstrap_metrics(
    ranks: ArrayLike, clusters: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Compute the metrics of ``rank_metrics`` on bootstrap resamples of the clusters.

    Recordings of one image are not independent, so whole images (clusters) are drawn with
    replacement, each with all its queries; the gallery stays as it is. Equal clusters and seed give
    equal draws. This pairs two rankings of the same queries, and the two directions of one split.

    Args:
      ranks: (Q,) integers, at least 1.
      clusters: (Q,) the image of each query.
      resamples: B, the number of resamples.
      seed: seed of the draws.

    Returns:
      Metric name -> (B,) float64.

    Raises:
      UserError: the ranks are invalid, or there is not one cluster per rank.
    """
    checked = _checked_ranks(ranks)
    names, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    if cluster_of.shape != checked.shape:
        raise UserError(
            f"clusters has shape {cluster_of.shape} but ranks has {checked.shape}; give one image "
            "per query"
        )

    # How often each resample draws each cluster: (B, C).
    drawn = host_rng(seed, Stream.BOOTSTRAP).integers(len(names), size=(resamples, len(names)))
    offsets = len(names) * np.arange(resamples)[:, None]
    counts = np.bincount((drawn + offsets).ravel(), minlength=resamples * len(names))
    counts = counts.reshape(resamples, len(names))

    # The mean over the queries of a resample: sums per cluster, weighted by how often it was drawn.
    values = {f"R@{cut}": 100.0 * (checked <= cut) for cut in RECALL_AT}
    values["MRR"] = 1.0 / checked
    sizes = counts @ np.bincount(cluster_of)
    samples = {}
    for name, value in values.items():
        samples[name] = counts @ np.bincount(cluster_of, value) / sizes
    samples["median_rank"] = _weighted_medians(checked, counts, cluster_of)
    return samples


def with_intervals(
    metrics: Mapping[str, float], samples: Mapping[str, np.ndarray]
) -> dict[str, Metric]:
    """Give each metric its 95 % percentile interval.

    Args:
      metrics: metric name -> value.
      samples: metric name -> (B,) bootstrap samples; a metric without samples has no interval.

    Returns:
      Metric name -> Metric, in the order of ``metrics``.

    >>> with_intervals({"R@1": 50.0}, {"R@1": np.arange(101.0)})
    {'R@1': Metric(value=50.0, interval=(2.5, 97.5))}
    """
    result = {}
    for name, value in metrics.items():
        interval = None
        if name in samples:
            low, high = np.percentile(samples[name], INTERVAL)
            interval = (float(low), float(high))
        result[name] = Metric(value, interval)
    return result


def difference_with_intervals(
    fine: Mapping[str, float],
    coarse: Mapping[str, float],
    fine_samples: Mapping[str, np.ndarray],
    coarse_samples: Mapping[str, np.ndarray],
) -> dict[str, Metric]:
    """Compute fine - coarse of each metric with its paired interval.

    Args:
      fine: metric name -> value of the fine stage.
      coarse: metric name -> value of the coarse stage.
      fine_samples: metric name -> (B,) bootstrap samples of the fine stage.
      coarse_samples: bootstrap samples of the coarse stage, from the same draws.

    Returns:
      Metric name -> Metric, for the metrics that have samples.

    >>> difference_with_intervals(
    ...     {"R@1": 60.0}, {"R@1": 50.0}, {"R@1": np.full(9, 61.0)}, {"R@1": np.full(9, 52.0)}
    ... )
    {'R@1': Metric(value=10.0, interval=(9.0, 9.0))}
    """
    # Sample by sample, since both stages have the same draws: this pairs them.
    values, samples = {}, {}
    for name in fine_samples:
        values[name] = fine[name] - coarse[name]
        samples[name] = fine_samples[name] - coarse_samples[name]
    return with_intervals(values, samples)


def _checked_ranks(ranks: ArrayLike) -> np.ndarray:
    """Return ranks as an array, or raise UserError unless they are (Q,) and at least 1."""
    values = np.asarray(ranks)
    if values.ndim != 1 or not values.size or values.min() < 1:
        smallest = f" with smallest value {values.min()}." if values.size else "."
        raise UserError(
            "ranks must be a non-empty (Q,) array of integers of at least 1; got shape "
            f"{values.shape}{smallest}"
        )
    return values


def _weighted_medians(ranks: np.ndarray, counts: np.ndarray, cluster_of: np.ndarray) -> np.ndarray:
    """Compute the median rank of each resample.

    Args:
      ranks: (Q,) ranks of the queries.
      counts: (B, C) how often each resample draws each cluster.
      cluster_of: (Q,) cluster of each query.

    Returns:
      (B,) float64.
    """
    order = np.argsort(ranks, kind="stable")
    ranks, cluster_of = ranks[order], cluster_of[order]
    medians = []
    # In blocks, since the weights of all resamples, (B, Q), need not fit in memory.
    for start in range(0, len(counts), MEDIAN_BLOCK):
        block = counts[start : start + MEDIAN_BLOCK]
        up_to = np.cumsum(block[:, cluster_of], axis=1)
        total = up_to[:, -1:]

        # The ranks at the two middle places, the same place if the number of queries is odd.
        lower = ranks[(up_to > (total - 1) // 2).argmax(1)]
        upper = ranks[(up_to > total // 2).argmax(1)]
        medians.append(0.5 * (lower + upper))
    return np.concatenate(medians)
