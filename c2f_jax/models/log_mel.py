"""The light speech encoder.

Interface of all speech encoders: waveform (n, S) float32 at 16 kHz, lengths (n,) in samples ->
[CLS] and tokens (n, T, W), lengths (n,) in tokens.
"""

from dataclasses import field

import flax.linen as nn
import jax
import jax.numpy as jnp

from c2f_jax.models.encoder import BranchedEncoder, prepend_cls
from c2f_jax.models.layers import dropout, length_mask, sinusoidal_positions
from c2f_jax.models.spectrogram import log_mel
from c2f_jax.objectives.keys import Site, fold_keys


class LogMelSpeechEncoder(BranchedEncoder):
    """Log-mel spectrogram, strided convolutions, a small transformer with a [CLS].

    Attributes:
      mels: mel channels.
      hop: samples from frame to frame; 240 is 15 ms.
      conv_layers: convolutions of stride 2; a token comes every hop 2^conv_layers samples (120 ms
        by default).
    """

    mels: int = field(default=80, metadata={"min": 1})
    hop: int = field(default=240, metadata={"min": 1})
    conv_layers: int = field(default=3, metadata={"min": 0})

    @nn.compact
    def __call__(
        self, waveform: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encode recordings.

        Args:
          waveform: (n, S) float32, 16 kHz.
          lengths: (n,) valid samples.
          keys: (n,) typed keys for dropout.

        Returns:
          Tokens (n, ceil(T / 2^conv_layers) + 1, M W) of T frames, [CLS] first, and (n,) int32
          valid ones.
        """
        x, lengths = log_mel(waveform, lengths, self.mels, self.hop)
        x = x.astype(self.dtype)

        for layer in range(self.conv_layers):
            # Windows start at every second frame; "SAME" would shift them with the parity of the
            # padded length.
            convolution = nn.Conv(
                self.width,
                (3,),
                strides=(2,),
                padding=((0, 2),),
                dtype=self.dtype,
                name=f"conv_{layer}",
            )
            x = nn.gelu(convolution(x))
            lengths = (lengths + 1) // 2
            # A convolution's bias would leak past the end and reach valid positions in the next
            # layer.
            x = jnp.where(length_mask(lengths, x.shape[1])[..., None], x, 0)

        # Features on the scale of the positions: without the norm the positions drown them at the
        # start.
        x = nn.LayerNorm(dtype=self.dtype, name="input_norm")(x)
        x = x + sinusoidal_positions(x.shape[1], self.width).astype(self.dtype)
        x = prepend_cls(self, dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT)))
        lengths = lengths + 1
        return self._encode(x, lengths, keys), lengths
