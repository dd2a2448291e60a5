"""Encoded audio to 16 kHz mono samples."""

from __future__ import annotations

import io
import os
import stat
import struct
from typing import TYPE_CHECKING

import numpy as np

from c2f_jax.data.source import SAMPLE_RATE
from c2f_jax.errors import BadFileError

if TYPE_CHECKING:
    import soundfile

# Before and after conversion: 400 MB, 100 minutes at 16 kHz. More is treated as a bomb.
MOST_SAMPLES = 100_000_000
MOST_BYTES = 2**30
RATES = (4_000, 768_000)  # Hz; below there is no speech, above no recorder
# Recorders that cannot go back to write the length write this or more.
STREAMED_SIZE = 2**31 - 2**16
_BLOCK = 2**20  # samples read at a time


def decode_audio(
    data: bytes | str, *, sample_rate: int = SAMPLE_RATE, name: str | None = None
) -> np.ndarray:
    """Decode a recording; channels are averaged, the rate is converted.

    Reads what libsndfile reads: WAV, FLAC, Ogg Opus and Vorbis, MP3, AIFF and more; the content
    decides, not the name. Memory is bounded whatever a header promises. Damage inside samples
    without checksums, as in WAV, cannot be seen, nor can a cut of Ogg exactly between two pages.

    Args:
      data: the encoded bytes, or a path.
      sample_rate: rate of the samples in Hz.
      name: what error messages call it; by default the path.

    Returns:
      float32 (samples,), about -1 to 1.

    Raises:
      BadFileError: the file is missing, unreadable, cut off, empty, not finite, has a rate outside
        of 4 to 768 kHz, or is longer than 100 million samples.
    """
    import soundfile

    name = name or (data if isinstance(data, str) else "audio")

    encoded = data if isinstance(data, bytes) else read_bytes(data)
    if not encoded:
        raise BadFileError(f"{name}: the file is empty", "zero length")
    try:
        with soundfile.SoundFile(_Bytes(encoded)) as file:
            # Both come from the header, which may be wrong.
            rate, promised = file.samplerate, file.frames
            if not RATES[0] <= rate <= RATES[1]:
                raise BadFileError(
                    f"{name}: the sample rate is {rate:,} Hz; it must be {RATES[0]:,} to "
                    f"{RATES[1]:,} Hz",
                    "wrong rate",
                )
            wave = _read(file, min(MOST_SAMPLES, MOST_SAMPLES * rate // sample_rate), name)
    except BadFileError:
        raise
    # soundfile raises all of these on damaged files.
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as e:
        raise _unreadable(name, e) from e

    # libsndfile silently reads some files past their end.
    _check_whole(encoded, wave, promised, name)
    # Loaded only where it is needed: most sets are at 16 kHz already.
    if rate != sample_rate:
        import soxr

        wave = soxr.resample(wave, rate, sample_rate)
    return np.ascontiguousarray(wave, np.float32)


class _Bytes(io.BytesIO):
    """Bytes that ignore a seek to before their beginning, as damaged headers ask for.

    soundfile would print a traceback.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def _read(file: soundfile.SoundFile, most: int, name: str) -> np.ndarray:
    """Read all samples, averaged over channels.

    They are read in blocks, since the number in the header may be anything.
    """
    # The size of a block is that of all channels together, so that memory is bounded.
    blocks, total = [], 0
    size = max(_BLOCK // file.channels, 1)
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1))
        total += len(block)
        if total > most:
            raise BadFileError(
                f"{name}: longer than {most:,} samples, {most / file.samplerate:,.0f} s", "too long"
            )
    if not blocks:
        return np.zeros(0, np.float32)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _check_whole(encoded: bytes, wave: np.ndarray, promised: int, name: str) -> None:
    """Raise `BadFileError` for a recording that is cut off, empty or not finite."""
    gone = _missing_bytes(encoded)
    if gone:
        raise BadFileError(
            f"{name}: cut off, {gone:,} bytes that its header promises are missing", "truncated"
        )
    if len(wave) < promised:
        raise BadFileError(f"{name}: cut off after {len(wave)} of {promised} samples", "truncated")
    if len(wave) == 0:
        raise BadFileError(f"{name}: the recording is empty", "zero length")
    if not np.isfinite(wave).all():
        raise BadFileError(
            f"{name}: the recording holds samples that are not numbers", "not numbers"
        )


def _missing_bytes(encoded: bytes) -> int:
    """Count the bytes that are missing at the end of a file.

    libsndfile does not report them in WAV, AIFF and Ogg.
    """
    # A chunk is a name of four bytes, its size, and as many bytes, padded to an even number.
    if encoded[:4] in (b"RIFF", b"FORM"):
        order = "<I" if encoded[:4] == b"RIFF" else ">I"
        place = 12
        while place + 8 <= len(encoded):
            size = struct.unpack_from(order, encoded, place + 4)[0]
            if encoded[place : place + 4] in (b"data", b"SSND"):
                if size >= STREAMED_SIZE:
                    return 0
                return max(place + 8 + size - len(encoded), 0)
            place += 8 + size + size % 2
    elif encoded[:4] == b"OggS":
        # The header of the last page says how many segments follow, and how long each is.
        page = encoded.rfind(b"OggS")
        segments = encoded[page + 26] if page + 26 < len(encoded) else 0
        table = encoded[page + 27 : page + 27 + segments]
        return max(page + 27 + segments + sum(table) - len(encoded), 0)
    return 0


def read_bytes(path: str) -> bytes:
    """Read a file.

    Args:
      path: path of the file, local or in a bucket.

    Returns:
      Its content.

    Raises:
      BadFileError: it cannot be read, or is larger than 1 GiB.
    """
    try:
        if "://" not in path:
            return _read_local(path)
        from etils import epath

        return epath.Path(path).read_bytes()
    except BadFileError:
        raise
    except FileNotFoundError as e:
        raise BadFileError(
            f"{path}: cannot be read (No such file or directory)", "missing file"
        ) from e

    except OSError as e:
        raise BadFileError(f"{path}: cannot be read ({e.strerror or e})", "unreadable") from e
    except Exception as e:  # each kind of bucket has its own errors
        raise BadFileError(f"{path}: cannot be read ({type(e).__name__}: {e})", "unreadable") from e


def _read_local(path: str) -> bytes:
    about = os.stat(path)  # first: opening a pipe would wait for a writer
    if not stat.S_ISREG(about.st_mode):
        raise BadFileError(f"{path}: cannot be read (not a file)", "unreadable")
    if about.st_size > MOST_BYTES:
        raise BadFileError(
            f"{path}: {about.st_size:,} bytes; at most {MOST_BYTES:,} are allowed", "too large"
        )
    with open(path, "rb") as file:
        return file.read()


def _unreadable(name: str, error: Exception) -> BadFileError:
    reason = getattr(error, "error_string", None) or str(error)
    return BadFileError(
        f"{name}: not readable audio ({reason}); use WAV, FLAC, Ogg or MP3", "unreadable"
    )
