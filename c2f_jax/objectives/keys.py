"""Every purpose that random numbers are drawn for: generators on the host, keys in the model.

Two purposes never share a stream, whatever further integers (epoch, recording, layer) they take,
because the number of the purpose has a fixed place in each seed. Nothing else in the package makes
a generator or derives a key, except where data on disk were made with one that must never change.
"""

from enum import IntEnum
from typing import overload

import jax
import numpy as np

from c2f_jax.objectives.checks import check_arrays


class Stream(IntEnum):
    """What a generator on the host is for, with the integers that it takes."""

    BATCHES = 1  # epoch
    CROPS = 2  # epoch, recording
    SPEECH_AUGMENTATION = 3  # epoch, recording
    IMAGE_AUGMENTATION = 4  # epoch, recording
    SPEECH_COPIES = 5  # epoch, recording
    WRONG_CAPTIONS = 6
    BOOTSTRAP = 7
    EXAMPLE_QUERIES = 8
    CHECKED_PAIRS = 9


class Site(IntEnum):
    """What a jax key is for, with the integers that it takes."""

    # Of the training step.
    ENCODERS = 1
    IMAGE_NEGATIVES = 2
    SPEECH_NEGATIVES = 3
    POSITIVE_SIDES = 4
    POSITIVE_PAIRS = 5
    IMAGE_NEGATIVE_PAIRS = 6
    SPEECH_NEGATIVE_PAIRS = 7
    # Parts of the model.
    SPEECH_ENCODER = 11
    IMAGE_ENCODER = 12
    MULTIMODAL_ENCODER = 13
    BRANCH = 14  # branch
    TOWER = 15
    # Parts of an encoder.
    INPUT_DROPOUT = 21
    TOKEN_DROPOUT = 22
    TOKEN_MASK = 23
    CONVOLUTIONS = 24
    CONVOLUTION = 25  # block
    FRAME_MASK = 26
    CHANNEL_MASK = 27
    # Parts of a transformer.
    BLOCK = 31  # layer
    LAYER_DROP = 32  # layer
    SELF_ATTENTION = 33
    CROSS_ATTENTION = 34
    MLP = 35


def host_rng(seed: int, stream: Stream, *numbers: int) -> np.random.Generator:
    """Make the generator of one purpose.

    Args:
      seed: seed of the run, at least 0.
      stream: the purpose.
      *numbers: further integers that the purpose takes, such as the epoch; at least 0.

    Returns:
      A generator that depends on nothing but the arguments.

    >>> [int(host_rng(0, Stream.BATCHES, epoch).integers(100)) for epoch in (0, 1)]
    [48, 40]
    """
    # numpy pads the seed to four words before it appends the spawn key, so the stream is always the
    # fifth word.
    words = (int(stream), *(int(number) for number in numbers))
    return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=words))


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Make the two root keys of a run: for its initial parameters, and for its steps.

    Args:
      seed: seed of the run.

    Returns:
      Two typed keys, (initialization, training).
    """
    init_key, training_key = jax.random.split(jax.random.key(seed))
    return init_key, training_key


def step_key(training_key: jax.Array, step: jax.Array | int) -> jax.Array:
    """Make the key of one training step: fold_in(key, step).

    A resumed run draws what an unbroken one would have drawn.

    Args:
      training_key: the run's key, typed or raw.
      step: int scalar.

    Returns:
      A typed key.
    """
    # The train state keeps raw key data, which checkpoints can hold.
    if not jax.dtypes.issubdtype(training_key.dtype, jax.dtypes.prng_key):
        training_key = jax.random.wrap_key_data(training_key)
    return jax.random.fold_in(training_key, step)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """Make one key for each row: fold_in(key, row).

    Global row numbers give the same draws on any number of devices.

    Args:
      key: one typed key; a raw one gives raw keys.
      rows: (n,) int row numbers in the global batch; see ``row_numbers``.

    Returns:
      (n,) typed keys.

    Raises:
      ValueError: there are several keys, or rows has another shape or type.

    >>> row_keys(jax.random.key(0), jax.numpy.arange(2)).shape
    (2,)
    """
    check_arrays(rows=(rows, "int[n]"))
    if not hasattr(key, "dtype"):
        raise ValueError(f"key is {key!r}; it must be a key, such as jax.random.key({key!r})")
    is_typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim != (0 if is_typed else 1):
        raise ValueError(f"key has shape {key.shape}; it must be one key, the same on all devices")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


@overload
def fold_keys(keys: jax.Array, site: Site, *numbers: int) -> jax.Array: ...
@overload
def fold_keys(keys: None, site: Site, *numbers: int) -> None: ...
def fold_keys(keys: jax.Array | None, site: Site, *numbers: int) -> jax.Array | None:
    """Make the keys of one purpose: fold_in(fold_in(key, site), number).

    Numbers are folded in after the site, so that a layer number cannot be mistaken for a site.

    Args:
      keys: (n,) typed keys, or None if nothing is drawn (no dropout), which stays None.
      site: the purpose.
      *numbers: further integers that the purpose takes, such as the layer.

    Returns:
      (n,) typed keys, or None.

    >>> keys = row_keys(jax.random.key(0), jax.numpy.arange(2))
    >>> fold_keys(keys, Site.BLOCK, 3).shape, fold_keys(None, Site.BLOCK, 3)
    ((2,), None)
    """
    if keys is None:
        return None
    for number in (int(site), *numbers):
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
    return keys
