"""Whisper's encoder: log-mel spectrogram, two convolutions, a transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from c2f_jax.errors import UserError
from c2f_jax.models.encoder import NetworkOutput, TransformerEncoder
from c2f_jax.models.layers import BlockStyle, dropout, length_mask
from c2f_jax.models.spectrogram import SAMPLE_RATE, WINDOW, mel_filters, power_spectrum
from c2f_jax.objectives.keys import Site, fold_keys

HOP = 160


def whisper_log_mel(
    waveform: jax.Array, lengths: jax.Array, frames: int, mels: int = 80
) -> jax.Array:
    """Compute Whisper's log-mel spectrogram, the waveform followed by silence.

    x_tm = (max(y_tm, max y - 8) + 4) / 4,  y = log10(max(|STFT|^2 . filters, 1e-10)), with frames
    centered at multiples of 10 ms and the signal mirrored at both ends. A frame of an utterance
    does not depend on the length that it was padded to.

    Args:
      waveform: (n, S) float32, 16 kHz, S <= 160 T.
      lengths: (n,) valid samples; what follows is taken as silence.
      frames: T, number of frames of 10 ms.
      mels: M, channels.

    Returns:
      (n, T, M) float32.
    """
    x = jnp.where(length_mask(lengths, waveform.shape[1]), waveform, 0.0)
    x = jnp.pad(x, ((0, 0), (0, frames * HOP - x.shape[1])))
    x = jnp.pad(x, ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")

    # The periodic Hann window; numpy's is the symmetric one.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    index = np.arange(frames)[:, None] * HOP + np.arange(WINDOW)
    power = power_spectrum(x[:, index] * jnp.asarray(window, jnp.float32))
    # (n, T, F) . (F, M) -> (n, T, M)
    energy = power @ jnp.asarray(mel_filters(mels))
    y = jnp.log10(jnp.maximum(energy, 1e-10))
    return (jnp.maximum(y, jnp.max(y, axis=(1, 2), keepdims=True) - 8.0) + 4.0) / 4.0


def whisper_positions(length: int, width: int) -> jax.Array:
    """Return sinusoids, the sines first, with wavelengths from 2 pi to 10,000 2 pi.

    Returns:
      (length, width) float32.
    """
    frequencies = np.exp(-np.log(10_000.0) * np.arange(width // 2) / (width // 2 - 1))
    angles = np.arange(length)[:, None] * frequencies
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)


class Whisper(TransformerEncoder):
    """Whisper's encoder; the defaults are the tiny one.

    Attributes:
      mels: mel channels; 80, or 128 from large-v3 on.
      positions: number of position embeddings, 20 ms each.
      pad: silence up to 30 s that the transformer attends to, as published. False cuts each
        utterance to its own length: the same features up to the transformer, which attends to no
        silence, at a fraction of the cost.

    Reference:
      Radford et al. 2022.
    """

    width: int = 384
    depth: int = 4
    heads: int = 6
    mels: int = 80
    positions: int = 1500
    pad: bool = False

    summary = "mean"

    def samples_per_token(self) -> int:
        """Return the samples from frame to frame."""
        return 2 * HOP

    @nn.compact
    def __call__(
        self, waveform: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
    ) -> NetworkOutput:
        """Run the network.

        Args:
          waveform: (n, S) float32 at 16 kHz.
          lengths: (n,) valid samples.
          keys: (n,) typed keys for dropout.

        Returns:
          Tokens (n, T, W) with T = ceil(S / 320), or all positions with ``pad``; the lengths are
          ceil(length / 320) in both cases.

        Raises:
          UserError: the recordings are longer than the positions reach.
        """
        step = self.samples_per_token()
        if waveform.shape[1] > self.positions * step:
            seconds = self.positions * step / SAMPLE_RATE
            raise UserError(
                f"recordings of {waveform.shape[1] / SAMPLE_RATE:g} s: Whisper takes up to "
                f"{seconds:g} s; lower data.bucket_seconds and data.max_seconds"
            )
        frames = self.positions if self.pad else -(-waveform.shape[1] // step)
        # Two frames more than the convolutions keep, so that the last one kept sees silence as in
        # a longer batch.
        extra = 0 if self.pad else 2
        x = whisper_log_mel(waveform, lengths, 2 * frames + extra, self.mels).astype(self.dtype)

        conv_0 = nn.Conv(self.width, (3,), padding=((1, 1),), dtype=self.dtype, name="conv_0")
        conv_1 = nn.Conv(
            self.width, (3,), strides=(2,), padding=((1, 1),), dtype=self.dtype, name="conv_1"
        )
        x = nn.gelu(conv_0(x), approximate=False)
        x = nn.gelu(conv_1(x), approximate=False)[:, :frames]

        table = self.param("positions", lambda _: whisper_positions(self.positions, self.width))
        x = x + table[:frames].astype(self.dtype)
        x = dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT))

        # Padded as published, attention sees the silence; cut, it sees the utterance alone.
        lengths = ((lengths + step - 1) // step).astype(jnp.int32)
        transformer = self._transformer(style=BlockStyle(activation="gelu", epsilon=1e-5))
        x, hidden = transformer(x, None if self.pad else lengths, keys)
        return NetworkOutput(x, lengths, hidden)
