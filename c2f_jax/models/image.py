"""Image encoders. Interface: image (n, H, W, 3) uint8 -> [CLS] + tokens, token lengths."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from c2f_jax.models.layers import Transformer, dropout, fold_keys, prepend_cls


def patches(x, side):
    """(n, H, W, C) -> (n, H / side, W / side, side side C): the input of a convolution with stride = kernel = side."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // side, side, width // side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // side, width // side, side * side * channels)


class ViTImageEncoder(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) with a [CLS] and learnt positions.

    Attributes:
      patch: side of a patch in pixels; divides the image side.
      stem_patch: 0, or the side of smaller patches that are embedded first (width / 2, GELU) and then joined to a patch;
        such a two-stage stem learns faster than one linear map (Xiao et al. 2021).
      width: W of the tokens.
      depth, heads, mlp_ratio, dropout_rate: of the transformer.
      dtype, attention, remat: compute type, attention implementation, rematerialisation.
    """

    patch: int = 8
    stem_patch: int = 0
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False

    @nn.compact
    def __call__(self, image, keys=None):
        """(n, H, W, 3) uint8 -> tokens (n, HW / patch^2 + 1, width) with [CLS] first, and their lengths (n,) int32."""
        n = image.shape[0]
        x = image.astype(self.dtype) / 127.5 - 1.0
        if self.stem_patch:
            x = nn.Dense(self.width // 2, dtype=self.dtype, name="stem")(patches(x, self.stem_patch))
            x = nn.LayerNorm(dtype=self.dtype, name="stem_norm")(nn.gelu(x))
        x = patches(x, self.patch // (self.stem_patch or 1))
        x = nn.Dense(self.width, dtype=self.dtype, name="patch_embedding")(x).reshape(n, -1, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = x + positions.astype(self.dtype)
        x = prepend_cls(self, dropout(x, self.dropout_rate, fold_keys(keys, self.depth)))
        lengths = jnp.full((n,), x.shape[1], jnp.int32)
        x = Transformer(
            self.depth,
            self.heads,
            self.mlp_ratio,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            name="transformer",
        )(x, lengths, keys)
        return x, lengths
