"""Published vision transformers: CLIP, DINOv2, SigLIP, and BLIP-2's EVA ViT-g."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from c2f_jax.models.encoder import NetworkOutput, TransformerEncoder, prepend_cls
from c2f_jax.models.layers import ACTIVATIONS, Attention, BlockStyle, Dense, dropout
from c2f_jax.models.vit import patches
from c2f_jax.objectives.keys import Site, fold_keys

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionTransformer(TransformerEncoder):
    """A published ViT; the defaults are CLIP ViT-B/32.

    Attributes:
      patch: side of a patch in pixels.
      mean: mean of each color (0 to 1), which is subtracted first.
      std: standard deviation of each color, by which pixels are then divided.
      activation: see ``BlockStyle``.
      epsilon: see ``BlockStyle``.
      layer_scale: see ``BlockStyle``.
      cls: a [CLS] before the patches (all but SigLIP).
      patch_bias: bias of the patch embedding (all but CLIP).
      input_norm: a layer norm before the blocks (CLIP).
      pooling_head: an attention-pooled token before the patches' (SigLIP).
      projection: width of the published joint space; tokens are projected into it. 0 leaves them as
        they are.

    Reference:
      Dosovitskiy et al. 2021; Radford et al. 2021 (CLIP); Oquab et al. 2023 (DINOv2); Zhai et al.
      2023 (SigLIP); Fang et al. 2022 (EVA).
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
    def __call__(self, image: jax.Array, keys: jax.Array | None = None) -> NetworkOutput:
        """Run the network.

        Args:
          image: (n, H, W, 3) uint8.
          keys: (n,) typed keys for dropout.

        Returns:
          Tokens (n, P, W), the summary first. The last hidden state is after the final norm, as the
          tokens are.
        """
        x = image.astype(jnp.float32) / 255.0
        x = ((x - jnp.asarray(self.mean)) / jnp.asarray(self.std)).astype(self.dtype)
        embed = Dense(
            self.width, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embedding"
        )
        # (n, h, w, C) . (C, W) -> (n, h, w, W)
        x = embed(patches(x, self.patch))
        x = x.reshape(x.shape[0], -1, self.width)

        if self.cls:
            x = prepend_cls(self, x)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), shape).astype(self.dtype)
        if self.input_norm:
            x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="input_norm")(x)
        x = dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT))

        style = BlockStyle(
            activation=self.activation, epsilon=self.epsilon, layer_scale=self.layer_scale
        )
        x, hidden = self._transformer(style=style)(x, None, keys)
        if self.pooling_head:
            x = jnp.concatenate([self._attention_pool(x), x], axis=1)
        if self.projection:
            # (n, P, W) . (W, projection) -> (n, P, projection)
            x = Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(x)
        return NetworkOutput(x, jnp.full((x.shape[0],), x.shape[1], jnp.int32), hidden)

    def _attention_pool(self, x: jax.Array) -> jax.Array:
        """Let a learned query attend to all tokens, then an MLP: (n, P, W) -> (n, 1, W)."""
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, self.width))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, self.width))
        attention = Attention(self.heads, self.dtype, self.attention, name="pool_attention")
        pooled = attention(probe, x, None)

        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="pool_norm")(pooled)
        hidden = round(self.width * self.mlp_ratio)
        # (n, 1, W) . (W, H) -> (n, 1, H)
        y = Dense(hidden, dtype=self.dtype, name="pool_mlp_in")(y)
        y = ACTIVATIONS[self.activation](y)
        # (n, 1, H) . (H, W) -> (n, 1, W)
        y = Dense(self.width, dtype=self.dtype, name="pool_mlp_out")(y)
        return pooled + y


def resize_positions(positions: jax.Array, tokens: int) -> jax.Array:
    """Interpolate position embeddings of a square grid for another number of patches.

    Bicubic, as PyTorch does it.

    Args:
      positions: (1, C + P, W), P = p^2 patches after C = 0 or 1 [CLS].
      tokens: C + Q, Q = q^2.

    Returns:
      (1, C + Q, W).
    """
    # One more than a square: a [CLS], which keeps its embedding.
    extra = positions.shape[1] - math.isqrt(positions.shape[1]) ** 2
    old, new = math.isqrt(positions.shape[1]), math.isqrt(tokens - extra)
    weights = cubic_weights(old, new)
    grid = jnp.asarray(positions[0, extra:]).reshape(old, old, -1)
    # (q, p) . (q, p) . (p, p, W) -> (q, q, W)
    grid = jnp.einsum("ri,cj,ijw->rcw", weights, weights, grid, precision="highest")
    return jnp.concatenate([positions[:, :extra], grid.reshape(1, new * new, -1)], axis=1)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Return the weights that interpolate ``old`` points at ``new`` ones, without antialiasing.

    Edges are repeated.

    Returns:
      (new, old) float32.

    Reference:
      Keys 1981, with a = -0.75 as in PyTorch.
    """
    # Each new point is a sum over the four old ones around it.
    a, weights = -0.75, np.zeros((new, old), np.float32)
    at = (np.arange(new) + 0.5) * old / new - 0.5
    for offset in range(-1, 3):
        point = np.floor(at).astype(int) + offset
        x = np.abs(at - point)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        # Points outside are the nearest edge, whose weights add up.
        columns = np.clip(point, 0, old - 1)
        np.add.at(weights, (np.arange(new), columns), np.where(x <= 1, near, far))
    return weights
