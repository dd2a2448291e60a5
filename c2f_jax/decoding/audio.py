"""Encoded audio to 16 kHz mono samples: the one place that decides on channels and gain."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator

import numpy as np

from c2f_jax.decoding.audio_channels import ChannelMeter
from c2f_jax.decoding.audio_decoders import Decoder, open_audio
from c2f_jax.decoding.audio_streams import (
    INAUDIBLE_SECONDS,
    INAUDIBLE_SHARE,
    Note,
    Stream,
    audio_streams,
)
from c2f_jax.errors import BadFileError

SAMPLE_RATE = 16_000  # Hz, of all samples that a model hears
# Before and after conversion: 400 MB, 100 minutes at 16 kHz. More is treated as a bomb.
MOST_SAMPLES = 100_000_000
MOST_BYTES = 2**30
RATES = (4_000, 768_000)  # Hz; below there is no speech, above no recorder
SILENCE = 1e-3  # of full scale; no speech is as quiet
_AT_FULL_SCALE = 0.999
_CLIPPED = 0.005  # share of samples at full scale; speech rarely gets there
_FEW = 1e-3  # share of samples above full scale that are clipped, as any player does
_LOUD = 16.0  # of full scale; above, samples are integers that were stored as they are
_FULL_SCALES = (2.0**15, 2.0**23, 2.0**31)
_OVERSHOOT = 1.25  # of full scale; lossy codecs and conversion of the rate reach it


@dataclasses.dataclass(frozen=True)
class Recording:
    """A decoded recording.

    Attributes:
      samples: float32 (samples,), -1 to 1.
      rate: rate of the file in Hz.
      channels: channels of the file.
      notes: (kind, detail) of what was found and done, kinds as in `data_check.findings.KINDS`.
    """

    samples: np.ndarray
    rate: int
    channels: int
    notes: tuple[Note, ...] = ()


def decode_audio(
    data: bytes | str, *, sample_rate: int = SAMPLE_RATE, name: str | None = None
) -> np.ndarray:
    """Decode a recording to one channel at a rate.

    `read_recording` does the same and says what it found.

    Args:
      data: the encoded bytes, or a path.
      sample_rate: rate of the samples in Hz.
      name: what error messages call it; by default the path.

    Returns:
      float32 (samples,), -1 to 1.

    Raises:
      BadFileError: as `read_recording`.
    """
    return read_recording(data, sample_rate=sample_rate, name=name).samples


def read_recording(
    data: bytes | str, *, sample_rate: int = SAMPLE_RATE, name: str | None = None
) -> Recording:
    """Decode a recording to one channel at a rate, and say what is odd about it.

    Reads what libsndfile reads: WAV, FLAC, Ogg Opus and Vorbis, MP3, AIFF and more, and with the
    extra `av` what FFmpeg reads: M4A, WebM, AMR, WMA and more. The content decides, not the name.

    All of a file is read whatever its header says, and all streams that follow one another. What is
    missing at the end is an error unless it cannot be heard, 1 % or 20 ms. Channels that hold sound
    are averaged; if that would cancel them, as in opposite phase, the loudest one is taken. Samples
    above full scale are clipped if they are a few, else all are scaled.

    Memory is bounded whatever a header promises. Damage inside samples without checksums, as in
    WAV, cannot be seen, nor can a cut of Ogg exactly between two pages or of an MP3 file that does
    not say how long it is.

    Args:
      data: the encoded bytes, or a path.
      sample_rate: rate of the samples in Hz.
      name: what error messages call it; by default the path.

    Returns:
      The samples, and what was found.

    Raises:
      BadFileError: the file is missing, unreadable, cut off, empty, not finite, has a header that
        ends before its samples do or a rate outside of 4 to 768 kHz, or is longer than 100 million
        samples.
    """
    name = name or (data if isinstance(data, str) else "audio")
    encoded = data if isinstance(data, bytes) else read_bytes(data)
    if not encoded:
        raise BadFileError(f"{name}: the file is empty", "zero length")

    streams, notes = audio_streams(encoded, name)
    del encoded, data
    waves, within = [], True
    room = MOST_SAMPLES
    for stream in streams:
        wave, decoder = _decode_stream(stream, sample_rate, room, name, notes)
        waves.append(wave)
        # Of one channel of integers; conversion of the rate and the mean may exceed full scale.
        within &= decoder.integers and decoder.channels == 1 and decoder.rate == sample_rate
        room -= len(wave)

    wave = waves[0] if len(waves) == 1 else np.concatenate(waves)
    if len(wave) == 0:
        raise BadFileError(f"{name}: the recording is empty", "zero length")
    if not within:
        wave = _within_full_scale(wave, name, notes)
    wave = np.ascontiguousarray(wave, np.float32)
    return Recording(wave, decoder.rate, decoder.channels, tuple(notes))


def _decode_stream(
    stream: Stream, sample_rate: int, room: int, name: str, notes: list[Note]
) -> tuple[np.ndarray, Decoder]:
    """Decode a stream to one channel at a rate."""
    decoder = open_audio(stream.data, stream.frames, name)
    rate = decoder.rate
    if not RATES[0] <= rate <= RATES[1]:
        raise BadFileError(
            f"{name}: the sample rate is {rate:,} Hz; it must be {RATES[0]:,} to {RATES[1]:,} Hz",
            "wrong rate",
        )
    notes += decoder.notes
    wave = _mix(decoder, min(room, room * rate // sample_rate), name, notes)
    _check_whole(decoder, stream, len(wave), name, notes)
    # Loaded only where it is needed: most sets are at 16 kHz already.
    if rate != sample_rate and len(wave):
        import soxr

        wave = soxr.resample(wave, rate, sample_rate)
    return wave, decoder


def _mix(decoder: Decoder, most: int, name: str, notes: list[Note]) -> np.ndarray:
    """Read all samples and average the channels that hold sound, or take the loudest one.

    They are read in blocks, since the number in the header may be anything.
    """
    channels = decoder.channels
    if channels == 1:
        parts = [block[:, 0] for block in _bounded(decoder, most, name)]
        return _joined(parts)

    blocks, parts = [], []
    meter = ChannelMeter(decoder.rate)
    for block in _bounded(decoder, most, name):
        # Columns are added several times as fast as a matmul or a mean would.
        total = block[:, 0] + block[:, 1]
        for column in range(2, channels):
            total += block[:, column]
        total *= 1 / channels
        parts.append(total)
        meter.add(block)
        blocks = [block] if len(parts) == 1 else []  # one is kept, many are read again
    taken, gain, found = meter.judge()
    notes += found
    if taken is not None:
        again = blocks or _bounded(decoder, most, name)
        return _joined([np.ascontiguousarray(block[:, taken]) for block in again])
    wave = _joined(parts)
    if gain != 1:
        wave *= gain
    return wave


def _bounded(decoder: Decoder, most: int, name: str) -> Iterator[np.ndarray]:
    """Read blocks, and refuse a recording that is too long."""
    total = 0
    for block in decoder.blocks():
        total += len(block)
        if total > most:
            raise BadFileError(
                f"{name}: longer than {most:,} samples, {most / decoder.rate:,.0f} s", "too long"
            )
        yield block


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if not parts:
        return np.zeros(0, np.float32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_whole(
    decoder: Decoder, stream: Stream, count: int, name: str, notes: list[Note]
) -> None:
    """Raise `BadFileError` for a recording of which a part that can be heard is missing."""
    if decoder.surplus > max(INAUDIBLE_SHARE * count, INAUDIBLE_SECONDS * decoder.rate):
        raise BadFileError(
            f"{name}: its header gives {count:,} samples, but {decoder.surplus:,} more follow",
            "header too short",
        )
    missing: float = max((decoder.promised or 0) - count, 0)
    if stream.missing:
        known = count and stream.missing < 1
        missing = max(missing, count * stream.missing / (1 - stream.missing)) if known else np.inf
    if not missing:
        if decoder.error:
            notes.append(("incomplete", f"what is damaged is left out ({decoder.error})"))
        return
    seconds = missing / decoder.rate
    if seconds <= INAUDIBLE_SECONDS or missing <= INAUDIBLE_SHARE * (count + missing):
        detail = f"the last {1000 * seconds:.3g} ms that its header promises are missing"
        notes.append(("incomplete", detail))
        return

    reason = f" ({decoder.error})" if decoder.error else ""
    promised = f" of {count + missing:,.0f}" if missing < MOST_SAMPLES else ""
    raise BadFileError(
        f"{name}: cut off or damaged after {count:,}{promised} samples{reason}", "truncated"
    )


def _within_full_scale(wave: np.ndarray, name: str, notes: list[Note]) -> np.ndarray:
    """Clip a few samples above full scale; scale a recording that is above it throughout."""
    peak = max(float(wave.max()), -float(wave.min()))
    if peak <= 1:
        return wave
    if not np.isfinite(peak):
        raise BadFileError(
            f"{name}: the recording holds samples that are not numbers", "not numbers"
        )
    level = float(np.quantile(np.abs(wave), 1 - _FEW))
    scale = 1.0
    if level > _FULL_SCALES[-1]:
        raise BadFileError(f"{name}: samples up to {peak:.1e} are no sound", "not numbers")
    if level > _LOUD:
        scale = next(full for full in _FULL_SCALES if level <= full)
    elif level > _OVERSHOOT:
        scale = min(peak, _LOUD)
    if scale > 1:
        notes.append(("scaled", f"peak {peak:,.4g} of full scale, divided by {scale:,.4g}"))
        wave = wave / np.float32(scale)
    count = np.count_nonzero(np.abs(wave) > 1)
    if scale == 1 and (peak > _OVERSHOOT or count > _FEW * len(wave)):
        notes.append(("clipped", f"{count:,} samples above full scale, up to {peak:,.4g}"))
    return np.clip(wave, -1, 1)


def to_pcm16(wave: np.ndarray) -> np.ndarray:
    """Round samples to 16 bits, as a model hears all of them.

    Args:
      wave: float32 (samples,), -1 to 1.

    Returns:
      int16 (samples,), wave * 32768.
    """
    return np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16)


def peak_level(wave: np.ndarray) -> float:
    """Return the largest deviation from the mean, since a constant cannot be heard."""
    return float(np.abs(wave - wave.mean()).max())


def level_notes(wave: np.ndarray, max_seconds: float = np.inf) -> list[Note]:
    """Say whether what is heard of a decoded recording is silent or clipped.

    Args:
      wave: float32 (samples,), -1 to 1, not empty.
      max_seconds: what follows is not heard.

    Returns:
      (kind, detail) as in `Recording`.
    """
    notes = []
    heard = wave[: round(min(max_seconds * SAMPLE_RATE, len(wave)))]
    peak = peak_level(heard)
    if peak < SILENCE:
        kind, detail = "silence", f"nothing louder than {20 * np.log10(max(peak, 1e-9)):.0f} dB"
        if peak_level(wave) >= SILENCE:
            kind, detail = "silent start", f"{detail} in the first {max_seconds:g} s"
        notes.append((kind, detail))
    clipped = np.count_nonzero(np.abs(heard) >= _AT_FULL_SCALE) / len(heard)
    if clipped > _CLIPPED:
        notes.append(("clipped", f"{100 * clipped:.1f} % of the samples are at full scale"))
    return notes


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
