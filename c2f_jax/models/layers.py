"""Transformer layers with explicit lengths and per-example dropout keys."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn")


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
        """(n, T, W), (n, S, C), (n,) int32 -> (n, T, W); a query sees the first ``context_lengths`` of the context."""
        width = x.shape[-1]

        def heads(name, inputs):
            shape = (self.heads, width // self.heads)
            return nn.DenseGeneral(shape, dtype=self.dtype, name=name)(inputs)

        # (n, T, heads, W / heads) x (n, S, heads, W / heads) -> (n, T, heads, W / heads)
        attended = jax.nn.dot_product_attention(
            heads("query", x),
            heads("key", context),
            heads("value", context),
            key_value_seq_lengths=context_lengths.astype(jnp.int32),
            implementation=self.implementation,
        )
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(attended)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, optional cross-attention to a context, MLP.

    Attributes:
      heads: attention heads.
      mlp_ratio: hidden width of the MLP over W.
      cross_attention: whether a context is attended to.
      dropout_rate: rate after each sub-layer.
      dtype, attention: compute type and attention implementation.
    """

    heads: int
    mlp_ratio: float = 4.0
    cross_attention: bool = False
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(self, x, lengths, keys=None, context=None, context_lengths=None):
        """(n, T, W) tokens with (n,) lengths, optional (n, S, C) context with (n,) lengths -> (n, T, W)."""

        def norm(name):
            return nn.LayerNorm(dtype=self.dtype, name=name)

        def attention(name):
            return Attention(self.heads, self.dtype, self.attention, name=name)

        y = norm("self_attention_norm")(x)
        x = x + dropout(attention("self_attention")(y, y, lengths), self.dropout_rate, fold_keys(keys, 0))
        if self.cross_attention:
            y = norm("cross_attention_norm")(x)
            y = attention("cross_attention")(y, context, context_lengths)
            x = x + dropout(y, self.dropout_rate, fold_keys(keys, 1))
        y = norm("mlp_norm")(x)
        y = nn.Dense(int(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp_in")(y)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(nn.gelu(y))
        return x + dropout(y, self.dropout_rate, fold_keys(keys, 2))


class Transformer(nn.Module):
    """A stack of blocks and a final layer norm.

    Attributes:
      depth: number of blocks.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      heads, mlp_ratio, cross_attention, dropout_rate, dtype, attention: as in ``TransformerBlock``.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    cross_attention: bool = False
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False

    @nn.compact
    def __call__(self, x, lengths, keys=None, context=None, context_lengths=None):
        """As ``TransformerBlock``: (n, T, W) -> (n, T, W)."""
        block_type = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        for layer in range(self.depth):
            block = block_type(
                self.heads,
                self.mlp_ratio,
                self.cross_attention,
                self.dropout_rate,
                self.dtype,
                self.attention,
                name=f"block_{layer}",
            )
            x = block(x, lengths, fold_keys(keys, layer), context, context_lengths)
        return nn.LayerNorm(dtype=self.dtype, name="norm")(x)


def prepend_cls(module, tokens):
    """Put ``module``'s learnt [CLS] parameter before (n, T, W) tokens -> (n, T + 1, W)."""
    cls = module.param("cls", nn.initializers.normal(0.02), (1, 1, tokens.shape[-1]))
    cls = jnp.broadcast_to(cls, (tokens.shape[0], 1, tokens.shape[-1])).astype(tokens.dtype)
    return jnp.concatenate([cls, tokens], axis=1)
