"""Read the items of a gallery, and queries, as a model hears and sees them."""

import dataclasses
import datetime
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from c2f_jax.config.experiment import Experiment
from c2f_jax.data.feature_cache import FeatureCache, open_features
from c2f_jax.data.files import Stamp, content_hash, file_stamp
from c2f_jax.data.listing import folder_of
from c2f_jax.data.manifest import is_manifest
from c2f_jax.data.source import MIN_SAMPLES, PairSource
from c2f_jax.datasets.config import DataConfig
from c2f_jax.datasets.registry import is_data_set, load_pairs
from c2f_jax.decoding.audio import (
    SAMPLE_RATE,
    level_notes,
    peak_level,
    read_recording,
    to_pcm16,
)
from c2f_jax.decoding.image_modes import Note
from c2f_jax.decoding.images import make_square, read_image
from c2f_jax.errors import BadFileError, UserError
from c2f_jax.galleries.media import list_media
from c2f_jax.reports.html import image_media
from c2f_jax.training.distributed import first_process_first

THUMBNAIL = 128  # side in pixels

AUDIBLE = 1 / 32768  # of full scale: one step of 16 bits

File = str | bytes  # path or content
Question = str | os.PathLike[str] | bytes | np.ndarray

# Arrays of samples -> how a WAV file holds them unchanged.
SUBTYPES = {"int16": "PCM_16", "int32": "PCM_32", "float32": "FLOAT", "float64": "DOUBLE"}


@dataclass(frozen=True)
class DecodedItem:
    """One recording or image.

    Attributes:
      array: what the model is given: (side, side, 3) uint8; or (S,) float32, cut if too long; or
        (T, C) float16 tokens.
      thumbnail: a small file that shows or plays it.
      notes: kind and detail of each oddity.
      metadata: what can be asked for in a search.
      converted: kind and detail of what is usual and was changed: sample rate and channels.
      start: seconds of silence that were cut off before what is heard.
    """

    array: np.ndarray
    thumbnail: bytes
    notes: Sequence[Note]
    metadata: Mapping[str, Any]
    converted: Sequence[Note] = ()
    start: float = 0.0


@dataclass(frozen=True)
class Gallery:
    """Items to encode, none of which has been read.

    Attributes:
      label: folder, data set or manifest, as messages name it.
      root: absolute path of the folder that names are below; None for a data set.
      names: path below root, or id in the data set, of each item.
      stamp: row -> what tells whether its content has changed.
      read: row -> path or content of its file.
      metadata: row -> what is known of it without decoding.
      tokens: row -> what the model is given in place of the item, if it can be given nothing else;
        raises BadFileError for an item without tokens.
      left_out: lines that count and name what is passed over.
      is_folder: whether it is a folder of files, and no data set.
    """

    label: str
    root: str | None
    names: Sequence[str]
    stamp: Callable[[int], Stamp]
    read: Callable[[int], File]
    metadata: Callable[[int], Mapping[str, Any]]
    tokens: Callable[[int], np.ndarray] | None = None
    left_out: Sequence[str] = ()
    is_folder: bool = False


def open_gallery(
    experiment: Experiment, gallery: str | None, kind: str, split: str | None
) -> Gallery:
    """List a gallery.

    Args:
      experiment: of the run, whose data set is the default.
      gallery: folder of files, data set or manifest; None for the run's data set.
      kind: "image" or "speech".
      split: split of a data set or manifest; None for the run's test split.

    Returns:
      Its items.

    Raises:
      UserError: there is no such gallery, or nothing in it.
    """
    data = experiment.data
    if gallery is not None and not is_data_set(gallery):
        if not experiment.can_encode(kind):
            raise UserError(
                f"{gallery}: the model takes {kind} tokens of another tool and cannot encode "
                f"files: give a data set whose items are in {data.features_path(kind)}"
            )
        return _open_folder(gallery, kind)

    # A gallery is shown and played, so it is opened without feature caches.
    name = gallery or data.name
    source = first_process_first(
        lambda: load_pairs(
            name, split or data.test_split, data.data_dir, max_bad_share=data.max_bad_share
        )
    )
    listed = _list_images(source) if kind == "image" else _list_recordings(source)
    if is_manifest(name):
        listed = _with_paths(listed, source, kind, folder_of(name))
    if len(set(listed.names)) < len(listed.names):
        numbered = [f"{kind} {row}" for row in range(len(listed.names))]
        listed = dataclasses.replace(listed, names=numbered, root=None)
    if experiment.can_encode(kind):
        return listed
    return _with_tokens(listed, source, kind, open_features(str(data.features_path(kind))))


