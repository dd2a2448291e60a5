"""Log-mel spectrograms."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from c2f_jax.models.layers import length_mask

SAMPLE_RATE = 16_000
WINDOW = 400  # 25 ms, also the length of the Fourier transform


@cache
def mel_filters(mels: int) -> np.ndarray:
    """Return triangular filters of equal area, from 0 to 8 kHz on the mel scale.

    m(f) = 3 f / 200 below 1 kHz and 15 + 27 log(f / 1000) / log(6.4) above. Filter i is a triangle
    from m^-1(i d) over m^-1((i + 1) d) to m^-1((i + 2) d), d = m(8000) / (M + 1), of area 1 in Hz.

    Args:
      mels: M, number of channels.

    Returns:
      (WINDOW / 2 + 1, M) float32, those of ``librosa.filters.mel``, whose import takes seconds.

    Reference:
      Slaney 1998, Auditory Toolbox.
    """
    step = np.log(6.4) / 27
    highest = 15 + np.log(SAMPLE_RATE / 2 / 1000) / step
    places = np.linspace(0, highest, mels + 2)
    hertz = np.where(places < 15, 200 / 3 * places, 1000 * np.exp(step * (places - 15)))
    frequencies = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)
    filters = [
        np.interp(frequencies, (low, middle, high), (0, 2 / (high - low), 0))
        for low, middle, high in zip(hertz, hertz[1:], hertz[2:], strict=False)
    ]
    return np.stack(filters, axis=1).astype(np.float32)


def power_spectrum(windows: jax.Array) -> jax.Array:
    """Compute |sum_s x_s exp(-2 pi i f s / S)|^2 for the frequencies f = 0 .. S / 2.

    A TPU computes it as a product with the cosines and sines: its compiler takes six times as long
    for a Fourier transform.

    Args:
      windows: (..., S) float32.

    Returns:
      (..., S / 2 + 1) float32.
    """
    return jax.lax.platform_dependent(windows, tpu=_power_by_product, default=_power_by_fft)


def _power_by_fft(windows: jax.Array) -> jax.Array:
    spectrum = jnp.fft.rfft(windows)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _power_by_product(windows: jax.Array) -> jax.Array:
    size = windows.shape[-1]
    angles = 2 * np.pi * np.outer(np.arange(size), np.arange(size // 2 + 1)) / size
    # (..., S) . (S, F) -> (..., F)
    real, imaginary = (
        jnp.matmul(windows, part(angles).astype(np.float32), precision="highest")
        for part in (np.cos, np.sin)
    )
    return jnp.square(real) + jnp.square(imaginary)


def log_mel(
    waveform: jax.Array, lengths: jax.Array, mels: int = 80, hop: int = 160
) -> tuple[jax.Array, jax.Array]:
    """Compute log-mel spectrograms, each channel normalized over the utterance's own frames.

    x_tm = (y_tm - mean_m) / (std_m + 0.01),  y = log(1e-6 + |STFT|^2 . filters); frames past the
    end are 0, so nothing depends on the padding.

    Args:
      waveform: (n, S) float32, 16 kHz.
      lengths: (n,) int, valid samples.
      mels: M, number of channels.
      hop: samples from frame to frame.

    Returns:
      (n, T, M) float32 with T = floor((S - 400) / hop) + 1, and (n,) int32 valid frames.
    """
    frames = (waveform.shape[1] - WINDOW) // hop + 1
    index = np.arange(frames)[:, None] * hop + np.arange(WINDOW)
    windows = waveform[:, index] * jnp.asarray(np.hanning(WINDOW), jnp.float32)
    power = power_spectrum(windows)
    # (n, T, F) . (F, M) -> (n, T, M)
    features = jnp.log(1e-6 + power @ jnp.asarray(mel_filters(mels)))

    # Mean and variance over the valid frames alone.
    frame_lengths = jnp.clip((lengths - WINDOW) // hop + 1, 0, frames).astype(jnp.int32)
    valid = length_mask(frame_lengths, frames)[..., None]
    count = jnp.maximum(frame_lengths, 1)[:, None, None]
    mean = jnp.sum(jnp.where(valid, features, 0.0), axis=1, keepdims=True) / count
    squares = jnp.where(valid, jnp.square(features - mean), 0.0)
    variance = jnp.sum(squares, axis=1, keepdims=True) / count
    normalized = (features - mean) / (jnp.sqrt(variance) + 0.01)
    return jnp.where(valid, normalized, 0.0), frame_lengths
