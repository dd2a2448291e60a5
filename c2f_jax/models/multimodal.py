"""The multimodal encoder: speech tokens attend to each other and to image tokens.

Two things are the same in all pairs of an item: what the first self-attention makes of a recording,
and the keys and values of an image. Where many pairs are matched, they are computed once for each
item: ``prepare_speech`` and ``prepare_image``, then ``match_prepared`` for each pair.
"""

from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from c2f_jax.models.encoder import PooledEncoder
from c2f_jax.models.layers import (
    Attention,
    Dense,
    DenseGeneral,
    attention_of,
    attention_weights,
    dropout,
)
from c2f_jax.objectives.keys import Site, fold_keys

KeysValues = tuple[jax.Array, jax.Array]  # (n, P, heads, W / heads) each


class CrossAttention(nn.Module):
    """Multi-head attention to keys and values that are computed apart.

    Attributes:
      width: W, of the queries.
      heads: number of heads.
      dtype: compute type.
      attention: attention implementation.
    """

    width: int
    heads: int
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"

    def setup(self) -> None:
        """Create the projections."""
        shape = self.heads, self.width // self.heads
        self.query = DenseGeneral(shape, dtype=self.dtype)
        self.key = DenseGeneral(shape, dtype=self.dtype)
        self.value = DenseGeneral(shape, dtype=self.dtype)
        self.out = DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype)

    def read(self, context: jax.Array) -> KeysValues:
        """Return the keys and values of a context (n, P, W)."""
        return self.key(context), self.value(context)

    def __call__(
        self, x: jax.Array, keys_values: KeysValues, lengths: jax.Array | None
    ) -> jax.Array:
        """Attend from x (n, T, W) to what ``read`` returned, ``lengths`` (n,) of it."""
        query, (key, value) = self.query(x), keys_values
        attended = attention_of(self.attention)(query, key, value, None, lengths)
        # Only for those who ask for them: the normal pass does not compute them.
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", attention_weights(query, key, None, lengths))
        return self.out(attended)


class MultimodalBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each x + f(norm(x)).

    Attributes:
      width: W of the tokens.
      heads: attention heads.
      mlp_ratio: hidden width of the MLP over W.
      dropout_rate: rate after each sub-layer.
      dtype: compute type.
      attention: attention implementation.
    """

    width: int
    heads: int
    mlp_ratio: float
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"

    def setup(self) -> None:
        """Create the sub-layers."""
        self.self_attention_norm = nn.LayerNorm(1e-6, dtype=self.dtype)
        self.self_attention = Attention(self.heads, self.dtype, self.attention)
        self.cross_attention_norm = nn.LayerNorm(1e-6, dtype=self.dtype)
        self.cross_attention = CrossAttention(self.width, self.heads, self.dtype, self.attention)
        self.mlp_norm = nn.LayerNorm(1e-6, dtype=self.dtype)
        self.mlp_in = Dense(round(self.width * self.mlp_ratio), dtype=self.dtype)
        self.mlp_out = Dense(self.width, dtype=self.dtype)

    def attend_self(
        self,
        x: jax.Array,
        lengths: jax.Array | None,
        keys: jax.Array | None = None,
        first_only: bool = False,
    ) -> jax.Array:
        """Let tokens attend to each other.

        Args:
          x: (n, T, W).
          lengths: (n,) valid ones.
          keys: (n,) typed keys for dropout.
          first_only: whether the result is of the first token alone.

        Returns:
          (n, T, W), or (n, 1, W).
        """
        context = self.self_attention_norm(x)
        query = context
        if first_only:
            x, query = x[:, :1], context[:, :1]
        y = self.self_attention(query, context, lengths)
        return x + dropout(y, self.dropout_rate, fold_keys(keys, Site.SELF_ATTENTION))

    def attend_image(
        self,
        x: jax.Array,
        keys_values: KeysValues,
        image_lengths: jax.Array,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Let tokens attend to an image, then run the MLP.

        Args:
          x: (n, T, W), or (n, 1, W).
          keys_values: those of the image, (n, P, heads, W / heads) each.
          image_lengths: (n,) valid image tokens.
          keys: (n,) typed keys for dropout.

        Returns:
          The shape of x.
        """
        y = self.cross_attention(self.cross_attention_norm(x), keys_values, image_lengths)
        x = x + dropout(y, self.dropout_rate, fold_keys(keys, Site.CROSS_ATTENTION))
        y = self.mlp_out(nn.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + dropout(y, self.dropout_rate, fold_keys(keys, Site.MLP))

    def read_image(self, image: jax.Array) -> KeysValues:
        """Return the keys and values of image tokens (n, P, W)."""
        return self.cross_attention.read(image)

    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array,
        image: jax.Array,
        image_lengths: jax.Array,
        keys: jax.Array | None = None,
        first_only: bool = False,
    ) -> jax.Array:
        """Run the block on tokens (n, T, W) and image tokens (n, P, W); see ``attend_self``."""
        x = self.attend_self(x, lengths, keys, first_only)
        return self.attend_image(x, self.read_image(image), image_lengths, keys)


