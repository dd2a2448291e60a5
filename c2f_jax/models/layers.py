"""Transformer layers with explicit lengths and per-example dropout keys; one transformer serves all encoders."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from c2f_jax.objectives.keys import Site, fold_keys

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
      position_buckets: rows of the table of relative positions, shared by all blocks and gated in each (WavLM); 0 for
        none.
      position_distance: distance from which on all positions share a row.
    """

    pre_norm: bool = True
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    layer_scale: bool = False
    cross_every: int = 1
    position_buckets: int = 0
    position_distance: int = 800


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
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2, dtype=jnp.float32) / width)[
        None, :
    ]
    angles = positions * frequencies  # (length, width / 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[:, :width]


def relative_buckets(length, buckets, distance):
    """Rows of the table of relative positions: (length, length) int32 for queries i and keys j.

    Half of the rows are for j > i. Of each half, the first half stands for |j - i| = 0, 1, ..., the rest for ranges
    that widen up to ``distance``.

    Source: Raffel et al. 2020 (T5), section 2.1.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    # In float32, as the reference: its rounding decides which range a distance on a border falls into.
    wide = np.log(np.maximum(np.abs(relative), 1).astype(np.float32) / exact) / np.float32(
        np.log(distance / exact)
    )
    wide = np.minimum(exact + (wide * (half - exact)).astype(np.int64), half - 1)
    found = np.where(np.abs(relative) < exact, np.abs(relative), wide)
    return (found + half * (relative > 0)).astype(np.int32)


def dense_dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """``jax.lax.dot_general`` of a dense layer as a product of two matrices, all examples and tokens in one axis.

    XLA on a CPU copies an operand to another layout, as slow as the product itself, for the gradient of a kernel whose
    input has several leading axes.

    Args:
      x: (..., C...), contracted over its last axes.
      kernel: (C..., D...), contracted over its first axes.
    """
    (axes, _), _ = dimension_numbers
    leading, features = x.shape[: x.ndim - len(axes)], kernel.shape[len(axes) :]
    inputs = math.prod(kernel.shape[: len(axes)])
    y = jax.lax.dot_general(
        x.reshape(-1, inputs),
        kernel.reshape(inputs, -1),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return y.reshape(*leading, *features)


Dense = functools.partial(nn.Dense, dot_general=dense_dot_general)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=dense_dot_general)


def dot_product_attention(query, key, value, bias=None, lengths=None):
    """softmax(Q K^T / sqrt(d) + bias) V over the first ``lengths`` of the S keys, logits and softmax in float32.

    Heads stand before the tokens in all products: XLA's products on a CPU are several times slower on the layout of
    ``jax.nn.dot_product_attention``. The sum of the weights divides the output, not the (T, S) weights.

    Args:
      query: (n, T, heads, d).
      key, value: (n, S, heads, d).
      bias: what broadcasts to (n, heads, T, S), or None.
      lengths: (n,), or None for all keys. With length 0 the weights are equal.

    Returns:
      (n, T, heads, d).

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    query, key, value = (
        jnp.swapaxes(x, 1, 2) for x in (query / math.sqrt(query.shape[-1]), key, value)
    )
    logits = jnp.einsum("nhtd,nhsd->nhts", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    if lengths is not None:
        logits = jnp.where(length_mask(lengths, key.shape[2])[:, None, None], logits, -1e30)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    attended = jnp.einsum(
        "nhts,nhsd->nhtd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    attended /= jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.swapaxes(attended, 1, 2).astype(value.dtype)


class Attention(nn.Module):
    """Multi-head attention.

    Attributes:
      heads: number of heads; divides the width of the queries.
      dtype: compute type; parameters are float32.
      implementation: "xla" for ``dot_product_attention``, or "cudnn" for JAX's on a GPU (bf16 only).
    """

    heads: int
    dtype: Any = jnp.float32
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x, context, context_lengths, positions=None):
        """(n, T, W), (n, S, C), (n,) int32 or None -> (n, T, W).

        A query sees the first ``context_lengths`` of the context, or all of it. ``positions`` (heads, T, S) are added
        to the logits of each head, times a gate that depends on the query.
        """
        width = x.shape[-1]

        def heads(name, inputs):
            shape = (self.heads, width // self.heads)
            return DenseGeneral(shape, dtype=self.dtype, name=name)(inputs)

        # (n, T, heads, W / heads) x (n, S, heads, W / heads) -> (n, T, heads, W / heads)
        query, key, value = heads("query", x), heads("key", context), heads("value", context)
        bias = None if positions is None else self._gate(x) * positions.astype(self.dtype)
        if self.implementation == "cudnn":
            lengths = None if context_lengths is None else context_lengths.astype(jnp.int32)
            attended = jax.nn.dot_product_attention(
                query, key, value, bias, key_value_seq_lengths=lengths, implementation="cudnn"
            )
        else:
            attended = dot_product_attention(query, key, value, bias, context_lengths)
        return DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(attended)

    def _gate(self, x):
        """(n, T, W) -> (n, heads, T, 1), how much the relative positions of each query count.

        a (b c - 1) + 2 with a, b = sigmoid(sums of four linear maps of the head's part of x), c learnt for each head.

        Source: Chen et al. 2022 (WavLM), section III-B.
        """
        n, length, width = x.shape
        x = x.reshape(n, length, self.heads, width // self.heads)
        x = Dense(8, dtype=self.dtype, name="gate")(x).reshape(n, length, self.heads, 2, 4)
        a, b = jnp.moveaxis(nn.sigmoid(jnp.sum(x, axis=-1)), -1, 0)  # (n, T, heads) each
        scale = self.param("gate_scale", nn.initializers.ones, (self.heads,)).astype(self.dtype)
        return jnp.swapaxes(a * (b * scale - 1.0) + 2.0, 1, 2)[..., None]


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
    def __call__(self, x, lengths, keys=None, context=None, context_lengths=None, positions=None):
        """(n, T, W) tokens with (n,) lengths, optional (n, S, C) context with (n,) lengths -> (n, T, W).

        Lengths may be None where all tokens are valid. ``positions`` (heads, T, T) are relative ones of the tokens.
        """

        def attend(name, y, context, lengths, positions=None):
            return Attention(self.heads, self.dtype, self.attention, name=name)(
                y, context, lengths, positions
            )

        def mlp(y):
            y = Dense(round(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp_in")(y)
            return Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(
                ACTIVATIONS[self.style.activation](y)
            )

        attend_self = lambda y: attend("self_attention", y, y, lengths, positions)  # noqa: E731
        x = self._residual(x, "self_attention", attend_self, fold_keys(keys, Site.SELF_ATTENTION))
        if self.cross_attention:
            cross = functools.partial(
                attend, "cross_attention", context=context, lengths=context_lengths
            )
            x = self._residual(x, "cross_attention", cross, fold_keys(keys, Site.CROSS_ATTENTION))
        return self._residual(x, "mlp", mlp, fold_keys(keys, Site.MLP))

    def _residual(self, x, name, sub_layer, keys):
        """x + sub_layer(norm(x)), or norm(x + sub_layer(x))."""
        norm = nn.LayerNorm(self.style.epsilon, dtype=self.dtype, name=f"{name}_norm")
        y = sub_layer(norm(x) if self.style.pre_norm else x)
        if self.style.layer_scale:
            y = y * self.param(f"{name}_scale", nn.initializers.ones, (x.shape[-1],)).astype(
                self.dtype
            )
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
        hidden, positions = [x], None
        if self.style.position_buckets:
            shape = (self.style.position_buckets, self.heads)
            table = self.param("relative_positions", nn.initializers.normal(0.02), shape)
            rows = relative_buckets(
                x.shape[1], self.style.position_buckets, self.style.position_distance
            )
            positions = jnp.moveaxis(table[rows], -1, 0)  # (heads, T, T)
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
            y = block(
                x, lengths, fold_keys(keys, Site.BLOCK, layer), context, context_lengths, positions
            )
            if keys is not None and self.layer_drop:
                skip = jax.vmap(lambda key: jax.random.bernoulli(key, self.layer_drop))(
                    fold_keys(keys, Site.LAYER_DROP, layer)
                )
                y = jnp.where(skip[:, None, None], x, y)
            x = y
            hidden.append(x)
        if self.style.pre_norm:
            hidden[-1] = x = nn.LayerNorm(self.style.epsilon, dtype=self.dtype, name="norm")(x)
        return (x, tuple(hidden)) if layers else x
