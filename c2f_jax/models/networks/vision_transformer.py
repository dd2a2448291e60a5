"""Published vision transformers: CLIP, DINOv2, SigLIP, and BLIP-2's EVA ViT-g with its Q-Former."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from c2f_jax.models.encoder import TransformerEncoder, prepend_cls
from c2f_jax.models.layers import ACTIVATIONS, Attention, BlockStyle, Dense, dropout
from c2f_jax.models.vit import patches
from c2f_jax.objectives.keys import Site, fold_keys

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionTransformer(TransformerEncoder):
    """A published ViT; the defaults are CLIP ViT-B/32.

    Attributes:
      patch: side of a patch in pixels.
      mean, std: of the three colours (0 to 1), removed first.
      activation, epsilon, layer_scale: see ``BlockStyle``.
      cls: a [CLS] before the patches (all but SigLIP).
      patch_bias: bias of the patch embedding (all but CLIP).
      input_norm: a layer norm before the blocks (CLIP).
      pooling_head: an attention-pooled token before the patches' (SigLIP).
      projection: width of the published joint space; tokens are projected into it. 0 leaves them as they are.
      others: as in ``TransformerEncoder``.

    Source: Dosovitskiy et al. 2021; Radford et al. 2021 (CLIP); Oquab et al. 2023 (DINOv2); Zhai et al. 2023 (SigLIP);
    Fang et al. 2022 (EVA).
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 32
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    layer_scale: bool = False
    cls: bool = True
    patch_bias: bool = False
    input_norm: bool = True
    pooling_head: bool = False
    projection: int = 0

    summary = "first"

    @nn.compact
    def __call__(self, image, keys=None):
        """(n, H, W, 3) uint8 -> tokens (n, P, W), the summary first, (n,) int32 lengths, depth + 1 hidden states.

        The last hidden state is after the final norm, as the tokens are.
        """
        x = image.astype(jnp.float32) / 255.0
        x = ((x - jnp.asarray(self.mean)) / jnp.asarray(self.std)).astype(self.dtype)
        x = Dense(self.width, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embedding")(
            patches(x, self.patch)
        )
        x = x.reshape(x.shape[0], -1, self.width)
        if self.cls:
            x = prepend_cls(self, x)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + positions.astype(self.dtype)
        if self.input_norm:
            x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="input_norm")(x)
        x = dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT))
        style = BlockStyle(
            activation=self.activation, epsilon=self.epsilon, layer_scale=self.layer_scale
        )
        x, hidden = self._transformer(style=style)(x, None, keys, layers=True)
        if self.pooling_head:
            x = jnp.concatenate([self._attention_pool(x), x], axis=1)
        if self.projection:
            x = Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(x)
        return x, jnp.full((x.shape[0],), x.shape[1], jnp.int32), hidden

    def _attention_pool(self, x):
        """(n, P, W) -> (n, 1, W): a learnt query attends to all tokens, then an MLP."""
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, self.width)).astype(
            self.dtype
        )
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, self.width))
        pooled = Attention(self.heads, self.dtype, self.attention, name="pool_attention")(
            probe, x, None
        )
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="pool_norm")(pooled)
        y = Dense(round(self.width * self.mlp_ratio), dtype=self.dtype, name="pool_mlp_in")(y)
        return pooled + Dense(self.width, dtype=self.dtype, name="pool_mlp_out")(
            ACTIVATIONS[self.activation](y)
        )


def resize_positions(positions, tokens):
    """Position embeddings of a square grid for another number of patches, as PyTorch's bicubic interpolation.

    Args:
      positions: (1, C + P, W), P = p^2 patches after C = 0 or 1 [CLS].
      tokens: C + Q, Q = q^2.

    Returns:
      (1, C + Q, W).
    """
    extra = positions.shape[1] - math.isqrt(positions.shape[1]) ** 2
    old, new = math.isqrt(positions.shape[1]), math.isqrt(tokens - extra)
    weights = cubic_weights(old, new)
    grid = jnp.asarray(positions[0, extra:]).reshape(old, old, -1)
    grid = jnp.einsum("ri,cj,ijw->rcw", weights, weights, grid, precision="highest").reshape(
        1, new * new, -1
    )
    return jnp.concatenate([positions[:, :extra], grid], axis=1)


def cubic_weights(old, new):
    """(new, old) float32 weights that interpolate ``old`` points at ``new`` ones, edges repeated, without antialiasing.

    Source: Keys 1981, with a = -0.75 as in PyTorch.
    """
    a, weights = -0.75, np.zeros((new, old), np.float32)
    at = (np.arange(new) + 0.5) * old / new - 0.5
    for offset in range(-1, 3):
        point = np.floor(at).astype(int) + offset
        x = np.abs(at - point)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(
            weights, (np.arange(new), np.clip(point, 0, old - 1)), np.where(x <= 1, near, far)
        )
    return weights
