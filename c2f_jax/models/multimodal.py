"""The multimodal encoder: speech tokens attend to each other and to image tokens."""

from dataclasses import field

import flax.linen as nn
import jax
import jax.numpy as jnp

from c2f_jax.models.encoder import PooledEncoder
from c2f_jax.models.layers import Dense


class MultimodalEncoder(PooledEncoder):
    """Cross-attention transformer with the SIM head Linear(2) on its first token.

    Attributes:
      width: W inside; tokens of other widths are projected.
      depth: number of blocks.
      mlp_ratio: hidden width of each MLP over W.

    Reference:
      C2F, multimodal encoder; Li et al. 2021 (ALBEF), section 3.1.
    """

    depth: int = field(default=2, metadata={"min": 0})
    mlp_ratio: float = field(default=2.0, metadata={"above": 0})

    @nn.compact
    def __call__(
        self,
        speech_tokens: jax.Array,
        speech_lengths: jax.Array,
        image_tokens: jax.Array,
        image_lengths: jax.Array,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Match n pairs.

        Args:
          speech_tokens: (n, T, Ws).
          speech_lengths: (n,) valid tokens.
          image_tokens: (n, P, Wi).
          image_lengths: (n,) valid tokens.
          keys: (n,) typed keys for dropout.

        Returns:
          Logits (n, 2) float32: "no match", "match".
        """
        # (n, T, Ws) . (Ws, W) -> (n, T, W) and (n, P, Wi) . (Wi, W) -> (n, P, W)
        speech = Dense(self.width, dtype=self.dtype, name="speech_input")(speech_tokens)
        image = Dense(self.width, dtype=self.dtype, name="image_input")(image_tokens)

        transformer = self._transformer(cross_attention=True)
        x, _ = transformer(speech, speech_lengths, keys, image, image_lengths)
        first = self._pooled(x, speech_lengths)[:, 0].astype(jnp.float32)
        # (n, W) . (W, 2) -> (n, 2)
        return Dense(2, name="match_head")(first)
