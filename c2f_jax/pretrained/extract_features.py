"""``c2f features``: run a frozen published network once over a data set and keep its tokens."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm import tqdm

from c2f_jax.data import loader
from c2f_jax.data.augment import augment_wave
from c2f_jax.data.feature_cache import open_features, shard_exists, start_cache, write_shard
from c2f_jax.data.source import MIN_SAMPLES, SAMPLE_RATE
from c2f_jax.errors import UserError
from c2f_jax.models.factory import IMAGE_TOWERS, create_tower
from c2f_jax.models.published import choose_layer
from c2f_jax.pretrained.weights import bare_tower, load_weights, open_card, tower_inputs
from c2f_jax.training.distributed import wait_for_all

SHARD = 256  # items of a shard: what is lost when a run is stopped
THREADS = 8  # that decode
STEP_SECONDS = 0.5  # lengths are padded to multiples of it, so that few programs are compiled


def extract_features(
    weights,
    sources,
    output,
    *,
    layer="last",
    max_seconds=30.0,
    batch_size=16,
    dtype="float32",
    augment=None,
    copy=0,
    **tower,
):
    """Write a feature cache, going on where an earlier run stopped.

    Each utterance's tokens are those it would have alone: the networks are independent of the padding.

    Args:
      weights: folder of ``c2f convert`` or published files.
      sources: PairSources, one a split.
      output: folder of the cache.
      layer: "last", the number of a hidden state, or "all".
      max_seconds: recordings are cut to this length.
      batch_size: rows at once.
      dtype: compute type; tokens are kept as float16.
      augment: AugmentConfig of how recordings are varied first; None for not at all.
      copy: number of this varied copy, from which the draws follow: it is the same in any run.
      **tower: changes to the network's attributes, such as ``pad=True``.

    Returns:
      The FeatureCache.

    Raises:
      UserError: an argument out of range, a cache of another kind is there, or too many items cannot be read.
    """
    if batch_size < 1 or max_seconds * SAMPLE_RATE < MIN_SAMPLES:
        raise UserError(
            f"a batch size of {batch_size} and {max_seconds} s at most: larger numbers are expected"
        )
    card = open_card(weights)
    attributes = bare_tower(card) | tower
    layers = ("last", "all", *map(str, range(attributes["depth"] + 1)))
    if layer not in layers:
        raise UserError(
            f"layer={layer!r}: one of {', '.join(layers)} is expected (0 is the input of the first block)"
        )
    network = create_tower(attributes, dtype=jax.numpy.dtype(dtype))
    is_image = attributes["name"] in IMAGE_TOWERS
    side = card["preprocessing"].get("image_size", 224)
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), *tower_inputs(attributes["name"], side)
    )["params"]
    start_cache(output, cache_card(card, attributes, layer, max_seconds, dtype, augment, copy))
    params = None
    apply = jax.jit(functools.partial(_tokens, network, layer))
    for source in sources:
        blocks = _blocks(source, is_image)
        key = source.image_key if is_image else source.recording_key
        mine = range(jax.process_index(), len(blocks), jax.process_count())
        names = {number: _shard_name(source, is_image, number) for number in mine}
        todo = [
            n for n in mine if not shard_exists(output, names[n], map(key, map(int, blocks[n])))
        ]
        if todo and params is None:
            params = load_weights(weights, shapes)
        read = (
            _read_images(source, card)
            if is_image
            else _read_waves(source, max_seconds, augment, copy)
        )
        total = sum(len(blocks[number]) for number in todo)
        what = f"features of {source.split}" + (f", copy {copy}" if copy else "")
        bar = tqdm(total=total, desc=what, disable=not todo, unit="", leave=False)
        with bar, ThreadPoolExecutor(THREADS) as pool:
            for number in todo:
                read_items = pool.map(read, map(int, blocks[number]))
                items = list(_run(functools.partial(apply, params), read_items, batch_size, bar))
                shape = (
                    items[0][1].shape[1:]
                    if items
                    else _token_shape(apply, params, attributes["name"], side)
                )
                write_shard(output, names[number], items, shape)
    wait_for_all()
    return open_features(output)


def cache_card(card, attributes, layer, max_seconds, dtype="float32", augment=None, copy=0):
    """What a cache says of its origin, and what must be equal for it to be used."""
    found = {
        "tower": attributes,
        "weights": [source["sha256"] for source in card["source"]],
        "preprocessing": card["preprocessing"],
        "layer": layer,
        "dtype": dtype,
    }
    if attributes["name"] not in IMAGE_TOWERS:
        found |= {
            "max_seconds": max_seconds,
            "samples_per_token": create_tower(attributes).samples_per_token(),
        }
    if augment is not None:
        found |= {f"augment.{name}": value for name, value in augment.speech_options().items()} | {
            "copy": copy
        }
    return found


def _tokens(network, layer, params, *inputs):
    """(n, T, C) float16 tokens, or (n, T, layers, C) for all layers, and their lengths."""
    tokens, lengths, hidden = network.apply({"params": params}, *inputs)
    if layer == "all":
        tokens = jax.numpy.stack(hidden, axis=2)
    elif layer != "last":
        tokens = choose_layer(hidden, layer)
    return tokens.astype(jax.numpy.float16), lengths


def _blocks(source, is_image):
    """Rows of each shard; recordings by length, so that a batch has little padding."""
    count = source.num_images if is_image else len(source)
    order = np.arange(count) if is_image else np.argsort(source.num_samples, kind="stable")
    return [order[i : i + SHARD] for i in range(0, count, SHARD)]


def _shard_name(source, is_image, number):
    return f"{source.split}-{'image' if is_image else 'speech'}-{number:05d}"


def _read_waves(source, max_seconds, augment, copy):
    """row -> (key, waveform float32) or (key, None)."""

    def read(row):
        wave = loader.load_wave(source, row)
        if wave is not None and augment is not None:
            # A bare generator, which must stay so: an unfinished cache on a user's disk is resumed
            # with the same variations.
            wave = augment_wave(wave, augment, np.random.default_rng((copy, row)))
        wave = (
            None
            if wave is None
            else wave[: round(max_seconds * SAMPLE_RATE)] * np.float32(1 / 32768)
        )
        return source.recording_key(row), wave

    return read


def _read_images(source, card):
    """row -> (key, image uint8) or (key, None)."""
    how = card["preprocessing"]

    def read(row):
        image = loader.load_image(source, row, how["image_size"], how["resize"], how["resize_side"])
        return source.image_key(row), image

    return read


def _run(apply, items, batch_size, bar):
    """(key, tokens) of all (key, waveform or image), without those that are None."""
    while chunk := list(itertools.islice(items, batch_size)):
        readable = [(key, item) for key, item in chunk if item is not None]
        bar.update(len(chunk))
        if not readable:
            continue
        filled = [item for _, item in readable] + [readable[-1][1]] * (batch_size - len(readable))
        if filled[0].ndim == 1:
            step = round(STEP_SECONDS * SAMPLE_RATE)
            size = -(-max(map(len, filled)) // step) * step
            wave = np.stack([np.pad(item, (0, size - len(item))) for item in filled])
            tokens, lengths = apply(wave, np.array([len(item) for item in filled], np.int32))
        else:
            tokens, lengths = apply(np.stack(filled))
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        for (key, _), row, length in zip(readable, tokens, lengths, strict=False):
            yield key, row[:length]


def _token_shape(apply, params, name, side):
    """The shape of a token where a shard has none."""
    return jax.eval_shape(apply, params, *tower_inputs(name, side))[0].shape[2:]
