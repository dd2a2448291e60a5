"""Transformer layers with explicit lengths and per-example dropout keys, for all encoders."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from c2f_jax.objectives.keys import Site, fold_keys

ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": nn.gelu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class BlockStyle:
    """What differs from one published transformer to another; the defaults are the light encoders'.

    Attributes:
      pre_norm: norms before each sub-layer and one at the end of the stack (GPT-2, ViT); False for
        norms after each residual sum and none at the end (BERT, HuBERT base).
      activation: in the MLP: "gelu_tanh" (approximate), "gelu" or "quick_gelu" (x sigmoid(1.702 x),
        CLIP).
      epsilon: epsilon of the layer norms.
      layer_scale: a learned scale of each sub-layer's output (DINOv2).
      cross_every: 1 for cross-attention in every block, 2 for every second one from the first on
        (Q-Former).
      position_buckets: rows of the table of relative positions, shared by all blocks and gated in
        each (WavLM); 0 for none.
      position_distance: distance beyond which all positions share a row.
    """

    pre_norm: bool = True
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    layer_scale: bool = False
    cross_every: int = 1
    position_buckets: int = 0
    position_distance: int = 800


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Drop entries, with a mask for each example that depends on that example's key alone.

    Masks drawn for a whole device batch would change with the number of devices; these do not.

    Args:
      x: (n, ...).
      rate: probability of zeroing an entry; the others are divided by 1 - rate.
      keys: (n,) typed keys, or None for no dropout.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def span_mask(
    keys: jax.Array,
    size: int,
    probability: float,
    length: int,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Draw spans as SpecAugment does, which cover each place with about ``probability``.

    A span starts at each valid place with probability ``probability / length``. The draws follow
    from each example's key alone, so that they do not depend on the number of devices.

    Args:
      keys: (n,) typed keys.
      size: T, number of places.
      probability: expected share of masked places, where spans overlap counted twice.
      length: length of a span.
      valid: (n, T) bool, where spans may start; None for everywhere.

    Returns:
      (n, T) bool.
    """
    starts = jax.vmap(lambda key: jax.random.bernoulli(key, probability / length, (size,)))(keys)
    if valid is not None:
        starts = starts & valid
    started = jnp.cumsum(starts, axis=1)
    # A span that began `length` or more places ago has ended.
    over = jnp.pad(started, ((0, 0), (length, 0)))[:, :size]
    return started > over


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """Return True at positions below the length: (n,) -> (n, size) bool."""
    return jnp.arange(size)[None, :] < lengths[:, None]


def sinusoidal_positions(length: int, width: int) -> jax.Array:
    """Return fixed sine and cosine position embeddings, (length, width).

    Reference:
      Vaswani et al. 2017, section 3.5.
    """
    # Wavelengths grow geometrically from 2 pi to 10,000 2 pi.
    positions = jnp.arange(length, dtype=jnp.float32)[:, None]
    evens = jnp.arange(0, width, 2, dtype=jnp.float32)
    frequencies = jnp.exp(-jnp.log(10_000.0) * evens / width)[None, :]
    angles = positions * frequencies  # (length, width / 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[:, :width]


