"""The light image encoder.

Interface of all image encoders: image (n, H, W, 3) uint8 -> [CLS] and tokens (n, P, W), lengths.
"""

import math
from dataclasses import field

import flax.linen as nn
import jax
import jax.numpy as jnp

from c2f_jax.models.encoder import BranchedEncoder, prepend_cls
from c2f_jax.models.layers import Dense, dropout
from c2f_jax.objectives.keys import Site, fold_keys


def patches(x: jax.Array, side: int) -> jax.Array:
    """Cut images into squares, the input of a convolution with stride = kernel = side.

    Pixels at the right and the bottom that fill no patch are dropped, as by the convolution.

    Args:
      x: (n, H, W, C).
      side: side of a patch in pixels.

    Returns:
      (n, H // side, W // side, side side C).
    """
    n, height, width, channels = x.shape
    rows, columns = height // side, width // side
    x = x[:, : rows * side, : columns * side].reshape(n, rows, side, columns, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, side * side * channels)


class ViTImageEncoder(BranchedEncoder):
    """A vision transformer with a [CLS] and learned positions.

    Attributes:
      patch: side of a patch in pixels; divides the image side.
      conv_stem: 3 x 3 convolutions of stride 2 down to the patch grid instead of one linear map of
        a patch; small ViTs learn much faster with it (Xiao et al. 2021).
      conv_blocks: residual 3 x 3 convolutions on the patch grid before the transformer.
      token_pool: output tokens are means over token_pool x token_pool patches, which makes matching
        cheaper.

    Reference:
      Dosovitskiy et al. 2021; Xiao et al. 2021 ("Early Convolutions Help Transformers See Better").
    """

    patch: int = field(default=8, metadata={"min": 1})
    conv_stem: bool = True
    conv_blocks: int = field(default=0, metadata={"min": 0})
    token_pool: int = field(default=2, metadata={"min": 1})

    @nn.compact
    def __call__(
        self, image: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encode images.

        Args:
          image: (n, H, W, 3) uint8.
          keys: (n,) typed keys for dropout.

        Returns:
          Tokens (n, H W / (patch token_pool)^2 + 1, M width), [CLS] first, and (n,) int32 lengths.
        """
        n = image.shape[0]
        x = self._embed_patches(image.astype(self.dtype) / 127.5 - 1.0)
        for block in range(self.conv_blocks):
            convolution = nn.Conv(self.width, (3, 3), dtype=self.dtype, name=f"block_{block}")
            x = x + nn.gelu(convolution(x))

        # (n, h, w, W) -> (n, h w, W)
        x = x.reshape(n, -1, self.width)
        shape = (1, x.shape[1], self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = x + positions.astype(self.dtype)
        x = prepend_cls(self, dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT)))
        lengths = jnp.full((n,), x.shape[1], jnp.int32)
        x = self._encode(x, lengths, keys)

        # After the transformer, so that attention sees every patch.
        if self.token_pool > 1:
            rows, columns = image.shape[1] // self.patch, image.shape[2] // self.patch
            grid = x[:, 1:].reshape(n, rows, columns, -1)
            pooled = nn.avg_pool(grid, (self.token_pool,) * 2, strides=(self.token_pool,) * 2)
            x = jnp.concatenate([x[:, :1], pooled.reshape(n, -1, pooled.shape[-1])], axis=1)
            lengths = jnp.full((n,), x.shape[1], jnp.int32)
        return x, lengths

    def _embed_patches(self, x: jax.Array) -> jax.Array:
        """Embed each patch: (n, H, W, 3) -> (n, H / patch, W / patch, width)."""
        embed = Dense(self.width, dtype=self.dtype, name="patch_embedding")
        if not self.conv_stem:
            # (n, h, w, C) . (C, W) -> (n, h, w, W)
            return embed(patches(x, self.patch))

        # The width doubles from layer to layer, as the grid shrinks.
        layers = int(math.log2(self.patch))
        for layer in range(layers):
            channels = self.width // 2 ** (layers - 1 - layer)
            convolution = nn.Conv(
                channels, (3, 3), strides=(2, 2), dtype=self.dtype, name=f"conv_{layer}"
            )
            x = nn.gelu(convolution(x))
        # (n, h, w, W) . (W, W) -> (n, h, w, W)
        return embed(x)
