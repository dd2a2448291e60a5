"""Retrieval metrics from ranks, with bootstrap intervals over images.

The rank of a query is the 1-based place of its first right item. Tie rule: among equal scores the item that comes first
in the gallery ranks first (what jax.lax.top_k does), so a collapsed model, which scores everything alike, gets chance.

R@K and fraction_recall@K are percentages; MRR and nDCG@10 lie in [0, 1]; median_rank counts places.
"""

from collections.abc import Mapping

import numpy as np

from c2f_jax.errors import UserError
from c2f_jax.objectives.keys import Stream, host_rng

RECALL_AT = (1, 5, 10)
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles of the bootstrap: 95 % inside


def rank_metrics(ranks) -> dict[str, float]:
    """R@K = 100 mean[rank <= K] for K = 1, 5, 10; the median rank; MRR = mean[1 / rank].

    ranks: (Q,) integers from 1. Raises UserError when there is none or one is below 1.

    >>> rank_metrics([1, 2, 7, 20])["R@5"], rank_metrics([1, 2, 7, 20])["median_rank"]
    (50.0, 4.5)
    >>> rank_metrics([1, 2, 4])["MRR"] == (1 + 1 / 2 + 1 / 4) / 3
    True
    """
    ranks = _checked(ranks)
    metrics = {f"R@{cut}": 100.0 * float(np.mean(ranks <= cut)) for cut in RECALL_AT}
    return metrics | {"median_rank": float(np.median(ranks)), "MRR": float(np.mean(1.0 / ranks))}


def list_metrics(hits, relevant_counts) -> dict[str, float]:
    """MTEB's metrics, which ask for all right items of a query and not for the first one only.

    nDCG@10 = mean[ sum_j hit_j / log2(j + 1)  /  sum_{j <= min(R, 10)} 1 / log2(j + 1) ],  j = 1..10
    fraction_recall@K = 100 mean[ sum_{j <= K} hit_j / R ]

    hits: (Q, L) bool, the ranked list of each query, best first, L >= 10 unless the gallery is smaller;
    relevant_counts: (Q,) R, the right items in the whole gallery.

    >>> metrics = list_metrics([[False, True, False]], [2])
    >>> round(metrics["nDCG@10"], 4), metrics["fraction_recall@5"]
    (0.3869, 50.0)
    """
    hits = np.asarray(hits, bool)
    relevant_counts = np.asarray(relevant_counts, np.int64)
    gains = 1.0 / np.log2(np.arange(2, 12))
    top = hits[:, :10]
    ideal = np.cumsum(gains)[np.minimum(relevant_counts, 10) - 1]
    metrics = {"nDCG@10": float(np.mean((top * gains[None, : top.shape[1]]).sum(1) / ideal))}
    for cut in RECALL_AT:
        metrics[f"fraction_recall@{cut}"] = 100.0 * float(
            np.mean(hits[:, :cut].sum(1) / relevant_counts)
        )
    return metrics


def mean_recall(speech_to_image: Mapping, image_to_speech: Mapping):
    """The mean of the six R@K, three a direction; the values may be numbers or arrays of bootstrap samples.

    >>> mean_recall({"R@1": 10, "R@5": 20, "R@10": 30}, {"R@1": 40, "R@5": 50, "R@10": 60})
    35.0
    """
    return (
        sum(side[f"R@{cut}"] for side in (speech_to_image, image_to_speech) for cut in RECALL_AT)
        / 6
    )


def bootstrap_metrics(
    ranks, clusters, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """rank_metrics of `resamples` bootstrap resamples of the clusters: name -> (resamples,).

    Recordings of one image are not independent, so whole images (clusters) are drawn with replacement, each with all
    its queries; the gallery stays as it is. The same clusters and seed give the same draws, which pairs two rankings of
    the same queries, and the two directions of one test set.

    ranks: (Q,) from 1; clusters: (Q,) the image of each query.
    """
    ranks = _checked(ranks)
    names, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    if cluster_of.shape != ranks.shape:
        raise UserError(
            f"clusters has shape {cluster_of.shape} but ranks has {ranks.shape}; give one image per query."
        )
    drawn = host_rng(seed, Stream.BOOTSTRAP).integers(len(names), size=(resamples, len(names)))
    counts = np.bincount(
        (drawn + len(names) * np.arange(resamples)[:, None]).ravel(),
        minlength=resamples * len(names),
    )
    counts = counts.reshape(resamples, len(names))

    values = {f"R@{cut}": 100.0 * (ranks <= cut) for cut in RECALL_AT} | {"MRR": 1.0 / ranks}
    sizes = counts @ np.bincount(cluster_of)
    samples = {
        name: counts @ np.bincount(cluster_of, value) / sizes for name, value in values.items()
    }
    samples["median_rank"] = _weighted_medians(ranks, counts, cluster_of)
    return samples


def with_intervals(metrics: Mapping[str, float], samples: Mapping[str, np.ndarray]) -> dict:
    """Each metric followed by its 95 % percentile interval: {"R@1": x, "R@1_interval": [lo, hi], ...}.

    >>> with_intervals({"R@1": 50.0}, {"R@1": np.arange(101.0)})
    {'R@1': 50.0, 'R@1_interval': [2.5, 97.5]}
    """
    result = {}
    for name, value in metrics.items():
        result[name] = value
        if name in samples:
            result[f"{name}_interval"] = [
                float(bound) for bound in np.percentile(samples[name], INTERVAL)
            ]
    return result


def difference_with_intervals(
    fine: Mapping, coarse: Mapping, fine_samples: Mapping, coarse_samples: Mapping
) -> dict:
    """fine - coarse of each metric with its paired interval: the samples of both must come from the same draws.

    >>> difference_with_intervals({"R@1": 60.0}, {"R@1": 50.0}, {"R@1": np.full(9, 61.0)}, {"R@1": np.full(9, 52.0)})
    {'R@1': 10.0, 'R@1_interval': [9.0, 9.0]}
    """
    return with_intervals(
        {name: fine[name] - coarse[name] for name in fine_samples},
        {name: fine_samples[name] - coarse_samples[name] for name in fine_samples},
    )


def _checked(ranks) -> np.ndarray:
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or not ranks.size or ranks.min() < 1:
        raise UserError(
            f"ranks must be a non-empty (Q,) array of integers from 1 on; got shape {ranks.shape}"
            + (f" with smallest value {ranks.min()}." if ranks.size else ", no query at all.")
        )
    return ranks


def _weighted_medians(ranks, counts, cluster_of, block: int = 64) -> np.ndarray:
    """The median rank of each resample: (B, C) counts -> (B,). In blocks, because (B, Q) weights would not be small."""
    order = np.argsort(ranks, kind="stable")
    ranks, cluster_of = ranks[order], cluster_of[order]
    medians = []
    for start in range(0, len(counts), block):
        upto = np.cumsum(counts[start : start + block, cluster_of], axis=1)
        total = upto[:, -1:]
        lower, upper = (ranks[(upto > place).argmax(1)] for place in ((total - 1) // 2, total // 2))
        medians.append(0.5 * (lower + upper))
    return np.concatenate(medians)
