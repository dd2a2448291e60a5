"""Encoded audio to 16 kHz mono samples."""

import io

import numpy as np

from c2f_jax.errors import UserError


def decode_audio(data: bytes | str, *, sample_rate: int = 16_000, name: str | None = None) -> np.ndarray:
    """The samples, float32 (samples,) about -1 to 1, of bytes or of a file; channels averaged, rate converted.

    Reads what libsndfile reads: WAV, FLAC, Ogg Opus and Vorbis, MP3, AIFF and more. Raises `UserError` naming the item
    when it is missing, unreadable, cut off, empty or not finite.
    """
    import soundfile

    name = name or (data if isinstance(data, str) else "audio")
    encoded = data if isinstance(data, bytes) else read_bytes(data)
    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as file:
            wave = file.read(dtype="float32", always_2d=True)
            rate, promised = file.samplerate, file.frames
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"{name}: not audio that can be read ({_reason(e)}); WAV, FLAC, Ogg and MP3 can") from e
    if len(wave) == 0:
        raise UserError(f"{name}: the recording is empty")
    if len(wave) < promised:
        raise UserError(f"{name}: cut off, {len(wave)} of {promised} samples are there")
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise UserError(f"{name}: the recording holds samples that are not numbers")
    if rate != sample_rate:
        import soxr

        wave = soxr.resample(wave, rate, sample_rate)
    return np.ascontiguousarray(wave, np.float32)


def read_bytes(path: str) -> bytes:
    """The content of a file, local or in a bucket; `UserError` naming it when it cannot be read."""
    try:
        if "://" not in path:
            with open(path, "rb") as file:
                return file.read()
        from etils import epath

        return epath.Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e
    except Exception as e:  # each kind of bucket has its own errors
        raise UserError(f"{path}: cannot be read ({type(e).__name__}: {e})") from e


def _reason(error: Exception) -> str:
    return getattr(error, "error_string", None) or str(error)
