"""``c2f features``: run a frozen published network once over a data set and keep its tokens."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from c2f_jax.data.augment import AugmentConfig, augment_wave
from c2f_jax.data.feature_cache import (
    FeatureCache,
    open_features,
    remove_shards,
    shard_exists,
    start_cache,
    write_shard,
)
from c2f_jax.data.files import Stamp
from c2f_jax.data.items import load_image, load_wave
from c2f_jax.data.source import MIN_SAMPLES, PairSource
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError
from c2f_jax.models.encoder import NetworkOutput
from c2f_jax.models.factory import IMAGE_TOWERS, create_tower
from c2f_jax.models.published import choose_layer
from c2f_jax.pretrained.networks import bare_tower, tower_inputs
from c2f_jax.pretrained.weights import load_weights, open_card
from c2f_jax.training.distributed import share_work
from c2f_jax.training.parallel import replicate, round_up_rows, split_rows

SHARD = 256  # items of a shard: what is lost when a run is stopped
THREADS = 8  # decoding threads
STEP_SECONDS = 0.5  # lengths are padded to multiples of it, so that few programs are compiled

# (key, waveform, image or tokens); None in their place where an item cannot be read.
Item = tuple[str, np.ndarray | None]


@dataclass(frozen=True)
class VariedCopy:
    """Recordings varied before the network runs on them.

    Attributes:
      augment: how they are varied.
      number: number of this copy, which determines the draws.
    """

    augment: AugmentConfig
    number: int


@dataclass(frozen=True)
class FeatureOptions:
    """Which tokens a cache holds.

    Attributes:
      layer: "last", the number of a hidden state (0 is the input of the first block), or "all".
      max_seconds: recordings are cut to this length.
      dtype: compute type; tokens are kept as float16.
      varied: how recordings are varied first; None for not at all.
      tower: changes to the network's attributes, such as ``{"pad": True}``.
    """

    layer: str = "last"
    max_seconds: float = 30.0
    dtype: str = "float32"
    varied: VariedCopy | None = None
    tower: Mapping[str, Any] = field(default_factory=dict)


def extract_features(
    weights: str | Path,
    sources: Sequence[PairSource],
    output: str | Path,
    options: FeatureOptions | None = None,
    batch_size: int = 16,
) -> FeatureCache:
    """Write a feature cache; an unfinished one is resumed.

    An utterance's tokens do not depend on its batch: the networks ignore the padding. Several
    processes, all of which must call this, divide the shards between them; each writes its own.

    Args:
      weights: folder of ``c2f convert``, or published files.
      sources: the splits.
      output: folder of the cache.
      options: which tokens to keep; None for the defaults.
      batch_size: items per batch, rounded up to fill the devices of a process.

    Returns:
      The cache.

    Raises:
      UserError: an option is out of range, a cache of another kind is there, or too many items
        cannot be read.
    """
    options = options or FeatureOptions()

    def extract_share(process: int, processes: int) -> list[dict[str, str]]:
        _write_shards(weights, sources, output, options, batch_size, (process, processes))
        return [source.bad_items.reasons for source in sources]

    shares = share_work(extract_share)
    if len(shares) > 1:
        for source, parts in zip(sources, zip(*shares, strict=True), strict=True):
            source.bad_items.merge(parts)
    return open_features(output)


def _write_shards(
    weights: str | Path,
    sources: Sequence[PairSource],
    output: str | Path,
    options: FeatureOptions,
    batch_size: int,
    part: tuple[int, int],
) -> None:
    """Write the shards of process p of n, ``part`` = (p, n), that are not there yet."""
    # The network, from its card; mistakes are found before anything is written.
    card = open_card(weights)
    attributes = {**bare_tower(card), **options.tower}
    _check_options(options, batch_size, attributes["depth"])
    network = create_tower(attributes, dtype=jnp.dtype(options.dtype))
    is_image = attributes["name"] in IMAGE_TOWERS
    inputs = tower_inputs(attributes["name"], card["preprocessing"].get("image_size", 224))
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    start_cache(output, cache_card(card, options))

    # One program for each padded length; parameters are an argument, not a constant of it.
    apply = jax.jit(functools.partial(_tokens, network, options.layer))
    params: Any = None
    for source in sources:
        shards, count = _own_shards(source, is_image, *part)
        todo = [s for s in shards if not shard_exists(output, s.name, _stamps(source, s, is_image))]
        if part[0] == 0:
            remove_shards(output, _prefix(source, is_image), count)
        # A finished cache is opened without loading the network.
        if todo and params is None:
            params = replicate(load_weights(weights, shapes))
            batch_size = round_up_rows(params, batch_size)
        read = _image_reader(source, card) if is_image else _wave_reader(source, options)

        progress = _progress(source, options, todo)
        with progress, ThreadPoolExecutor(THREADS) as pool:
            for shard in todo:
                # Before the files are read: a change in between is noticed later.
                stamps = _stamps(source, shard, is_image)
                records = dict(zip(stamps, pool.map(Stamp.record, stamps.values()), strict=True))
                read_items = pool.map(read, shard.rows)
                items = list(_run(apply, params, read_items, batch_size, progress))
                # From the program, since a shard may have no readable item.
                token_shape = jax.eval_shape(apply, params, *inputs)[0].shape[2:]
                write_shard(output, shard.name, items, token_shape, records)


def cache_card(card: Mapping[str, Any], options: FeatureOptions) -> dict[str, Any]:
    """Return what a cache says about its origin; a cache with another card is not used.

    Args:
      card: card of the network's weights.
      options: which tokens the cache holds.
    """
    attributes = {**bare_tower(card), **options.tower}
    found = {
        "tower": attributes,
        "weights": [source["sha256"] for source in card["source"]],
        "preprocessing": card["preprocessing"],
        "layer": options.layer,
        "dtype": options.dtype,
    }
    if attributes["name"] not in IMAGE_TOWERS:
        found["max_seconds"] = options.max_seconds
        found["samples_per_token"] = create_tower(attributes).samples_per_token()
    if options.varied is not None:
        for name, value in options.varied.augment.speech_options().items():
            found[f"augment.{name}"] = value
        found["copy"] = options.varied.number
    return found


@dataclass(frozen=True)
class _Shard:
    """Rows of a split that are written to one file."""

    name: str
    rows: list[int]


def _prefix(source: PairSource, is_image: bool) -> str:
    """Return what the names of a split's shards begin with."""
    return f"{source.split}-{'image' if is_image else 'speech'}-"