def relative_buckets(length: int, buckets: int, distance: int) -> np.ndarray:
    """Return the row of the table of relative positions for each query i and key j.

    Half of the rows are for j > i. In each half, the first half is for |j - i| = 0, 1, ..., the
    rest for ranges that widen up to ``distance``.

    Args:
      length: T.
      buckets: rows of the table.
      distance: distance from which all positions share a row.

    Returns:
      (T, T) int32.

    Reference:
      Raffel et al. 2020 (T5), section 2.1.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    # In float32, as the reference: its rounding decides which range a distance on a border is in.
    wide = np.log(np.maximum(np.abs(relative), 1).astype(np.float32) / exact) / np.float32(
        np.log(distance / exact)
    )
    wide = np.minimum(exact + (wide * (half - exact)).astype(np.int64), half - 1)
    found = np.where(np.abs(relative) < exact, np.abs(relative), wide)
    return (found + half * (relative > 0)).astype(np.int32)


def dense_dot_general(
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Compute a dense layer as a product of two matrices, all examples and tokens in one axis.

    Takes the place of ``jax.lax.dot_general``. XLA on a CPU copies an operand to another layout, as
    slow as the product itself, for the gradient of a kernel whose input has several leading axes.

    Args:
      x: (..., C...), contracted over its last axes.
      kernel: (C..., D...), contracted over its first axes.
      dimension_numbers: the contracted axes, as ``jax.lax.dot_general`` takes them; no batch axes.
      precision: as in ``jax.lax.dot_general``.
      preferred_element_type: as in ``jax.lax.dot_general``.

    Returns:
      (..., D...).
    """
    # The kernel is contracted over its first axes, in their order; Flax's dense layers ask for no
    # other contraction.
    (axes, _), _ = dimension_numbers
    leading, features = x.shape[: x.ndim - len(axes)], kernel.shape[len(axes) :]
    inputs = math.prod(kernel.shape[: len(axes)])
    # (N, C) . (C, D) -> (N, D)
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


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Compute softmax(Q K^T / sqrt(d) + bias) V, logits and softmax in float32.

    Heads come before the tokens in all products: XLA's products on a CPU are several times slower
    on the layout of ``jax.nn.dot_product_attention``. The sum of the weights divides the output,
    not the (T, S) weights.

    Args:
      query: (n, T, heads, d).
      key: (n, S, heads, d).
      value: (n, S, heads, d).
      bias: what broadcasts to (n, heads, T, S), or None.
      lengths: (n,) keys that are attended to, or None for all. With length 0 the weights are equal.

    Returns:
      (n, T, heads, d).

    Reference:
      Vaswani et al. 2017, section 3.2.1.
    """
    logits = _attention_logits(query, key, bias, lengths)
    value = jnp.swapaxes(value, 1, 2)
    # The softmax does not depend on the subtracted maximum, so its gradient is left out.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))

    # (n, h, T, S) . (n, h, S, d) -> (n, h, T, d)
    attended = jnp.einsum(
        "nhts,nhsd->nhtd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    attended /= jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.swapaxes(attended, 1, 2).astype(value.dtype)


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Compute softmax(Q K^T / sqrt(d) + bias), the weights of ``dot_product_attention``.

    Args:
      query: (n, T, heads, d).
      key: (n, S, heads, d).
      bias: what broadcasts to (n, heads, T, S), or None.
      lengths: (n,) keys that are attended to, or None for all.

    Returns:
      (n, heads, T, S) float32; each row adds up to 1.
    """
    return jax.nn.softmax(_attention_logits(query, key, bias, lengths), axis=-1)


