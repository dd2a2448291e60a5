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
