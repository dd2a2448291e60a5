"""The multimodal encoder: speech tokens attend to themselves, then to image tokens; one token decides on the match."""

import flax.linen as nn
import jax.numpy as jnp

from c2f_jax.models.encoder import PooledEncoder
from c2f_jax.models.layers import Dense


class MultimodalEncoder(PooledEncoder):
    """Cross-attention transformer with the SIM head Linear(2) on its first token, the [CLS] or the mean of all.

    Attributes:
      width: W inside; tokens of other widths are projected.
      others: as in ``PooledEncoder``.

    Source: C2F, multimodal encoder; Li et al. 2021 (ALBEF), section 3.1.
    """

    depth: int = 2

    @nn.compact
    def __call__(self, speech_tokens, speech_lengths, image_tokens, image_lengths, keys=None):
        """(n, T, Ws), (n,), (n, P, Wi), (n,) -> logits (n, 2) float32: "no match", "match"."""
        speech = Dense(self.width, dtype=self.dtype, name="speech_input")(speech_tokens)
        image = Dense(self.width, dtype=self.dtype, name="image_input")(image_tokens)
        x = self._transformer(cross_attention=True)(
            speech, speech_lengths, keys, image, image_lengths
        )
        return Dense(2, name="match_head")(
            self._pooled(x, speech_lengths)[:, 0].astype(jnp.float32)
        )