def _attention_logits(
    query: jax.Array, key: jax.Array, bias: jax.Array | None, lengths: jax.Array | None
) -> jax.Array:
    """Return Q K^T / sqrt(d) + bias, (n, heads, T, S) float32, as ``dot_product_attention``."""
    query = jnp.swapaxes(query / math.sqrt(query.shape[-1]), 1, 2)
    key = jnp.swapaxes(key, 1, 2)

    # (n, h, T, d) . (n, h, S, d) -> (n, h, T, S)
    logits = jnp.einsum("nhtd,nhsd->nhts", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    # A large finite number, not -inf: with length 0 the difference of the logits is 0, not nan.
    if lengths is not None:
        logits = jnp.where(length_mask(lengths, key.shape[2])[:, None, None], logits, -1e30)
    return logits


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Compute what ``dot_product_attention`` does with cuDNN's kernels, on a GPU, in bfloat16.

    JAX refuses their gradient for an odd number of tokens: there a token of zeros is added at the
    end, whose output is cut off, and which no query attends to.

    Args:
      query: (n, T, heads, d), d a multiple of 8.
      key: (n, S, heads, d).
      value: (n, S, heads, d).
      bias: what broadcasts to (n, heads, T, S), or None.
      lengths: (n,) keys that are attended to, from 1, or None for all.

    Returns:
      (n, T, heads, d).
    """
    (n, queries), keys = query.shape[:2], key.shape[1]
    of_queries, of_keys = (0, queries % 2), (0, keys % 2)
    if of_keys[1] and lengths is None:
        lengths = jnp.full(n, keys)
    query = jnp.pad(query, ((0, 0), of_queries, (0, 0), (0, 0)))
    key, value = (jnp.pad(x, ((0, 0), of_keys, (0, 0), (0, 0))) for x in (key, value))
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], queries, keys))
        bias = jnp.pad(bias, ((0, 0), (0, 0), of_queries, of_keys))
    attended = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        # cuDNN needs the lengths as int32, and masks by them itself.
        key_value_seq_lengths=None if lengths is None else lengths.astype(jnp.int32),
        implementation="cudnn",
    )
    return attended[:, :queries]


def attention_of(implementation: str) -> Callable[..., jax.Array]:
    """Return ``dot_product_attention`` for "xla", or ``cudnn_attention`` for "cudnn"."""
    return {"xla": dot_product_attention, "cudnn": cudnn_attention}[implementation]


class Attention(nn.Module):
    """Multi-head attention.

    Attributes:
      heads: number of heads; divides the width of the queries.
      dtype: compute type; parameters are float32.
      implementation: "xla" for ``dot_product_attention``, or "cudnn" for ``cudnn_attention`` (a
        GPU, and bfloat16).
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        context_lengths: jax.Array | None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Attend from x to the context.

        Args:
          x: (n, T, W).
          context: (n, S, C).
          context_lengths: (n,) int32, how much of the context is attended to; None for all.
          positions: (heads, T, S), added to the logits of each head, times a gate that depends on
            the query.

        Returns:
          (n, T, W).
        """
        width = x.shape[-1]
        projection = functools.partial(
            DenseGeneral, (self.heads, width // self.heads), dtype=self.dtype
        )

        # (n, T, W) . (W, heads, W / heads) -> (n, T, heads, W / heads)
        query = projection(name="query")(x)
        # (n, S, C) . (C, heads, W / heads) -> (n, S, heads, W / heads)
        key, value = projection(name="key")(context), projection(name="value")(context)
        bias = None if positions is None else self._gate(x) * positions.astype(self.dtype)

        attended = attention_of(self.implementation)(query, key, value, bias, context_lengths)
        # Only for those who ask for them: the normal pass does not compute them.
        if self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, key, bias, context_lengths)
            self.sow("intermediates", "weights", weights)

        # (n, T, heads, W / heads) . (heads, W / heads, W) -> (n, T, W)
        return DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(attended)

    def _gate(self, x: jax.Array) -> jax.Array:
        """Return the weight of each query's relative positions: (n, T, W) -> (n, heads, T, 1).

        a (b c - 1) + 2 with a, b = sigmoid(sums of four linear maps of the head's part of x) and a
        learned c for each head.

        Reference:
          Chen et al. 2022 (WavLM), section III-B.
        """
        n, length, width = x.shape
        x = x.reshape(n, length, self.heads, width // self.heads)
        # (n, T, heads, W / heads) . (W / heads, 8) -> (n, T, heads, 8)
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
      style: where the norms are, activation and so on.
      dtype: compute type.
      attention: attention implementation.
    """

    heads: int
    mlp_ratio: float = 4.0
    cross_attention: bool = False
    dropout_rate: float = 0.0
    style: BlockStyle = BlockStyle()
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array | None,
        keys: jax.Array | None = None,
        context: jax.Array | None = None,
        context_lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Run the block.

        Args:
          x: (n, T, W) tokens.
          lengths: (n,) valid ones; None for all.
          keys: (n,) typed keys for dropout.
          context: (n, S, C), for cross-attention.
          context_lengths: (n,) valid ones; None for all.
          positions: (heads, T, T), relative ones of the tokens.

        Returns:
          (n, T, W).
        """

        def attend_self(y: jax.Array) -> jax.Array:
            attention = Attention(self.heads, self.dtype, self.attention, name="self_attention")
            return attention(y, y, lengths, positions)

        def attend_context(y: jax.Array) -> jax.Array:
            assert context is not None, "cross-attention needs a context"
            attention = Attention(self.heads, self.dtype, self.attention, name="cross_attention")
            return attention(y, context, context_lengths)

        def mlp(y: jax.Array) -> jax.Array:
            width = x.shape[-1]
            hidden = round(width * self.mlp_ratio)
            # (n, T, W) . (W, H) -> (n, T, H)
            y = Dense(hidden, dtype=self.dtype, name="mlp_in")(y)
            y = ACTIVATIONS[self.style.activation](y)
            # (n, T, H) . (H, W) -> (n, T, W)
            return Dense(width, dtype=self.dtype, name="mlp_out")(y)

        x = self._residual(x, "self_attention", attend_self, fold_keys(keys, Site.SELF_ATTENTION))
        if self.cross_attention:
            x = self._residual(
                x, "cross_attention", attend_context, fold_keys(keys, Site.CROSS_ATTENTION)
            )
        return self._residual(x, "mlp", mlp, fold_keys(keys, Site.MLP))

    def _residual(
        self,
        x: jax.Array,
        name: str,
        sub_layer: Callable[[jax.Array], jax.Array],
        keys: jax.Array | None,
    ) -> jax.Array:
        """Return x + sub_layer(norm(x)), or norm(x + sub_layer(x))."""
        norm = nn.LayerNorm(self.style.epsilon, dtype=self.dtype, name=f"{name}_norm")
        # Pre-norm leaves the sum of all sub-layers unnormalized; post-norm normalizes each sum.
        y = sub_layer(norm(x) if self.style.pre_norm else x)
        if self.style.layer_scale:
            scale = self.param(f"{name}_scale", nn.initializers.ones, (x.shape[-1],))
            y = y * scale.astype(self.dtype)
        x = x + dropout(y, self.dropout_rate, keys)
        return x if self.style.pre_norm else norm(x)


class Transformer(nn.Module):
    """A stack of blocks and, with norms before the sub-layers, a final layer norm.

    Attributes:
      depth: number of blocks.
      heads: attention heads.
      mlp_ratio: hidden width of the MLP over W.
      cross_attention: whether a context is attended to.
      dropout_rate: rate after each sub-layer.
      style: where the norms are, activation and so on.
      layer_drop: probability that an example skips a block in training (Fan et al. 2019).
      dtype: compute type.
      attention: attention implementation.
      remat: recompute each block's activations in the backward pass instead of keeping them. In a
        training pass equal blocks then are one loop, which is compiled once for all of them.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    cross_attention: bool = False
    dropout_rate: float = 0.0
    style: BlockStyle = BlockStyle()
    layer_drop: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array | None,
        keys: jax.Array | None = None,
        context: jax.Array | None = None,
        context_lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Run the stack; arguments as in ``TransformerBlock``.

        Returns:
          (n, T, W) tokens, and the depth + 1 hidden states: the input, the output of each block but
          the last, and the tokens.
        """
        positions = self._relative_positions(x.shape[1])

        def run_block(block: Callable[..., jax.Array], x: jax.Array, layer: Any) -> jax.Array:
            block_keys = fold_keys(keys, Site.BLOCK, layer)
            y = block(x, lengths, block_keys, context, context_lengths, positions)
            if keys is None or not self.layer_drop:
                return y
            # An example that skips the block keeps its tokens; all run it, since shapes are fixed.
            skip = jax.vmap(lambda key: jax.random.bernoulli(key, self.layer_drop))(
                fold_keys(keys, Site.LAYER_DROP, layer)
            )
            return jnp.where(skip[:, None, None], x, y)

        if self._can_loop(keys):
            hidden = self._run_loop(run_block, x)
        else:
            block_type = nn.remat(TransformerBlock) if self.remat else TransformerBlock
            hidden = [x]
            for layer in range(self.depth):
                block = block_type(**self._block_options(layer), name=f"block_{layer}")
                hidden.append(run_block(block, hidden[-1], layer))

        # The last hidden state is the output, as in transformers.
        if self.style.pre_norm:
            norm = nn.LayerNorm(self.style.epsilon, dtype=self.dtype, name="norm")
            hidden[-1] = norm(hidden[-1])
        return hidden[-1], tuple(hidden)

    def _block_options(self, layer: int) -> dict[str, Any]:
        return {
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "cross_attention": self.cross_attention and layer % self.style.cross_every == 0,
            "dropout_rate": self.dropout_rate,
            "style": self.style,
            "dtype": self.dtype,
            "attention": self.attention,
        }

    def _can_loop(self, keys: jax.Array | None) -> bool:
        """Whether the blocks are alike, and to be differentiated.

        Other passes are not looped: a frozen network is in the online and in the momentum pass,
        and XLA computes it once, but not two equal loops.
        """
        is_trained = keys is not None and not self.is_initializing()
        return self.remat and not self.cross_attention and is_trained and self.depth > 1

    def _run_loop(self, run_block: Callable, x: jax.Array) -> list[jax.Array]:
        """Return the depth + 1 hidden states of a loop over the stacked parameters."""
        params = [self.variables["params"][f"block_{layer}"] for layer in range(self.depth)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        block = TransformerBlock(**self._block_options(0), parent=None)

        @jax.checkpoint
        def step(x: jax.Array, one: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
            params, layer = one
            y = run_block(functools.partial(block.apply, {"params": params}), x, layer)
            return y, y

        _, outputs = jax.lax.scan(step, x, (stacked, jnp.arange(self.depth)))
        return [x, *outputs]

    def _relative_positions(self, length: int) -> jax.Array | None:
        """Return the biases of relative positions, (heads, T, T), or None."""
        if not self.style.position_buckets:
            return None
        shape = (self.style.position_buckets, self.heads)
        table = self.param("relative_positions", nn.initializers.normal(0.02), shape)
        # (T, T) rows of the table (buckets, heads) -> (T, T, heads) -> (heads, T, T)
        rows = relative_buckets(length, shape[0], self.style.position_distance)
        return jnp.moveaxis(table[rows], -1, 0)
