"""Named pairs: what belongs to (speech, image), and to the two directions of retrieval."""

from typing import Generic, NamedTuple, TypeVar

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


class Rows(NamedTuple):
    """This device's rows of the global batch.

    Attributes:
      ids: (n,) int32 image ids.
      numbers: (n,) int32 row numbers in the global batch.
      keys: (n,) typed PRNG keys, one for each (seed, step, global row); all draws come from them.
    """

    ids: jax.Array
    numbers: jax.Array
    keys: jax.Array


class Tokens(NamedTuple):
    """Token sequences: what matching reads of an encoded batch.

    Attributes:
      tokens: (n, T, W).
      lengths: (n,) int32 valid tokens.
    """

    tokens: jax.Array
    lengths: jax.Array
