"""Published vision transformers: CLIP, DINOv2, SigLIP, and BLIP-2's EVA ViT-g with its Q-Former."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from c2f_jax.models.image import patches
from c2f_jax.models.layers import Attention, BlockStyle, Transformer, dropout, fold_keys, prepend_cls

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionTransformer(nn.Module):
    """A published ViT; the defaults are CLIP ViT-B/32.

    Attributes:
      width, depth, heads, mlp_ratio, dropout_rate: of the transformer.
      patch: side of a patch in pixels.
      mean, std: of the three colours (0 to 1), removed first.
      activation, epsilon, layer_scale: see ``BlockStyle``.
      cls: a [CLS] before the patches (all but SigLIP).
      patch_bias: bias of the patch embedding (all but CLIP).
      input_norm: a layer norm before the blocks (CLIP).
      pooling_head: an attention-pooled token before the patches' (SigLIP).
      projection: width of the published joint space; tokens are projected into it. 0 leaves them as they are.
      dtype, attention, remat: compute type, attention implementation, rematerialisation.

    Source: Dosovitskiy et al. 2021; Radford et al. 2021 (CLIP); Oquab et al. 2023 (DINOv2); Zhai et al. 2023 (SigLIP);
    Fang et al. 2022 (EVA).
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
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
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False

    summary = "first"

    @nn.compact
    def __call__(self, image, keys=None):
        """(n, H, W, 3) uint8 -> tokens (n, P, W), the summary first, (n,) int32 lengths, depth + 1 hidden states.

        The last hidden state is after the final norm, as the tokens are.
        """
        x = image.astype(jnp.float32) / 255.0
        x = ((x - jnp.asarray(self.mean)) / jnp.asarray(self.std)).astype(self.dtype)
        x = nn.Dense(self.width, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embedding")(
            patches(x, self.patch)
        )
        x = x.reshape(x.shape[0], -1, self.width)
        if self.cls:
            x = prepend_cls(self, x)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = x + positions.astype(self.dtype)
        if self.input_norm:
            x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="input_norm")(x)
        x = dropout(x, self.dropout_rate, fold_keys(keys, self.depth))
        x, hidden = Transformer(
            self.depth,
            self.heads,
            self.mlp_ratio,
            dropout_rate=self.dropout_rate,
            style=BlockStyle(activation=self.activation, epsilon=self.epsilon, layer_scale=self.layer_scale),
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            name="transformer",
        )(x, None, keys, layers=True)
        if self.pooling_head:
            x = jnp.concatenate([self._attention_pool(x), x], axis=1)
        if self.projection:
            x = nn.Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(x)
        return x, jnp.full((x.shape[0],), x.shape[1], jnp.int32), hidden

    def _attention_pool(self, x):
        """(n, P, W) -> (n, 1, W): a learnt query attends to all tokens, then an MLP."""
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, self.width)).astype(self.dtype)
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, self.width))
        pooled = Attention(self.heads, self.dtype, self.attention, name="pool_attention")(probe, x, None)
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="pool_norm")(pooled)
        y = nn.Dense(round(self.width * self.mlp_ratio), dtype=self.dtype, name="pool_mlp_in")(y)
        return pooled + nn.Dense(self.width, dtype=self.dtype, name="pool_mlp_out")(nn.gelu(y))


class Blip2(nn.Module):
    """BLIP-2's image side: learnt queries read a frozen ViT's tokens through cross-attention (Q-Former).

    Attributes:
      vision: the ViT.
      queries: number of query tokens.
      width, depth, heads, mlp_ratio, dropout_rate: of the Q-Former.
      cross_every: cross-attention in every so many blocks.
      epsilon: of its layer norms.
      projection: width of the published contrastive (ITC) space; tokens are projected into it. 0 leaves them.
      dtype, attention, remat: compute type, attention implementation, rematerialisation.

    Source: Li et al. 2023 (BLIP-2), section 3.
    """

    vision: nn.Module
    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    cross_every: int = 2
    epsilon: float = 1e-12
    projection: int = 0
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False

    summary = "mean"

    @property
    def patch(self):
        """Side of a patch in pixels."""
        return self.vision.patch

    @nn.compact
    def __call__(self, image, keys=None):
        """(n, H, W, 3) uint8 -> query tokens (n, queries, W), (n,) int32 lengths, depth + 1 hidden states."""
        context, context_lengths, _ = self.vision(image, fold_keys(keys, self.depth + 1))
        queries = self.param("queries", nn.initializers.normal(0.02), (1, self.queries, self.width))
        x = jnp.broadcast_to(queries.astype(self.dtype), (image.shape[0], self.queries, self.width))
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="input_norm")(x)
        x = dropout(x, self.dropout_rate, fold_keys(keys, self.depth))
        x, hidden = Transformer(
            self.depth,
            self.heads,
            self.mlp_ratio,
            cross_attention=True,
            dropout_rate=self.dropout_rate,
            style=BlockStyle(False, "gelu", self.epsilon, cross_every=self.cross_every),
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            name="transformer",
        )(x, None, keys, context, None, layers=True)
        if self.projection:
            x = nn.Dense(self.projection, dtype=self.dtype, name="projection")(x)
        return x, jnp.full((x.shape[0],), self.queries, jnp.int32), hidden


def resize_positions(positions, tokens):
    """Position embeddings of a square grid for another number of patches, cubic interpolation (Keys, a = -0.5).

    Args:
      positions: (1, C + P, W), P = p^2 patches after C = 0 or 1 [CLS].
      tokens: C + Q, Q = q^2.

    Returns:
      (1, C + Q, W).
    """
    width = positions.shape[-1]
    extra = positions.shape[1] - round(positions.shape[1] ** 0.5) ** 2
    old, new = round((positions.shape[1] - extra) ** 0.5), round((tokens - extra) ** 0.5)
    grid = positions[:, extra:].reshape(1, old, old, width)
    grid = jax.image.resize(grid, (1, new, new, width), "cubic").reshape(1, new * new, width)
    return jnp.concatenate([positions[:, :extra], grid], axis=1)
