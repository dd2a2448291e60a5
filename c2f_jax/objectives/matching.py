"""SIM, speech-image matching: binary cross entropy over one positive and two mined negatives for each pair."""

import jax
import jax.numpy as jnp

# A matcher that always answers p(match) = 1/3 on 1 positive : 2 negatives: ln 3 - (2/3) ln 2.
COLLAPSE_VALUE = 0.6365141682948129


def assemble_pairs(speech, image, negative_speech, negative_image, speech_valid, image_valid):
    """The 3n pairs of SIM: (speech, image), then (speech, negative image), then (negative speech, image).

    Args:
      speech, image: pytrees with leaves (n, ...): tokens and lengths of the positives.
      negative_speech: as ``speech``: a mined negative speech for each image.
      negative_image: as ``image``: a mined negative image for each speech.
      speech_valid, image_valid: (n,) bool, whether the mined negative exists.

    Returns:
      speech (3n, ...), image (3n, ...), labels (3n,) int32 (1 = match), valid (3n,) bool.

    Source: ALBEF (Li et al. 2021), section 3.3.

    >>> one = jnp.ones((1, 2))
    >>> speech, image, labels, valid = assemble_pairs(one, one, one, one, jnp.array([True]), jnp.array([False]))
    >>> speech.shape, labels.tolist(), valid.tolist()
    ((3, 2), [1, 0, 0], [True, False, True])
    """
    rows = speech_valid.shape[0]
    stack = lambda *parts: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)  # noqa: E731
    labels = jnp.concatenate([jnp.ones(rows, jnp.int32), jnp.zeros(2 * rows, jnp.int32)])
    valid = jnp.concatenate([jnp.ones(rows, bool), image_valid, speech_valid])
    return (
        stack(speech, speech, negative_speech),
        stack(image, negative_image, image),
        labels,
        valid,
    )


def match_logit(logits):
    """Log-odds of a match: l_1 - l_0. (..., 2) -> (...), float32.

    >>> match_logit(jnp.array([0.5, 2.0])).item()
    1.5
    """
    logits = logits.astype(jnp.float32)
    return logits[..., 1] - logits[..., 0]


def sim_loss(logits, labels):
    """Binary cross entropy of each pair: -log softmax(l)_label.

    The mean over 3n pairs is ln 2 for zero logits and 0.636514 (``COLLAPSE_VALUE``) for a matcher that ignores its
    input and says 1/3.

    Args:
      logits: (m, 2), columns "no match" and "match".
      labels: (m,) int, 1 = match.

    Returns:
      (m,) per-pair loss, float32. Average it with ``collectives.masked_mean`` over the valid pairs.

    Source: C2F, section "speech-image matching".

    >>> round(float(sim_loss(jnp.zeros((3, 2)), jnp.array([1, 0, 0])).mean()), 6)
    0.693147
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
