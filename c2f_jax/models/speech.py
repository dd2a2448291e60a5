"""Speech encoders. Interface: waveform (n, S) float32 at 16 kHz, lengths (n,) samples -> [CLS] + tokens, lengths."""

from functools import cache

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from c2f_jax.models.layers import (
    BranchedEncoder,
    dropout,
    fold_keys,
    length_mask,
    prepend_cls,
    sinusoidal_positions,
)

SAMPLE_RATE = 16_000
WINDOW = 400  # 25 ms, the length of the Fourier transform too


@cache
def _mel_filters(mels):
    """(WINDOW / 2 + 1, mels) triangular filters, 0 to 8 kHz (librosa's Slaney scale)."""
    import librosa

    return librosa.filters.mel(sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=mels).T.astype(np.float32)


def log_mel(waveform, lengths, mels=80, hop=160):
    """Log-mel spectrogram with each utterance's mean and variance over its own frames removed from each channel.

    x_tm = (log(1e-6 + |STFT|^2 . filters) - mean_m) / (std_m + 0.01); frames past the end are 0, so nothing depends on
    the padding.

    Args:
      waveform: (n, S) float32, 16 kHz.
      lengths: (n,) int, valid samples.
      mels: number of channels M.
      hop: samples from frame to frame.

    Returns:
      (n, T, M) float32 with T = floor((S - 400) / hop) + 1, and (n,) int32 valid frames.
    """
    frames = (waveform.shape[1] - WINDOW) // hop + 1
    index = np.arange(frames)[:, None] * hop + np.arange(WINDOW)
    windows = waveform[:, index] * jnp.asarray(np.hanning(WINDOW), jnp.float32)
    spectrum = jnp.fft.rfft(windows)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    features = jnp.log(1e-6 + power @ jnp.asarray(_mel_filters(mels)))  # (n, T, F) . (F, M) -> (n, T, M)
    frame_lengths = jnp.clip((lengths - WINDOW) // hop + 1, 0, frames).astype(jnp.int32)
    valid = length_mask(frame_lengths, frames)[..., None]
    count = jnp.maximum(frame_lengths, 1)[:, None, None]
    mean = jnp.sum(jnp.where(valid, features, 0.0), axis=1, keepdims=True) / count
    variance = jnp.sum(jnp.where(valid, jnp.square(features - mean), 0.0), axis=1, keepdims=True) / count
    return jnp.where(valid, (features - mean) / (jnp.sqrt(variance) + 0.01), 0.0), frame_lengths


class LogMelSpeechEncoder(BranchedEncoder):
    """Log-mel spectrogram, strided convolutions, a small transformer with a [CLS].

    Attributes:
      mels: mel channels.
      hop: samples from frame to frame; 160 is 10 ms.
      conv_layers: convolutions of stride 2; tokens come every hop 2^conv_layers samples (80 ms by default).
      others: as in ``BranchedEncoder``.
    """

    mels: int = 80
    hop: int = 160
    conv_layers: int = 3

    @nn.compact
    def __call__(self, waveform, lengths, keys=None):
        """(n, S), (n,) -> tokens (n, ceil(T / 2^conv_layers) + 1, W) with [CLS] first, and their lengths (n,) int32."""
        x, lengths = log_mel(waveform, lengths, self.mels, self.hop)
        x = x.astype(self.dtype)
        for layer in range(self.conv_layers):
            # Windows start at every second frame; "SAME" would shift them with the parity of the padded length.
            conv = nn.Conv(self.width, (3,), strides=(2,), padding=((0, 2),), dtype=self.dtype, name=f"conv_{layer}")
            x = nn.gelu(conv(x))
            lengths = (lengths + 1) // 2
            # A convolution's bias would leak past the end and reach valid positions in the next layer.
            x = jnp.where(length_mask(lengths, x.shape[1])[..., None], x, 0)
        # Features on the scale of the positions: without the norm the positions drown them at the start.
        x = nn.LayerNorm(dtype=self.dtype, name="input_norm")(x)
        x = x + sinusoidal_positions(x.shape[1], self.width).astype(self.dtype)
        x = prepend_cls(self, dropout(x, self.dropout_rate, fold_keys(keys, self.depth)))
        lengths = lengths + 1
        return self._encode(x, lengths, keys), lengths
