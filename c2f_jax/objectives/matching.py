"""SIM, speech-image matching: cross entropy over one positive and two mined negatives a row."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays, check_rows
from c2f_jax.objectives.dtypes import at_least_float32
from c2f_jax.objectives.pairs import Pair

# A matcher that always answers p(match) = 1/3 on 1 positive : 2 negatives: ln 3 - (2/3) ln 2.
COLLAPSE_VALUE = 0.6365141682948129


class SimPairs(NamedTuple):
    """The (1 + 2m) n pairs that SIM decides on, m negatives a row in each direction.

    Attributes:
      speech: pytree with leaves ((1 + 2m) n, ...).
      image: likewise.
      labels: int32, 1 = match.
      valid: bool, the pairs that count.
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
    *,
    row_valid: jax.Array | None = None,
    positives: Pair | None = None,
) -> SimPairs:
    """Put together (speech, image), then (speech, negative image), then (negative speech, image).

    With several negatives a row, those of one row stand together.

    Args:
      speech: pytree with leaves (n, ...), such as tokens and lengths.
      image: pytree with leaves (n, ...).
      negative_speech: as ``speech``, a mined negative speech for each image; leaves (n, m, ...) for
        several.
      negative_image: as ``image``, a mined negative image for each speech; likewise.
      speech_valid: (n,) bool, whether the negative speech exists; (n, m) for several.
      image_valid: (n,) bool, whether the negative image exists; likewise.
      row_valid: (n,) bool, False for the padding of a batch: none of its pairs count.
      positives: Pair of trees to use in the positive pairs in place of ``speech`` and ``image``.

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
        speech_valid=(speech_valid, "bool[n] | bool[n, m]"),
        image_valid=(image_valid, "bool[n, m]" if jnp.ndim(speech_valid) == 2 else "bool[n]"),
    )
    n = sizes["n"]
    several = (sizes["m"],) if "m" in sizes else ()
    if row_valid is None:
        row_valid = jnp.ones_like(image_valid.reshape(n, -1)[:, 0])
    check_arrays(row_valid=(row_valid, f"bool[{n}]"))
    positives = Pair(speech, image) if positives is None else positives
    check_rows("speech", speech, n)
    check_rows("image", image, n)
    check_rows("positives", positives, n)
    check_rows("negative_speech", negative_speech, n, *several)
    check_rows("negative_image", negative_image, n, *several)

    # One block of positives, then two of negatives. Everything is made from the arguments, so that
    # it is sharded as they are.
    of_row = functools.partial(_repeat, times=sizes.get("m", 1))
    image_valid, speech_valid = image_valid.reshape(-1), speech_valid.reshape(-1)
    labels = [jnp.ones_like(row_valid, jnp.int32)]
    labels += [jnp.zeros_like(block, jnp.int32) for block in (image_valid, speech_valid)]
    valid = [row_valid, image_valid & of_row(row_valid), speech_valid & of_row(row_valid)]
    flat = _flat if several else lambda tree: tree
    return SimPairs(
        speech=_concatenate(positives.speech, of_row(speech), flat(negative_speech)),
        image=_concatenate(positives.image, flat(negative_image), of_row(image)),
        labels=jnp.concatenate(labels),
        valid=jnp.concatenate(valid),
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
    logits = at_least_float32(logits)
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
    log_probabilities = jax.nn.log_softmax(at_least_float32(logits), axis=-1)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]


def _repeat(tree: Any, times: int) -> Any:
    """Repeat every row of every leaf."""
    return tree if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def _flat(tree: Any) -> Any:
    """Join the first two axes of every leaf: (n, m, ...) -> (n m, ...)."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _concatenate(*trees: Any) -> Any:
    """Concatenate pytrees of the same structure, leaf by leaf, along the rows."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