def _list_images(source: PairSource) -> Gallery:
    return Gallery(
        label=f"{source.name}, {source.split}",
        root=None,
        names=[source.image_id(row) for row in range(source.num_images)],
        stamp=lambda row: source.stamp("image", row),
        read=source.image,
        metadata=lambda row: {"image_id": source.image_id(row)},
    )


def _list_recordings(source: PairSource) -> Gallery:
    def about(row: int) -> Mapping[str, Any]:
        recording = source.recording(row)
        found = {name: recording[name] for name in ("caption", "speaker")}
        found["image_id"] = source.image_id(int(source.image_index[row]))
        return {name: value for name, value in found.items() if value}

    return Gallery(
        label=f"{source.name}, {source.split}",
        root=None,
        names=[f"recording {row}" for row in range(len(source))],
        stamp=lambda row: source.stamp("speech", row),
        read=lambda row: source.recording(row)["audio"],
        metadata=about,
    )


def _with_paths(listed: Gallery, source: PairSource, kind: str, folder: str) -> Gallery:
    """Name the items of a manifest by their paths."""
    key_of = source.image_key if kind == "image" else source.recording_key
    root = folder.rstrip("/") if "://" in folder else os.path.abspath(folder)
    keys = [key_of(row) for row in range(len(listed.names))]
    return dataclasses.replace(listed, names=keys, root=root)


def _with_tokens(listed: Gallery, source: PairSource, kind: str, features: FeatureCache) -> Gallery:
    """Give the model tokens in place of the items."""
    key_of = source.image_key if kind == "image" else source.recording_key

    def tokens(row: int) -> np.ndarray:
        key = key_of(row)
        try:
            features.check(key, source.stamp(kind, row))
            return np.array(features.tokens(key))
        except UserError as error:
            raise BadFileError(str(error), "no features") from error

    def stamp(row: int) -> Stamp:
        file, key = listed.stamp(row), key_of(row)
        told = content_hash(features.tokens(key).tobytes()) if key in features else ""
        state = [*file.state, told] if file.state else []
        return Stamp(state, lambda: content_hash(f"{file.content()} {told}".encode()))

    return dataclasses.replace(listed, tokens=tokens, stamp=stamp)


def _open_folder(folder: str, kind: str) -> Gallery:
    """List the files of a folder."""
    found = list_media(folder, kind)
    root = folder if "://" in folder else os.path.abspath(folder)
    below = [path[len(str(folder).rstrip("/")) :].lstrip("/") for path in found.paths]

    def about(row: int) -> Mapping[str, Any]:
        path = found.paths[row]
        if "://" in path:  # asking a bucket for each file would take too long
            return {}
        try:
            state = os.stat(path)
        except OSError:  # reading it says so
            return {}
        date = datetime.datetime.fromtimestamp(int(state.st_mtime))
        return {"size": state.st_size, "modified": str(date)}

    return Gallery(
        str(folder),
        root,
        below,
        lambda row: file_stamp(found.paths[row]),
        lambda row: found.paths[row],
        about,
        left_out=found.left_out,
        is_folder=True,
    )


