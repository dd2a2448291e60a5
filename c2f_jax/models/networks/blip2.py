"""BLIP-2's image side: a vision transformer and its Q-Former."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from c2f_jax.models.encoder import NetworkOutput, TransformerEncoder
from c2f_jax.models.layers import BlockStyle, Dense, dropout
from c2f_jax.objectives.keys import Site, fold_keys


class Blip2(TransformerEncoder, kw_only=True):
    """BLIP-2's image side: learned queries read a ViT's tokens by cross-attention (Q-Former).

    Attributes:
      vision: the ViT.
      queries: number of query tokens.
      width: W of the query tokens.
      depth: blocks of the Q-Former.
      heads: its attention heads.
      cross_every: cross-attention in every block whose number is a multiple of this.
      epsilon: epsilon of the layer norms.
      projection: width of the published contrastive (ITC) space; tokens are projected into it. 0
        leaves them as they are.

    Reference:
      Li et al. 2023 (BLIP-2), section 3.
    """

    vision: nn.Module
    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    cross_every: int = 2
    epsilon: float = 1e-12
    projection: int = 0

    summary = "mean"

    @nn.compact
    def __call__(self, image: jax.Array, keys: jax.Array | None = None) -> NetworkOutput:
        """Run the network.

        Args:
          image: (n, H, W, 3) uint8.
          keys: (n,) typed keys for dropout.

        Returns:
          The query tokens (n, queries, W), their lengths and the Q-Former's hidden states.
        """
        # All tokens of the ViT are valid, and none of its hidden states is used.
        context, _, _ = self.vision(image, fold_keys(keys, Site.TOWER))
        queries = self.param("queries", nn.initializers.normal(0.02), (1, self.queries, self.width))
        x = jnp.broadcast_to(queries.astype(self.dtype), (image.shape[0], self.queries, self.width))
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="input_norm")(x)
        x = dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT))

        style = BlockStyle(False, "gelu", self.epsilon, cross_every=self.cross_every)
        transformer = self._transformer(style=style, cross_attention=True)
        x, hidden = transformer(x, None, keys, context, None)
        if self.projection:
            # (n, queries, W) . (W, projection) -> (n, queries, projection)
            x = Dense(self.projection, dtype=self.dtype, name="projection")(x)
        return NetworkOutput(x, jnp.full((x.shape[0],), self.queries, jnp.int32), hidden)
