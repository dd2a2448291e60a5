"""Load one recording or image of a source as an array, or note it among the bad items."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from c2f_jax.data.feature_cache import FeatureCache
from c2f_jax.data.files import Stamp
from c2f_jax.data.source import MIN_SAMPLES, PairSource
from c2f_jax.decoding.audio import decode_audio, to_pcm16
from c2f_jax.decoding.images import decode_image, open_rgb
from c2f_jax.errors import UserError


def load_wave(source: PairSource, index: int) -> np.ndarray | None:
    """Decode a recording.

    It is kept in sixteen bits whatever the file holds, which takes half the memory.

    Args:
      source: pairs.
      index: number of the recording.

    Returns:
      int16 (samples,) at 16 kHz; None, and an entry in `source.bad_items`, when it cannot be used.

    Raises:
      UserError: too many items are bad.
    """
    try:
        wave = decode_audio(source.recording(index)["audio"])
        if len(wave) >= MIN_SAMPLES:
            return to_pcm16(wave)
        reason = f"only {len(wave)} samples at 16 kHz; {MIN_SAMPLES} are needed"
    except UserError as e:
        reason = str(e)

    name = source.recording_name(index)
    source.bad_items.add(name, reason.removeprefix(f"{name}: "))
    return None


def load_image(
    source: PairSource, row: int, size: int, resize: str = "square", side: int = 0
) -> np.ndarray | None:
    """Decode an image.

    Args:
      source: pairs.
      row: number of the image in the gallery.
      size: side of the result in pixels.
      resize: how it becomes a square, see `decoding.images.decode_image`.
      side: length of the short side for "short_side"; 0 for size.

    Returns:
      uint8 (size, size, 3); None, and an entry in `source.bad_items`, when it cannot be used.

    Raises:
      UserError: too many items are bad.
    """

    def decode(data: bytes | str) -> np.ndarray:
        return decode_image(data, size, resize=resize, resize_side=side)

    return _read_image(source, row, decode)


def load_whole_image(source: PairSource, row: int, size: int) -> np.ndarray | None:
    """Decode an image without cutting it, to be cropped later.

    Args:
      source: pairs.
      row: number of the image in the gallery.
      size: side of the later crops in pixels.

    Returns:
      uint8 (H, W, 3), the shorter side at most 2 * size; None as `load_image`.

    Raises:
      UserError: too many items are bad.
    """

    def decode(data: bytes | str) -> np.ndarray:
        rgb = open_rgb(data, size)
        scale = min(1.0, 2 * size / min(rgb.size))
        width, height = (max(round(scale * side), 1) for side in rgb.size)
        return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))

    return _read_image(source, row, decode)


def _read_image(
    source: PairSource, row: int, decode: Callable[[bytes | str], np.ndarray]
) -> np.ndarray | None:
    try:
        return decode(source.image(row))
    except UserError as e:
        name = source.image_name(row)
        source.bad_items.add(name, str(e).removeprefix(f"{name}: "))
        return None


def load_speech_input(source: PairSource, index: int, copy: int = 0) -> np.ndarray | None:
    """Load what the model is given of a recording.

    Args:
      source: pairs.
      index: number of the recording.
      copy: 0 for the recording itself, 1 and so on for its varied copies in the feature caches.

    Returns:
      int16 (samples,), or float16 (T, C) tokens if the source has speech features; None, and an
      entry in `source.bad_items`, when it cannot be used.

    Raises:
      UserError: too many items are bad.
    """
    features = source.inputs.speech_features
    if features is None:
        return load_wave(source, index)
    if copy:
        features = source.inputs.speech_copies[copy - 1]

    key = source.recording_key(index)
    stamp = source.stamp("speech", index)
    return _read_tokens(source, features, key, stamp, lambda: source.recording_name(index))


def load_image_input(source: PairSource, row: int, size: int) -> np.ndarray | None:
    """Load what the model is given of an image.

    Args:
      source: pairs.
      row: number of the image in the gallery.
      size: side in pixels.

    Returns:
      uint8 (size, size, 3), or float16 (P, C) tokens if the source has image features; None, and
      an entry in `source.bad_items`, when it cannot be used.

    Raises:
      UserError: too many items are bad.
    """
    inputs = source.inputs
    if inputs.image_features is None:
        return load_image(source, row, size, inputs.image_resize, inputs.image_resize_side)
    key = source.image_key(row)
    stamp = source.stamp("image", row)
    return _read_tokens(source, inputs.image_features, key, stamp, lambda: source.image_name(row))


def _read_tokens(
    source: PairSource, features: FeatureCache, key: str, stamp: Stamp, name: Callable[[], str]
) -> np.ndarray | None:
    """Copy tokens out of a cache.

    Only an error asks for the name, which may need reading the item.
    """
    try:
        features.check(key, stamp)
        return np.array(features.tokens(key))
    except UserError as e:
        source.bad_items.add(name(), str(e))
        return None
