"""What a data check knows about one item: usable or not, oddities, keys to find duplicates by."""

import dataclasses
import hashlib

import numpy as np

from c2f_jax.data.source import MIN_SAMPLES, PairSource
from c2f_jax.data_check.findings import VERY_SHORT
from c2f_jax.decoding.audio import SAMPLE_RATE, level_notes, read_bytes, read_recording
from c2f_jax.decoding.images import read_image, resize_box
from c2f_jax.errors import BadFileError

LOOK_SIDE = 16  # pixels of the small copy that images are compared by
MOST_DIFFERENCE = 12  # of 255, between two pixels of small copies that look the same


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is known about one item.

    Attributes:
      problems: (kind, detail) of each problem, see `KINDS`.
      usable: whether it can be decoded.
      seconds: length of a recording.
      content: hash of the file, equal for equal files.
      look: small copy of an image, 16 x 16 RGB.
    """

    problems: tuple[tuple[str, str], ...] = ()
    usable: bool = True
    seconds: float = 0.0
    content: bytes = b""
    look: bytes = b""

    def keys(self) -> list[bytes]:
        """Return keys of which two items share one if they are alike.

        They are the hash of the content and, for an image, its coarse brightness pattern, which
        re-encoding does not change.
        """
        if not self.look:
            return [self.content]

        # Whether each of 8 x 8 cells is clearly brighter than its left neighbor.
        half = LOOK_SIDE // 2
        gray = np.frombuffer(self.look, np.uint8).reshape(half, 2, half, 2, 3).mean(axis=(1, 3, 4))
        return [self.content, np.packbits(gray[:, 1:] > gray[:, :-1] + 4).tobytes()]

    def is_like(self, other: "Facts") -> bool:
        """Return whether the other item is the same file, or an image that looks the same."""
        if self.content == other.content:
            return True
        mine = np.frombuffer(self.look, np.uint8).astype(int)
        others = np.frombuffer(other.look, np.uint8).astype(int)
        return bool(len(mine) and np.abs(mine - others).max() <= MOST_DIFFERENCE)


def recording_facts(source: PairSource, index: int, max_seconds: float) -> Facts:
    """Decode a recording and look for problems.

    Args:
      source: pairs.
      index: number of the recording.
      max_seconds: longer recordings are reported.

    Returns:
      What is known about it.
    """
    try:
        audio = source.recording(index)["audio"]
        encoded = audio if isinstance(audio, bytes) else read_bytes(audio)
        recording = read_recording(encoded, name=source.recording_name(index))
        wave = recording.samples
        if len(wave) < MIN_SAMPLES:
            raise BadFileError(
                f"{len(wave)} samples at 16 kHz; {MIN_SAMPLES} are needed", "too short"
            )
    except BadFileError as e:
        return _unusable(e, source.recording_name(index))

    # Oddities that do not keep the recording from being used.
    problems = [*recording.notes, *level_notes(wave, max_seconds)]
    seconds = len(wave) / SAMPLE_RATE
    if recording.rate != SAMPLE_RATE:
        problems.append(("other sample rate", f"{recording.rate:,} Hz"))
    if recording.channels != 1:
        problems.append(("stereo", f"{recording.channels} channels"))
    if seconds < VERY_SHORT:
        problems.append(("very short", f"{seconds:.2f} s"))
    if seconds > max_seconds:
        problems.append(("over-long", f"{seconds:.1f} s, over {max_seconds:g} s"))
    problems += _other_length(source, index, seconds)
    return Facts(tuple(problems), seconds=seconds, content=hashlib.sha1(encoded).digest())


def _other_length(source: PairSource, index: int, seconds: float) -> list[tuple[str, str]]:
    """Compare the length of a recording with the listed one, by which its batch is chosen."""
    listed = source.num_samples[index] / SAMPLE_RATE
    if listed < 0 or abs(listed - seconds) <= max(0.1, 0.05 * seconds):
        return []
    return [("other length", f"{seconds:.2f} s, listed as {listed:.2f} s")]


def image_facts(source: PairSource, row: int, image_size: int = 0) -> Facts:
    """Decode an image and look for problems.

    Args:
      source: pairs.
      row: number of the image in the gallery.
      image_size: side of the images of a model; smaller ones are reported.

    Returns:
      What is known about it.
    """
    try:
        image = source.image(row)
        encoded = image if isinstance(image, bytes) else read_bytes(image)
        decoded = read_image(encoded, max(2 * LOOK_SIDE, image_size), name=source.image_name(row))
    except BadFileError as e:
        return _unusable(e, source.image_name(row))

    rgb, problems = decoded.rgb, list(decoded.notes)
    if min(rgb.size) < LOOK_SIDE:
        problems.append(("tiny image", f"{rgb.width} x {rgb.height}"))
    elif min(rgb.size) < image_size:
        problems.append(("enlarged image", f"{rgb.width} x {rgb.height}"))
    # The whole image, squashed: a crop should not count as the same image.
    look = resize_box(rgb, (0, 0, *rgb.size), LOOK_SIDE).tobytes()
    return Facts(tuple(problems), content=hashlib.sha1(encoded).digest(), look=look)


def _unusable(error: BadFileError, name: str) -> Facts:
    problem = error.kind, str(error).removeprefix(f"{name}: ")
    return Facts((problem,), usable=False)
