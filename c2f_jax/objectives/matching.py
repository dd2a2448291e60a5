"""SIM, speech-image matching: cross entropy over one positive and two mined negatives a row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays, check_rows

# A matcher that always answers p(match) = 1/3 on 1 positive : 2 negatives: ln 3 - (2/3) ln 2.
COLLAPSE_VALUE = 0.6365141682948129


class SimPairs(NamedTuple):
    """The 3n pairs that SIM decides on.

    Attributes:
      speech: pytree with leaves (3n, ...).
      image: pytree with leaves (3n, ...).
      labels: (3n,) int32, 1 = match.
      valid: (3n,) bool, the pairs that count.
    """

    speech: Any
    image: Any
    labels: jax.Array
    valid: jax.Array


def assemble_pairs(
    speech: Any,
    image: Any,
    negative_speech: Any,
    negative_image: Any,
    speech_valid: jax.Array,
    image_valid: jax.Array,
) -> SimPairs:
    """Put together (speech, image), then (speech, negative image), then (negative speech, image).

    Args:
      speech: pytree with leaves (n, ...), such as tokens and lengths.
      image: pytree with leaves (n, ...).
      negative_speech: as ``speech``, a mined negative speech for each image.
      negative_image: as ``image``, a mined negative image for each speech.
      speech_valid: (n,) bool, whether the negative speech exists.
      image_valid: (n,) bool, whether the negative image exists.

    Returns:
      SimPairs (speech, image, labels, valid).

    Raises:
      ValueError: an argument has another shape or type.

    Reference:
      Li et al. 2021 (ALBEF), section 3.3.

    >>> one, yes, no = jnp.ones((1, 2)), jnp.array([True]), jnp.array([False])
    >>> pairs = assemble_pairs(one, one, one, one, yes, no)
    >>> pairs.speech.shape, pairs.labels.tolist(), pairs.valid.tolist()
    ((3, 2), [1, 0, 0], [True, False, True])
    """
    sizes = check_arrays(
        speech_valid=(speech_valid, "bool[n]"), image_valid=(image_valid, "bool[n]")
    )
    n = sizes["n"]
    check_rows("speech", speech, n)
    check_rows("image", image, n)
    check_rows("negative_speech", negative_speech, n)
    check_rows("negative_image", negative_image, n)

    # One positive block of n rows, then two negative ones.
    labels = jnp.concatenate([jnp.ones(n, jnp.int32), jnp.zeros(2 * n, jnp.int32)])
    valid = jnp.concatenate([jnp.ones(n, bool), image_valid, speech_valid])
    return SimPairs(
        speech=_concatenate(speech, speech, negative_speech),
        image=_concatenate(image, negative_image, image),
        labels=labels,
        valid=valid,
    )


def match_logit(logits: jax.Array) -> jax.Array:
    """Compute the log-odds of a match: l_1 - l_0.

    Args:
      logits: (..., 2), columns "no match" and "match".

    Returns:
      (...) float32.

    Raises:
      ValueError: the last axis is not of size 2.

    >>> match_logit(jnp.array([0.5, 2.0])).item()
    1.5
    """
    if logits.ndim < 1 or logits.shape[-1] != 2:
        raise ValueError(f"logits has shape {logits.shape}; it must be (..., 2)")
    logits = logits.astype(jnp.float32)
    return logits[..., 1] - logits[..., 0]


def sim_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the binary cross entropy of each pair: -log softmax(l)_label.

    The mean over 3n pairs is ln 2 for zero logits and 0.636514 (``COLLAPSE_VALUE``) for a matcher
    that ignores its input and answers 1/3.

    Args:
      logits: (m, 2), columns "no match" and "match".
      labels: (m,) int, 1 = match, 0 = no match; other values are meaningless.

    Returns:
      (m,) loss of each pair, float32. Average it with ``collectives.masked_mean`` over the valid
      pairs.

    Raises:
      ValueError: an argument has another shape or type.

    Reference:
      Zhou and Li 2024 (C2F), speech-image matching.

    >>> round(float(sim_loss(jnp.zeros((3, 2)), jnp.array([1, 0, 0])).mean()), 6)
    0.693147
    """
    check_arrays(logits=(logits, "float[m, 2]"), labels=(labels, "int[m]"))
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]


def _concatenate(*trees: Any) -> Any:
    """Concatenate pytrees of the same structure, leaf by leaf, along the rows."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