def read_item(
    data: DataConfig, kind: str, file: File, name: str, cut_silence: bool = True
) -> DecodedItem:
    """Decode an image or a recording.

    Args:
      data: options of the run, which say how items are prepared.
      kind: "image" or "speech".
      file: path or content.
      name: what messages call it.
      cut_silence: see ``hear``.

    Returns:
      The item.

    Raises:
      BadFileError: the model cannot use it.
    """
    if kind == "speech":
        recording = read_recording(file, name=name)
        item = hear(
            recording.samples, name, data.max_seconds, recording.notes, cut_silence=cut_silence
        )
        converted = []
        if recording.rate != SAMPLE_RATE:
            converted.append(("other sample rate", f"{recording.rate:,} Hz"))
        if recording.channels > 1:
            converted.append(("stereo", f"{recording.channels} channels"))
        return dataclasses.replace(item, converted=converted)

    # Published networks are given images that are decoded at full scale.
    square = data.image_resize == "square"
    image = read_image(file, data.image_size, reduce=square, name=name)
    array = make_square(
        image.rgb, data.image_size, resize=data.image_resize, resize_side=data.image_resize_side
    )
    about: dict[str, Any] = {"width": image.size[0], "height": image.size[1]}
    if image.date:
        about["date"] = image.date
    return DecodedItem(
        array, image_media(make_square(image.rgb, THUMBNAIL)).data, image.notes, about
    )


def hear(
    wave: np.ndarray,
    name: str,
    max_seconds: float,
    notes: Sequence[Note] = (),
    *,
    cut_silence: bool = True,
) -> DecodedItem:
    """Prepare a waveform as training does: 16 bits, cut where the model stops to hear it.

    Args:
      wave: (S,) float32 in [-1, 1] at 16 kHz.
      name: what messages call it.
      max_seconds: seconds that the model hears.
      notes: oddities that were found before.
      cut_silence: whether to cut off silence before the first and after the last sound but for a
        tenth of a second. People take a moment before they speak, and a model that was trained on
        speech alone ranks by silence too.

    Returns:
      The item.

    Raises:
      BadFileError: it is too short.
    """
    import soundfile

    if len(wave) < MIN_SAMPLES:
        raise BadFileError(
            f"{name}: too short: {len(wave)} samples at 16 kHz; {MIN_SAMPLES} are needed",
            "too short",
        )
    seconds, found = len(wave) / SAMPLE_RATE, list(notes)
    start, stop = _find_sound(wave) if cut_silence else (0, len(wave))
    before, after = start / SAMPLE_RATE, (len(wave) - stop) / SAMPLE_RATE
    if max(before, after) >= 0.05:
        found.append(("silence cut", f"{before:.1f} s before and {after:.1f} s after the sound"))
    wave = wave[start:stop]
    samples = to_pcm16(wave[: round(max_seconds * SAMPLE_RATE)])
    heard = samples * np.float32(1 / 32768)

    found += level_notes(wave, max_seconds)
    if len(wave) > len(heard):
        long = len(wave) / SAMPLE_RATE
        found.append(("over-long", f"{long:.1f} s; the first {max_seconds:g} s are heard"))
    small = io.BytesIO()
    soundfile.write(small, samples, SAMPLE_RATE, format="FLAC")
    about = {"seconds": round(seconds, 2)}
    return DecodedItem(heard, small.getvalue(), found, about, start=before)


def _find_sound(wave: np.ndarray) -> tuple[int, int]:
    """Return the sample before which, and the one from which on, there is silence.

    Silence is weaker than the loudest 25 ms by 40 dB, or by 25 to 40 dB if that is 10 dB above the
    quietest tenth of the recording, which is the noise of the room. A margin of 0.1 s stays.
    """
    squares = np.cumsum(np.square(wave - wave.mean(), dtype=np.float64))
    squares = np.concatenate([[0.0], squares])
    frame, hop = SAMPLE_RATE // 40, SAMPLE_RATE // 100
    starts = np.arange(0, max(len(wave) - frame, 0) + 1, hop)
    stops = np.minimum(starts + frame, len(wave))
    level = 10 * np.log10((squares[stops] - squares[starts]) / (stops - starts) + 1e-12)

    loudest, quiet = level.max(), np.percentile(level, 10)
    heard = np.flatnonzero(level >= min(max(loudest - 40, quiet + 10), loudest - 25))
    margin = SAMPLE_RATE // 10
    return max(0, int(starts[heard[0]]) - margin), min(len(wave), int(stops[heard[-1]]) + margin)


