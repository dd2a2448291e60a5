"""Metrics from ranks against plain loops, and the bootstrap against an explicit resampling and a
known truth."""

import math

import numpy as np
import pytest

from c2f_jax.errors import UserError
from c2f_jax.objectives.keys import Stream, host_rng
from c2f_jax.retrieval import recall


def test_rank_metrics_equal_a_loop():
    ranks = np.random.default_rng(0).integers(1, 40, 101)
    expected = {
        f"R@{cut}": 100 * sum(int(rank) <= cut for rank in ranks) / len(ranks) for cut in (1, 5, 10)
    }
    expected["median_rank"] = float(sorted(ranks)[50])
    expected["MRR"] = sum(1 / int(rank) for rank in ranks) / len(ranks)
    assert recall.rank_metrics(ranks) == pytest.approx(expected, rel=1e-12)


def test_list_metrics_equal_a_loop_with_few_and_many_right_items():
    rng = np.random.default_rng(1)
    hits = rng.random((30, 12)) < 0.3
    counts = np.maximum(hits.sum(1), 1) + rng.integers(0, 15, 30)
    ndcg, found = [], {1: [], 5: [], 10: []}
    for row, count in zip(hits, counts, strict=True):
        gain = sum(1 / math.log2(place + 2) for place in range(10) if row[place])
        ndcg.append(gain / sum(1 / math.log2(place + 2) for place in range(min(count, 10))))
        for cut, values in found.items():
            values.append(sum(row[:cut]) / count)
    metrics = recall.list_metrics(hits, counts)
    assert metrics["nDCG@10"] == pytest.approx(np.mean(ndcg))
    for cut, values in found.items():
        assert metrics[f"fraction_recall@{cut}"] == pytest.approx(100 * np.mean(values))


def test_list_metrics_of_a_gallery_smaller_than_ten():
    assert recall.list_metrics([[True, True, False]], [2])["nDCG@10"] == pytest.approx(1.0)


def test_bootstrap_equals_explicit_resampling_of_unequal_clusters():
    rng = np.random.default_rng(2)
    clusters = np.array([7, 7, 7, 3, 9, 9, 5, 5, 5, 5, 3, 1])
    ranks = rng.integers(1, 12, len(clusters))
    samples = recall.bootstrap_metrics(ranks, clusters, resamples=150, seed=4)
    names = np.unique(clusters)
    drawn = host_rng(4, Stream.BOOTSTRAP).integers(len(names), size=(150, len(names)))
    for number, draw in enumerate(drawn):
        again = np.concatenate([ranks[clusters == names[cluster]] for cluster in draw])
        for name, value in recall.rank_metrics(again).items():
            assert samples[name][number] == pytest.approx(value), (name, number)


def test_copies_of_a_query_in_one_cluster_add_no_certainty():
    ranks = np.random.default_rng(3).integers(1, 9, 80)
    once = recall.bootstrap_metrics(ranks, np.arange(80), seed=1)
    five = recall.bootstrap_metrics(np.repeat(ranks, 5), np.repeat(np.arange(80), 5), seed=1)
    alone = recall.bootstrap_metrics(np.repeat(ranks, 5), np.arange(400), seed=1)
    np.testing.assert_allclose(five["R@1"], once["R@1"])
    assert np.std(alone["R@1"]) < 0.6 * np.std(once["R@1"])


def test_interval_covers_a_known_mean_about_95_times_in_100():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        right = np.repeat(
            rng.random(100) < 0.3, 2
        )  # two recordings of an image succeed or fail together
        ranks, images = np.where(right, 1, 2), np.repeat(np.arange(100), 2)
        samples = recall.bootstrap_metrics(ranks, images, resamples=300, seed=trial)
        low, high = recall.with_intervals({"R@1": 0.0}, samples)["R@1"].interval
        covered += low <= 30.0 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_bootstrap_is_a_function_of_the_seed():
    ranks, clusters = np.arange(1, 30), np.arange(29)
    first, again, other = (
        recall.bootstrap_metrics(ranks, clusters, seed=seed)["MRR"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_paired_difference_is_tighter_than_two_intervals_and_zero_for_equal_rankings():
    rng = np.random.default_rng(6)
    coarse = rng.integers(1, 4, 200)
    fine = np.where(rng.random(200) < 0.1, 1, coarse)
    clusters = np.repeat(np.arange(100), 2)
    stages = [
        (recall.rank_metrics(ranks), recall.bootstrap_metrics(ranks, clusters))
        for ranks in (coarse, fine)
    ]
    (coarse_metrics, coarse_samples), (fine_metrics, fine_samples) = stages
    gained = recall.difference_with_intervals(
        fine_metrics, coarse_metrics, fine_samples, coarse_samples
    )
    assert gained["R@1"].value == pytest.approx(
        100 * np.mean(fine == 1) - 100 * np.mean(coarse == 1)
    )
    low, high = gained["R@1"].interval
    unpaired = np.subtract(
        *np.percentile(fine_samples["R@1"] - coarse_samples["R@1"][::-1], [97.5, 2.5])
    )
    assert 0 < low < gained["R@1"].value < high and high - low < 0.7 * unpaired
    same = recall.difference_with_intervals(
        coarse_metrics, coarse_metrics, coarse_samples, coarse_samples
    )
    assert same["R@1"].interval == (0.0, 0.0) and same["median_rank"].interval == (0.0, 0.0)


@pytest.mark.parametrize("ranks", [[], [1, 0, 3], [[1, 2]]])
def test_bad_ranks_are_one_clear_error(ranks):
    with pytest.raises(UserError, match="ranks must be"):
        recall.rank_metrics(ranks)


def test_clusters_of_another_length_are_an_error():
    with pytest.raises(UserError, match="one image per query"):
        recall.bootstrap_metrics([1, 2, 3], [0, 1])


@pytest.mark.parametrize(
    ("hits", "counts", "message"),
    [
        ([True, False], [1], r"hits must have rank 2, shape \(Q, L\)"),
        ([[True, False]], [[1]], r"relevant_counts must be \(1,\) integers"),
        ([[True, False]], [0], "at least 1"),
    ],
)
def test_bad_hits_are_one_clear_error(hits, counts, message):
    with pytest.raises(UserError, match=message):
        recall.list_metrics(hits, counts)
