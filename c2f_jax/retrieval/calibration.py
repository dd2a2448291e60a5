"""How likely it is that an answer is right: the score of a pair as a probability, and its check.

A pair of a query and a candidate with score s matches with

    P(match | s) = sigmoid(s / T + b - log(N / N_v)).

Temperature T and bias b are fitted on the validation split, whose gallery shows N_v different
things. The last term is the prior: in a gallery of N that holds the right one, N - 1 others can
score as much. Several recordings of one image count once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from c2f_jax.errors import UserError

BINS = 10  # of equal width, from 0 to 1
_STEPS, _TOLERANCE = 100, 1e-10  # of Newton's method
_RIDGE = 1e-6  # keeps the slope finite where a score separates all pairs


@dataclass(frozen=True)
class Calibration:
    """What turns scores of one direction into probabilities.

    Attributes:
      score: name of the score, see ``reranking.fine_scores``.
      temperature: T.
      bias: b.
      gallery: N_v, different ids in the gallery of the fit.
      pairs: number of pairs of the fit.
    """

    score: str
    temperature: float
    bias: float
    gallery: int
    pairs: int

    def probability(self, scores: ArrayLike, gallery: int) -> np.ndarray:
        """Return the probability of a match of each pair.

        Args:
          scores: scores of pairs, any shape.
          gallery: N, different things that were searched.

        Returns:
          float64, the shape of scores.

        >>> Calibration("sim", 2.0, 0.0, 100, 3200).probability([0.0, 4.0], 100).round(3).tolist()
        [0.5, 0.881]
        """
        log_odds = np.asarray(scores, np.float64) / self.temperature + self.bias
        return _sigmoid(log_odds - np.log(gallery / self.gallery))

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return dataclasses.asdict(self)


def read_calibrations(stored: Mapping[str, Mapping[str, Any]], step: int) -> dict[str, Calibration]:
    """Return the calibrations of a step of a run.

    Args:
      stored: step, as text -> direction -> what ``to_json`` returned.
      step: the step.

    Returns:
      "s2i" and "i2s" -> calibration; empty if there is none.
    """
    found = stored.get(str(step), {})
    return {direction: Calibration(**values) for direction, values in found.items()}


@dataclass(frozen=True)
class Reliability:
    """Predicted probabilities beside what came true.

    Attributes:
      predicted: mean probability of each bin that has pairs.
      observed: share of its pairs that match.
      counts: number of its pairs.
      error: expected calibration error, the mean of |observed - predicted| over all pairs.
      log_loss: mean of -log P(what came true), in nats.
    """

    predicted: list[float]
    observed: list[float]
    counts: list[int]
    error: float
    log_loss: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Reliability:
        """Read what ``to_json`` returned."""
        return cls(**values)


def fit_calibration(
    scores: ArrayLike, hits: ArrayLike, *, score: str, gallery: int
) -> Calibration | None:
    """Fit T and b by maximum likelihood, as Platt scaling does.

    Args:
      scores: (Q, k) scores of candidates.
      hits: (Q, k) bool, which of them match.
      score: name of the score.
      gallery: different ids in the gallery.

    Returns:
      The calibration; None if all pairs match or none does, or if a higher score does not mean a
      better match.

    Raises:
      UserError: shapes that do not fit.

    Reference:
      Platt, Probabilistic outputs for support vector machines, 1999.
    """
    values, matches = np.asarray(scores, np.float64).ravel(), np.asarray(hits, bool).ravel()
    if values.shape != matches.shape:
        raise UserError(f"{values.size} scores, but {matches.size} hits; give one for each pair")
    if matches.all() or not matches.any():
        return None

    # Newton's method on standardized scores, where the ridge means the same for every model.
    center, spread = values.mean(), max(values.std(), 1e-12)
    features = np.stack([(values - center) / spread, np.ones_like(values)], axis=1)
    share = matches.mean()
    weights = np.array([0.0, np.log(share / (1 - share))])
    ridge = _RIDGE * len(values) * np.array([1.0, 0.0])
    for _ in range(_STEPS):
        predicted = _sigmoid(features @ weights)
        gradient = features.T @ (predicted - matches) + ridge * weights
        curvature = features.T * (predicted * (1 - predicted)) @ features + np.diag(ridge)
        change = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        weights = weights - np.clip(change, -2, 2)  # a step far from the answer may be too long
        if np.abs(change).max() < _TOLERANCE:
            break
    slope = weights[0] / spread
    if slope <= 0:
        return None
    return Calibration(
        score, float(1 / slope), float(weights[1] - slope * center), gallery, len(values)
    )


def measure_reliability(probabilities: ArrayLike, hits: ArrayLike) -> Reliability:
    """Compare probabilities with what came true.

    Args:
      probabilities: of pairs, any shape.
      hits: bool, which of them match, the same shape.

    Returns:
      The comparison in bins of equal width.

    Reference:
      Guo et al., On Calibration of Modern Neural Networks, 2017.

    >>> measure_reliability([0.9, 0.9, 0.1, 0.3], [True, False, False, False]).error
    0.3
    """
    values = np.asarray(probabilities, np.float64).ravel()
    matches = np.asarray(hits, bool).ravel()
    bins = np.minimum((values * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    used = counts > 0
    predicted = np.bincount(bins, values, BINS)[used] / counts[used]
    observed = np.bincount(bins, matches, BINS)[used] / counts[used]
    error = np.sum(counts[used] * np.abs(observed - predicted)) / max(values.size, 1)
    likely = np.where(matches, values, 1 - values)
    loss = -np.mean(np.log(np.maximum(likely, 1e-300))) if values.size else 0.0
    return Reliability(
        predicted.tolist(),
        observed.tolist(),
        counts[used].tolist(),
        float(error.round(12)),
        float(loss),
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
