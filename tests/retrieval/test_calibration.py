"""Probabilities against a fit by another optimizer, and against simulated pairs."""

import numpy as np
import pytest
import scipy.optimize

from c2f_jax.errors import UserError
from c2f_jax.retrieval.calibration import (
    Calibration,
    fit_calibration,
    measure_reliability,
    read_calibrations,
)


def simulate(gallery, queries, rng):
    """Scores of one right item and of gallery - 1 wrong ones for each query: normal distributions,
    of which the log-odds are known to be linear in the score."""
    scores = rng.normal(0.0, 1.5, (queries, gallery))
    scores[:, 0] = rng.normal(6.0, 1.5, queries)
    hits = np.zeros((queries, gallery), bool)
    hits[:, 0] = True
    order = np.argsort(-scores, axis=1)[:, :32]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(hits, order, 1)


def test_the_fit_is_that_of_another_optimizer():
    scores, hits = simulate(100, 300, np.random.default_rng(0))
    found = fit_calibration(scores, hits, score="joint", gallery=100)

    def loss(x):
        z = x[0] * scores.ravel() + x[1]
        return np.mean(np.logaddexp(0, z) - hits.ravel() * z)

    expected = scipy.optimize.minimize(loss, [1.0, 0.0], tol=1e-12).x
    assert 1 / found.temperature == pytest.approx(expected[0], rel=1e-3)
    assert found.bias == pytest.approx(expected[1], rel=1e-3)
    assert (found.score, found.gallery, found.pairs) == ("joint", 100, 9600)


def test_the_prior_of_the_gallery_keeps_probabilities_honest():
    """Fitted on a hundred items, used on three thousand."""
    rng = np.random.default_rng(1)
    scores, hits = simulate(100, 2000, rng)
    calibration = fit_calibration(scores, hits, score="sim", gallery=100)
    scores, hits = simulate(3000, 600, rng)
    honest = measure_reliability(calibration.probability(scores, 3000), hits)
    naive = measure_reliability(calibration.probability(scores, 100), hits)
    assert honest.error < 0.005 and naive.error > 3 * honest.error
    assert honest.log_loss < naive.log_loss


def test_reliability_by_plain_loops():
    rng = np.random.default_rng(2)
    probabilities, hits = rng.random(500), rng.random(500) < 0.3
    probabilities[:2] = 0.0, 1.0
    found = measure_reliability(probabilities, hits)
    error, counts = 0.0, []
    for number in range(10):
        inside = [i for i, p in enumerate(probabilities) if min(int(p * 10), 9) == number]
        counts.append(len(inside))
        error += abs(sum(hits[inside]) - sum(probabilities[inside])) / 500
    assert found.error == pytest.approx(error) and found.counts == counts
    exact = np.where(hits, probabilities, 1 - probabilities)
    assert found.log_loss == pytest.approx(-np.mean(np.log(np.maximum(exact, 1e-300))))


def test_what_cannot_be_calibrated():
    scores = np.arange(12.0).reshape(3, 4)
    for hits in (np.ones((3, 4)), np.zeros((3, 4)), scores < 5):
        assert fit_calibration(scores, hits, score="sim", gallery=4) is None
    # A score that separates all pairs has no likeliest slope; it stays finite.
    found = fit_calibration(scores, scores > 5, score="sim", gallery=4)
    assert 0 < found.temperature < np.inf
    assert found.probability(11.0, 4) > 0.99 > 0.01 > found.probability(0.0, 4)
    with pytest.raises(UserError, match="12 scores, but 3 hits"):
        fit_calibration(scores, np.ones(3), score="sim", gallery=4)


def test_calibrations_of_a_step():
    one = Calibration("joint", 2.0, -1.0, 500, 16_000)
    stored = {"7": {"s2i": one.to_json()}}
    assert read_calibrations(stored, 7) == {"s2i": one} and read_calibrations(stored, 8) == {}
