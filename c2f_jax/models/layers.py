"""Transformer layers with explicit lengths and per-example dropout keys; one transformer serves all encoders."""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn")
ACTIVATIONS = {
    "gelu_tanh": nn.gelu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class BlockStyle:
    """What differs from one published transformer to another; the defaults are the light encoders'.

    Attributes:
      pre_norm: norms before each sub-layer and one at the end of the stack (GPT-2, ViT); False for norms after each
        residual sum and none at the end (BERT, HuBERT base).
      activation: of the MLP: "gelu_tanh" (approximate), "gelu" or "quick_gelu" (x sigmoid(1.702 x), CLIP).
      epsilon: of the layer norms.
      layer_scale: learnt scale of each sub-layer's output (DINOv2).
      cross_every: 1 for cross-attention in every block, 2 for every second one from the first on (Q-Former).
    """

    pre_norm: bool = True
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    layer_scale: bool = False
    cross_every: int = 1


def fold_keys(keys, site):
    """Keys for one use: fold_in(key, site) for each of (n,) keys; None (deterministic) stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, site)


def dropout(x, rate, keys):
    """Inverted dropout whose mask for an example depends on that example's key alone.

    Masks drawn for a whole device batch would change with the number of devices; these do not.

    Args:
      x: (n, ...).
      rate: probability of zeroing an entry.
      keys: (n,) typed PRNG keys, or None for no dropout.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def length_mask(lengths, size):
    """(n,) lengths -> (n, size) bool, True at positions below the length."""
    return jnp.arange(size)[None, :] < lengths[:, None]


def sinusoidal_positions(length, width):
    """(length, width) fixed sine and cosine position embeddings (Vaswani et al. 2017, section 3.5)."""
    positions = jnp.arange(length, dtype=jnp.float32)[:, None]
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2, dtype=jnp.float32) / width)[None, :]
    angles = positions * frequencies  # (length, width / 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[:, :width]


class Attention(nn.Module):
    """Multi-head attention; the project's one call of ``jax.nn.dot_product_attention``.

    Attributes:
      heads: number of heads; divides the width of the queries.
      dtype: compute type; parameters are float32.
      implementation: "xla", or "cudnn" on a GPU (bf16 only).
    """

    heads: int
    dtype: Any = jnp.float32
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x, context, context_lengths):
        """(n, T, W), (n, S, C), (n,) int32 or None -> (n, T, W).

        A query sees the first ``context_lengths`` of the context, or all of it.
        """
        width = x.shape[-1]

        def heads(name, inputs):
            shape = (self.heads, width // self.heads)
            return nn.DenseGeneral(shape, dtype=self.dtype, name=name)(inputs)

        # (n, T, heads, W / heads) x (n, S, heads, W / heads) -> (n, T, heads, W / heads)
        attended = jax.nn.dot_product_attention(
            heads("query", x),
            heads("key", context),
            heads("value", context),
            key_value_seq_lengths=None if context_lengths is None else context_lengths.astype(jnp.int32),
            implementation=self.implementation,
        )
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(attended)


class TransformerBlock(nn.Module):
    """Transformer block: self-attention, optional cross-attention to a context, MLP.

    Attributes:
      heads: attention heads.
      mlp_ratio: hidden width of the MLP over W.
      cross_attention: whether a context is attended to.
      dropout_rate: rate after each sub-layer.
      style: where the norms stand, activation and so on.
      dtype, attention: compute type and attention implementation.
    """

    heads: int
    mlp_ratio: float = 4.0
    cross_attention: bool = False
    dropout_rate: float = 0.0
    style: BlockStyle = BlockStyle()
    dtype: Any = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(self, x, lengths, keys=None, context=None, context_lengths=None):
        """(n, T, W) tokens with (n,) lengths, optional (n, S, C) context with (n,) lengths -> (n, T, W).

        Lengths may be None where all tokens are valid.
        """

        def attend(name, y, context, lengths):
            return Attention(self.heads, self.dtype, self.attention, name=name)(y, context, lengths)

        def mlp(y):
            y = nn.Dense(round(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp_in")(y)
            return nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(ACTIVATIONS[self.style.activation](y))

        x = self._residual(x, "self_attention", lambda y: attend("self_attention", y, y, lengths), fold_keys(keys, 0))
        if self.cross_attention:
            cross = functools.partial(attend, "cross_attention", context=context, lengths=context_lengths)
            x = self._residual(x, "cross_attention", cross, fold_keys(keys, 1))
        return self._residual(x, "mlp", mlp, fold_keys(keys, 2))

    def _residual(self, x, name, sub_layer, keys):
        """x + sub_layer(norm(x)), or norm(x + sub_layer(x))."""
        norm = nn.LayerNorm(self.style.epsilon, dtype=self.dtype, name=f"{name}_norm")
        y = sub_layer(norm(x) if self.style.pre_norm else x)
        if self.style.layer_scale:
            y = y * self.param(f"{name}_scale", nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)
        x = x + dropout(y, self.dropout_rate, keys)
        return x if self.style.pre_norm else norm(x)


class Transformer(nn.Module):
    """A stack of blocks and, with norms before the sub-layers, a final layer norm.

    Attributes:
      depth: number of blocks.
      layer_drop: probability that an example skips a block in training (Fan et al. 2019).
      remat: recompute each block's activations in the backward pass instead of keeping them.
      heads, mlp_ratio, cross_attention, dropout_rate, style, dtype, attention: as in ``TransformerBlock``.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    cross_attention: bool = False
    dropout_rate: float = 0.0
    style: BlockStyle = BlockStyle()
    layer_drop: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False

    @nn.compact
    def __call__(self, x, lengths, keys=None, context=None, context_lengths=None, layers=False):
        """As ``TransformerBlock``: (n, T, W) -> (n, T, W).

        With ``layers`` also the tuple of the ``depth`` + 1 hidden states: the input, the output of each block but the
        last, and the result.
        """
        block_type = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        hidden = [x]
        for layer in range(self.depth):
            block = block_type(
                self.heads,
                self.mlp_ratio,
                self.cross_attention and layer % self.style.cross_every == 0,
                self.dropout_rate,
                self.style,
                self.dtype,
                self.attention,
                name=f"block_{layer}",
            )
            y = block(x, lengths, fold_keys(keys, layer), context, context_lengths)
            if keys is not None and self.layer_drop:
                skip = jax.vmap(lambda key: jax.random.bernoulli(key, self.layer_drop))(
                    fold_keys(keys, self.depth + 1 + layer)
                )
                y = jnp.where(skip[:, None, None], x, y)
            x = y
            hidden.append(x)
        if self.style.pre_norm:
            hidden[-1] = x = nn.LayerNorm(self.style.epsilon, dtype=self.dtype, name="norm")(x)
        return (x, tuple(hidden)) if layers else x


def prepend_cls(module, tokens):
    """Put ``module``'s learnt [CLS] parameter before (n, T, W) tokens -> (n, T + 1, W)."""
    cls = module.param("cls", nn.initializers.normal(0.02), (1, 1, tokens.shape[-1]))
    cls = jnp.broadcast_to(cls, (tokens.shape[0], 1, tokens.shape[-1])).astype(tokens.dtype)
    return jnp.concatenate([cls, tokens], axis=1)
