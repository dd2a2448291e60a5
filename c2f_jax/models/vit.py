"""Image encoders. Interface: image (n, H, W, 3) uint8 -> [CLS] + tokens, token lengths."""

import math

import flax.linen as nn
import jax.numpy as jnp

from c2f_jax.models.encoder import BranchedEncoder, prepend_cls
from c2f_jax.models.layers import Dense, dropout
from c2f_jax.objectives.keys import Site, fold_keys


def patches(x, side):
    """(n, H, W, C) -> (n, H // side, W // side, side side C): the input of a convolution with stride = kernel = side.

    Pixels at the right and the bottom that fill no patch are dropped, as by the convolution.
    """
    n, height, width, channels = x.shape
    rows, columns = height // side, width // side
    x = x[:, : rows * side, : columns * side].reshape(n, rows, side, columns, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, side * side * channels)


class ViTImageEncoder(BranchedEncoder):
    """A vision transformer (Dosovitskiy et al. 2021) with a [CLS] and learnt positions.

    Attributes:
      patch: side of a patch in pixels; divides the image side.
      conv_stem: 3 x 3 convolutions of stride 2 down to the patch grid instead of one linear map of a patch; small ViTs
        learn much faster with it (Xiao et al. 2021, "Early Convolutions Help Transformers See Better").
      conv_blocks: residual 3 x 3 convolutions on the patch grid before the transformer.
      token_pool: output tokens are means over token_pool x token_pool patches, which makes matching cheaper.
      others: as in ``BranchedEncoder``.
    """

    patch: int = 8
    conv_stem: bool = False
    conv_blocks: int = 0
    token_pool: int = 1

    @nn.compact
    def __call__(self, image, keys=None):
        """(n, H, W, 3) uint8 -> tokens (n, HW / (patch token_pool)^2 + 1, width), [CLS] first, lengths (n,) int32."""
        n = image.shape[0]
        x = image.astype(self.dtype) / 127.5 - 1.0
        if self.conv_stem:
            layers = int(math.log2(self.patch))
            for layer in range(layers):
                channels = self.width // 2 ** (layers - 1 - layer)
                x = nn.gelu(
                    nn.Conv(
                        channels, (3, 3), strides=(2, 2), dtype=self.dtype, name=f"conv_{layer}"
                    )(x)
                )
            x = Dense(self.width, dtype=self.dtype, name="patch_embedding")(x)
        else:
            x = Dense(self.width, dtype=self.dtype, name="patch_embedding")(patches(x, self.patch))
        for block in range(self.conv_blocks):
            x = x + nn.gelu(nn.Conv(self.width, (3, 3), dtype=self.dtype, name=f"block_{block}")(x))
        x = x.reshape(n, -1, self.width)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + positions.astype(self.dtype)
        x = prepend_cls(self, dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT)))
        lengths = jnp.full((n,), x.shape[1], jnp.int32)
        x = self._encode(x, lengths, keys)
        if self.token_pool > 1:
            rows, columns = image.shape[1] // self.patch, image.shape[2] // self.patch
            grid = x[:, 1:].reshape(n, rows, columns, -1)
            pooled = nn.avg_pool(grid, (self.token_pool,) * 2, strides=(self.token_pool,) * 2)
            x = jnp.concatenate([x[:, :1], pooled.reshape(n, -1, pooled.shape[-1])], axis=1)
            lengths = jnp.full((n,), x.shape[1], jnp.int32)
        return x, lengths
