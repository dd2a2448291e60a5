"""The multimodal encoder: speech tokens attend to themselves, then to image tokens; [CLS] decides match or no match."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from c2f_jax.models.layers import Transformer


class MultimodalEncoder(nn.Module):
    """Cross-attention transformer with the SIM head Linear(2) on its [CLS].

    Attributes:
      width: W inside; tokens of other widths are projected.
      depth, heads, mlp_ratio, dropout_rate: of the transformer.
      dtype, attention, remat: compute type, attention implementation, rematerialisation.

    Source: C2F, multimodal encoder; Li et al. 2021 (ALBEF), section 3.1.
    """

    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False

    @nn.compact
    def __call__(self, speech_tokens, speech_lengths, image_tokens, image_lengths, keys=None):
        """(n, T, Ws), (n,), (n, P, Wi), (n,) -> logits (n, 2) float32: "no match", "match"."""
        speech = nn.Dense(self.width, dtype=self.dtype, name="speech_input")(speech_tokens)
        image = nn.Dense(self.width, dtype=self.dtype, name="image_input")(image_tokens)
        x = Transformer(
            self.depth,
            self.heads,
            self.mlp_ratio,
            cross_attention=True,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            name="transformer",
        )(speech, speech_lengths, keys, image, image_lengths)
        return nn.Dense(2, name="match_head")(x[:, 0].astype(jnp.float32))