class MultimodalTransformer(nn.Module):
    """A stack of blocks and a final layer norm.

    Attributes:
      depth: number of blocks.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      options: the other attributes of each block.
    """

    depth: int
    remat: bool
    options: dict

    def setup(self) -> None:
        """Create the blocks."""
        # Arguments are counted from self: first_only is the seventh.
        block = nn.remat(MultimodalBlock, static_argnums=(6,)) if self.remat else MultimodalBlock
        self.block = [block(**self.options) for _ in range(self.depth)]
        self.norm = nn.LayerNorm(1e-6, dtype=self.options["dtype"])

    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array,
        image: jax.Array,
        image_lengths: jax.Array,
        keys: jax.Array | None,
        first_only: bool,
    ) -> jax.Array:
        """Run the stack; see ``MultimodalBlock``. The last block may keep the first token alone."""
        rest = list(enumerate(self.block))
        if self.remat and keys is not None and not self.is_initializing() and self.depth > 2:
            # In training, equal blocks are one loop: less to compile, and less memory on a TPU.
            x = self._loop(x, lengths, image, image_lengths, keys)
            rest = rest[-1:]
        for layer, block in rest:
            last = first_only and layer == self.depth - 1
            x = block(x, lengths, image, image_lengths, fold_keys(keys, Site.BLOCK, layer), last)
        return self.norm(x)

    def _loop(
        self,
        x: jax.Array,
        lengths: jax.Array,
        image: jax.Array,
        image_lengths: jax.Array,
        keys: jax.Array,
    ) -> jax.Array:
        """Run all blocks but the last."""
        count = self.depth - 1
        params = [self.variables["params"][f"block_{layer}"] for layer in range(count)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        block = MultimodalBlock(**self.options, parent=None)

        @jax.checkpoint
        def step(x: jax.Array, one: tuple[Any, Any]) -> tuple[jax.Array, None]:
            params, layer = one
            of_block = fold_keys(keys, Site.BLOCK, layer)
            y: Any = block.apply({"params": params}, x, lengths, image, image_lengths, of_block)
            return y, None

        return jax.lax.scan(step, x, (stacked, jnp.arange(count)))[0]

    def prepare_speech(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Run what comes before the first attention to an image: (n, T, W) -> (n, T, W)."""
        return self.block[0].attend_self(x, lengths) if self.depth else x

    def prepare_image(self, image: jax.Array) -> jax.Array:
        """Return the keys and values of all blocks: (n, P, W) -> (n, P, 2 depth W)."""
        parts = [part for block in self.block for part in block.read_image(image)]
        parts = [part.reshape(*image.shape[:2], -1) for part in parts]
        return jnp.concatenate(parts, axis=-1) if parts else image[..., :0]

    def match_prepared(
        self,
        x: jax.Array,
        lengths: jax.Array,
        image: jax.Array,
        image_lengths: jax.Array,
        first_only: bool,
    ) -> jax.Array:
        """Run the rest of the stack on what was prepared."""
        heads = self.options["heads"]
        n, tokens, _ = image.shape
        parts = image.reshape(n, tokens, self.depth, 2, heads, -1) if self.depth else None
        for layer, block in enumerate(self.block):
            last = first_only and layer == self.depth - 1
            if layer:
                x = block.attend_self(x, lengths, first_only=last)
            elif last:
                x = x[:, :1]
            assert parts is not None
            x = block.attend_image(x, (parts[:, :, layer, 0], parts[:, :, layer, 1]), image_lengths)
        return self.norm(x)


class MultimodalEncoder(PooledEncoder):
    """Cross-attention transformer with the SIM head Linear(2) on its first token.

    Attributes:
      width: W inside; tokens of other widths are projected.
      depth: number of blocks.
      mlp_ratio: hidden width of each MLP over W.

    Reference:
      C2F, multimodal encoder; Li et al. 2021 (ALBEF), section 3.1.
    """

    depth: int = field(default=2, metadata={"min": 0})
    mlp_ratio: float = field(default=2.0, metadata={"above": 0})

    def setup(self) -> None:
        """Create the parts."""
        self.speech_input = Dense(self.width, dtype=self.dtype)
        self.image_input = Dense(self.width, dtype=self.dtype)
        options = {
            "width": self.width,
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "dropout_rate": self.dropout_rate,
            "dtype": self.dtype,
            "attention": self.attention,
        }
        self.transformer = MultimodalTransformer(self.depth, self.remat, options)
        self.match_head = Dense(2)

    def __call__(
        self,
        speech_tokens: jax.Array,
        speech_lengths: jax.Array,
        image_tokens: jax.Array,
        image_lengths: jax.Array,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Match n pairs.

        Args:
          speech_tokens: (n, T, Ws).
          speech_lengths: (n,) valid tokens.
          image_tokens: (n, P, Wi).
          image_lengths: (n,) valid tokens.
          keys: (n,) typed keys for dropout.

        Returns:
          Logits (n, 2) float32: "no match", "match".
        """
        # (n, T, Ws) . (Ws, W) -> (n, T, W) and (n, P, Wi) . (Wi, W) -> (n, P, W)
        x, image = self.speech_input(speech_tokens), self.image_input(image_tokens)
        x = self.transformer(x, speech_lengths, image, image_lengths, keys, self._first_only)
        return self._classified(x, speech_lengths)

    def prepare_speech(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Compute what all pairs of a recording share.

        Args:
          tokens: (n, T, Ws).
          lengths: (n,) valid tokens.

        Returns:
          (n, T, W), for ``match_prepared``.
        """
        return self.transformer.prepare_speech(self.speech_input(tokens), lengths)

    def prepare_image(self, tokens: jax.Array) -> jax.Array:
        """Compute what all pairs of an image share: its keys and values in each block.

        Args:
          tokens: (n, P, Wi).

        Returns:
          (n, P, 2 depth W), for ``match_prepared``.
        """
        return self.transformer.prepare_image(self.image_input(tokens))

    def match_prepared(
        self,
        speech: jax.Array,
        speech_lengths: jax.Array,
        image: jax.Array,
        image_lengths: jax.Array,
    ) -> jax.Array:
        """Match n pairs whose sides are prepared.

        Args:
          speech: (n, T, W), rows of ``prepare_speech``.
          speech_lengths: (n,) valid tokens.
          image: (n, P, 2 depth W), rows of ``prepare_image``.
          image_lengths: (n,) valid tokens.

        Returns:
          Logits (n, 2), those of ``__call__`` up to rounding.
        """
        x = self.transformer.match_prepared(
            speech, speech_lengths, image, image_lengths, self._first_only
        )
        return self._classified(x, speech_lengths)

    @property
    def _first_only(self) -> bool:
        """Whether the last block is needed for the first token alone."""
        # Those who look into the attention want that of every token.
        return self.pooling == "cls" and not self.is_mutable_collection("intermediates")

    def _classified(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        first = self._pooled(x, lengths)[:, 0].astype(jnp.float32)
        # (n, W) . (W, 2) -> (n, 2)
        return self.match_head(first)