def wave_file(samples: np.ndarray, rate: int, name: str) -> bytes:
    """Write samples as a WAV file in memory, so that arrays are read as files are.

    Args:
      samples: (S,), (S, channels) or (channels, S), the longer axis being time: floats of which 1
        is full scale, or int16 or int32.
      rate: samples per second.
      name: what messages call it.

    Raises:
      BadFileError: the array is something else.
    """
    import soundfile

    if samples.dtype == np.float16:
        samples = samples.astype(np.float32)
    subtype = SUBTYPES.get(samples.dtype.name)
    if subtype is None or samples.ndim not in (1, 2):
        raise BadFileError(
            f"{name}: {samples.dtype} of shape {samples.shape} is no recording; give (samples,) or "
            "(samples, channels) float32, float64, int16 or int32",
            "unreadable",
        )
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format="WAV", subtype=subtype)
    return data.getvalue()


def read_question(
    experiment: Experiment, kind: str, question: Question, name: str | None = None
) -> DecodedItem:
    """Decode a query.

    Args:
      experiment: of the run, which says how items are prepared.
      kind: what it must be: "speech" or "image".
      question: path or content of a file; or (S,) float samples at 16 kHz; or (H, W, 3) uint8.
      name: what messages call it; by default the path.

    Returns:
      The query, with what is odd about it.

    Raises:
      UserError: it cannot be used; the message says why and what to do.
    """
    data = experiment.data
    if not experiment.can_encode(kind):
        raise UserError(
            f"the model takes {kind} tokens of another tool and cannot encode "
            f"{name or 'a query'}: its queries are of the other kind"
        )
    if isinstance(question, np.ndarray):
        return _from_array(data, kind, question, name or "the query")
    file = question if isinstance(question, bytes) else os.fspath(question)
    name = name or (file if isinstance(file, str) else "the query")
    try:
        item = read_item(data, kind, file, name)
        return _checked(item, kind, name)
    except BadFileError as error:
        problem = error
    if problem.kind in ("too short", "silence"):
        raise UserError(f"{problem}: check the microphone and record the query again")

    # The wrong kind is a usual mistake.
    other = "image" if kind == "speech" else "speech"
    try:
        read_item(data, other, file, name)
    except BadFileError:
        raise problem from None
    what = {"speech": "a recording", "image": "an image"}
    option = {"speech": "--audio", "image": "--image"}[other]
    raise UserError(f"{name} is {what[other]}, not {what[kind]}: ask with {option}")


def _checked(item: DecodedItem, kind: str, name: str) -> DecodedItem:
    if kind == "speech" and peak_level(item.array) < AUDIBLE:
        raise BadFileError(f"{name}: silent: nothing can be heard", "silence")
    return item


def _from_array(data: DataConfig, kind: str, array: np.ndarray, name: str) -> DecodedItem:
    """Take samples or pixels that a program has."""
    from PIL import Image

    if kind == "image":
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise UserError(f"{name} must be (H, W, 3) uint8; got {array.shape} {array.dtype}")
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return read_item(data, kind, file.getvalue(), name)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"{name} must be (S,) floats in [-1, 1] at {SAMPLE_RATE} Hz, one channel; got "
            f"{array.shape} {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise UserError(f"{name} has samples that are not finite")
    heard = hear(array.astype(np.float32), name, data.max_seconds)
    return _checked(heard, kind, name)