def _own_shards(
    source: PairSource, is_image: bool, process: int, processes: int
) -> tuple[list[_Shard], int]:
    """Return the shards of a split that a process makes, and how many there are in all."""
    order = np.arange(source.num_images)
    if not is_image:
        # By length, so that a batch has little padding.
        order = np.argsort(source.num_samples, kind="stable")

    # Shards are dealt out like cards, so that each process gets short and long recordings.
    blocks = range(0, len(order), SHARD)
    own = range(process, len(blocks), processes)
    shards = []
    for number in own:
        rows = order[blocks[number] : blocks[number] + SHARD].tolist()
        shards.append(_Shard(f"{_prefix(source, is_image)}{number:05d}", rows))
    return shards, len(blocks)


def _stamps(source: PairSource, shard: _Shard, is_image: bool) -> dict[str, Stamp]:
    """Return key -> stamp of each item of a shard."""
    if is_image:
        return {source.image_key(row): source.stamp("image", row) for row in shard.rows}
    return {source.recording_key(row): source.stamp("speech", row) for row in shard.rows}


def _check_options(options: FeatureOptions, batch_size: int, depth: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")
    if options.max_seconds * SAMPLE_RATE < MIN_SAMPLES:
        raise UserError(
            f"max_seconds={options.max_seconds}: must be at least {MIN_SAMPLES / SAMPLE_RATE:g}"
        )
    layers = ("last", "all", *map(str, range(depth + 1)))
    if options.layer not in layers:
        raise UserError(
            f"layer={options.layer!r}: choose one of {', '.join(layers)} "
            "(0 is the input of the first block)"
        )


def _progress(source: PairSource, options: FeatureOptions, shards: Sequence[_Shard]) -> tqdm:
    """Return a bar that counts the items of the shards."""
    what = f"features of {source.split}"
    if options.varied is not None:
        what += f", copy {options.varied.number}"
    total = sum(len(shard.rows) for shard in shards)
    return tqdm(total=total, desc=what, disable=not shards, unit="", leave=False)


def _tokens(
    network: nn.Module, layer: str, params: Any, *inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return tokens, (n, T, C) or (n, T, layers, C) for all layers, and (n,) lengths."""
    output = NetworkOutput(*network.apply({"params": params}, *inputs))
    tokens = output.tokens
    if layer == "all":
        tokens = jnp.stack(output.hidden, axis=2)
    elif layer != "last":
        tokens = choose_layer(output.hidden, layer)
    return tokens.astype(jnp.float32), output.lengths


def _wave_reader(source: PairSource, options: FeatureOptions) -> Callable[[int], Item]:
    """Return a function from a row to its key and its float32 waveform."""

    def read(row: int) -> Item:
        key, wave = source.recording_key(row), load_wave(source, row)
        if wave is None:
            return key, None
        if options.varied is not None:
            # A bare generator, which must stay so: an unfinished cache on a user's disk is resumed
            # with the same variations.
            rng = np.random.default_rng((options.varied.number, row))
            wave = augment_wave(wave, options.varied.augment, rng)
        # Sixteen bits to -1 ... 1.
        samples = round(options.max_seconds * SAMPLE_RATE)
        return key, wave[:samples] * np.float32(1 / 32768)

    return read


def _image_reader(source: PairSource, card: Mapping[str, Any]) -> Callable[[int], Item]:
    """Return a function from a row to its key and its uint8 image."""
    how = card["preprocessing"]

    def read(row: int) -> Item:
        image = load_image(source, row, how["image_size"], how["resize"], how["resize_side"])
        return source.image_key(row), image

    return read


def _run(
    apply: Callable[..., tuple[jax.Array, jax.Array]],
    params: Any,
    items: Iterable[Item],
    batch_size: int,
    progress: tqdm,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the key and the float16 tokens of each item that can be read.

    Args:
      apply: parameters and a batch of inputs -> tokens and lengths.
      params: replicated on the devices, which divide each batch between them.
      items: waveforms or images.
      batch_size: items per batch.
      progress: bar that counts the items.
    """
    items = iter(items)
    while chunk := list(itertools.islice(items, batch_size)):
        readable = [(key, item) for key, item in chunk if item is not None]
        progress.update(len(chunk))
        if not readable:
            continue

        # Every batch is full, so that one program fits all: the last item is repeated.
        rows = [item for _, item in readable]
        rows += [rows[-1]] * (batch_size - len(rows))
        batch = _pad_waves(rows) if rows[0].ndim == 1 else (np.stack(rows),)
        tokens, lengths = apply(params, *split_rows(params, batch))

        rows_of_tokens = zip(readable, np.asarray(tokens), np.asarray(lengths), strict=False)
        for (key, _), row, length in rows_of_tokens:
            # On the host: XLA cannot round to float16 on processors that have no such instruction.
            yield key, row[:length].astype(np.float16)


def _pad_waves(waves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, S) waveforms padded to a multiple of ``STEP_SECONDS``, and their (n,) lengths."""
    # Few padded lengths, so that few programs are compiled.
    lengths = np.array([len(wave) for wave in waves], np.int32)
    step = round(STEP_SECONDS * SAMPLE_RATE)
    size = -(-int(lengths.max()) // step) * step
    padded = np.stack([np.pad(wave, (0, size - len(wave))) for wave in waves])
    return padded, lengths
