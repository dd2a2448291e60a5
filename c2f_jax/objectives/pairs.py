"""Named pairs: what belongs to (speech, image), and to the two directions of retrieval."""

from typing import Any, Generic, NamedTuple, TypeVar

import jax

T = TypeVar("T")


class Pair(NamedTuple, Generic[T]):
    """One value of each modality."""

    speech: T
    image: T


class Directions(NamedTuple, Generic[T]):
    """One value of each direction: speech queries against images, image queries against speech."""

    s2i: T
    i2s: T


class Features(NamedTuple):
    """What an encoder returns for n rows of one modality.

    Attributes:
      embedding: (n, D), what SIC compares the directions of.
      tokens: pytree with leaves (n, ...), such as (n, T, W) tokens and their lengths: what SIM's
        ``match`` reads. None for SIC alone.
    """

    embedding: jax.Array
    tokens: Any = None


def as_features(name: str, value: Any) -> Features:
    """Return Features, also of a plain tuple (embedding, tokens).

    Args:
      name: what to call the value in an error.
      value: Features or a tuple.

    Returns:
      Features.

    Raises:
      ValueError: an array, or anything else.
    """
    if not isinstance(value, tuple) or not 1 <= len(value) <= 2:
        raise ValueError(
            f"{name} is a {type(value).__name__}; it must be Features(embedding, tokens)"
        )
    return Features(*value)


class Rows(NamedTuple):
    """This device's rows of the global batch.

    Attributes:
      ids: (n,) int image ids.
      numbers: (n,) int32 row numbers in the global batch.
      keys: (n,) typed PRNG keys, one for each (seed, step, global row); all draws come from them.
      valid: (n,) bool, False for the padding of a batch.
    """

    ids: jax.Array
    numbers: jax.Array
    keys: jax.Array
    valid: jax.Array
