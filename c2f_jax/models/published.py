"""A published network as an encoder: its tokens under a small transformer.

A frozen network may also have run before: given its tokens from the feature cache, the encoder
leaves it out.
"""

from dataclasses import field

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from c2f_jax.errors import UserError
from c2f_jax.models.encoder import BranchedEncoder, mean_token, prepend_cls
from c2f_jax.models.layers import (
    Dense,
    dropout,
    length_mask,
    sinusoidal_positions,
    span_mask,
)
from c2f_jax.objectives.keys import Site, fold_keys


def choose_layer(hidden: tuple[jax.Array, ...], layer: str) -> jax.Array:
    """Return one of a network's hidden states.

    Args:
      hidden: the states.
      layer: number of a state, or "last".

    Raises:
      UserError: there is no such layer.
    """
    if layer == "last":
        return hidden[-1]
    try:
        return hidden[int(layer)]
    except (ValueError, IndexError):
        raise UserError(
            f"layer={layer!r}: must be last, weighted_sum or a number below {len(hidden)} "
            "(0 is the input of the first block)"
        ) from None


def pool_tokens(tokens: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Return means over ``size`` consecutive valid tokens.

    Args:
      tokens: (n, T, W).
      lengths: (n,) valid tokens.
      size: tokens per mean.

    Returns:
      (n, ceil(T / size), W), and the lengths, ceil(lengths / size).
    """
    if size == 1:
        return tokens, lengths
    # Padded to whole groups; the padding is not valid and is counted in no mean.
    n, length, width = tokens.shape
    padding = -length % size
    valid = length_mask(lengths, length + padding).reshape(n, -1, size, 1)
    x = jnp.pad(tokens, ((0, 0), (0, padding), (0, 0))).reshape(n, -1, size, width)

    total = jnp.sum(jnp.where(valid, x, 0), axis=2)
    count = jnp.maximum(jnp.sum(valid, axis=2), 1).astype(x.dtype)
    return total / count, (lengths + size - 1) // size


class TimeConvolutions(nn.Module):
    """Residual convolutions over five tokens, each followed by means over two tokens.

    x + gelu(conv(layer_norm(x))). Small transformers trained from scratch learn words faster with
    them, as vision transformers learn shapes.

    Attributes:
      blocks: number of convolutions; a token then stands for 2^blocks.
      dropout_rate: of the convolutions' outputs.
      dtype: compute type.

    Reference:
      Xiao et al. 2021 ("Early Convolutions Help Transformers See Better"); He et al. 2016.
    """

    blocks: int
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(n, T, W) tokens, (n,) valid ones -> (n, ceil(T / 2^blocks), W), (n,)."""
        for block in range(self.blocks):
            # Zeros beyond the length, as beyond the array: a row does not depend on the padding.
            valid = length_mask(lengths, x.shape[1])[..., None]
            y = jnp.where(valid, nn.LayerNorm(dtype=self.dtype, name=f"norm_{block}")(x), 0)
            y = nn.gelu(nn.Conv(x.shape[-1], (5,), dtype=self.dtype, name=f"conv_{block}")(y))
            x = x + dropout(y, self.dropout_rate, fold_keys(keys, Site.CONVOLUTION, block))
            x, lengths = pool_tokens(x, lengths, 2)
        return x, lengths


class PublishedEncoder(BranchedEncoder):
    """What ``PublishedSpeech`` and ``PublishedImage`` share.

    Attributes:
      tower: the published network; None for tokens of another tool, which are read from a feature
        cache.
      frozen: "tower" keeps the published weights: they get no gradient, optimizer state, momentum
        copy or dropout. "conv" keeps the convolutions of a speech network only, "none" nothing.
      layer: "last", the number of a hidden state (0 is the input of the first block), or
        "weighted_sum", a learned softmax-weighted sum of all hidden states, equal at the start.
      pool: tokens are means over this many consecutive ones.
      width: W of the tokens; those of the network are normalized and projected to it.
      depth: number of blocks of the small transformer with its learned [CLS]. With depth 0 there is
        neither: tokens are the network's, summary first: its [CLS] if it has one and ``pooling``
        is "cls", else the mean of all.
      token_dropout: share of the entries of the network's tokens that are set to 0 in training.
      token_mask: share of the tokens that are set to 0 as a whole in training, as if a part of the
        sentence or of the image were missing.
    """

    tower: nn.Module | None = None
    frozen: str = field(default="tower", metadata={"choices": ("tower", "none")})
    layer: str = "last"
    pool: int = field(default=1, metadata={"min": 1})
    width: int = field(default=256, metadata={"min": 1})
    depth: int = field(default=2, metadata={"min": 0})
    token_dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})
    token_mask: float = field(default=0.0, metadata={"min": 0, "below": 1})

    def _features(
        self, keys: jax.Array | None, given: jax.Array, *lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the tokens of the network or of the cache.

        Args:
          keys: (n,) typed keys for dropout.
          given: waveforms, images or tokens.
          *lengths: (n,) of speech; images have none.

        Returns:
          (n, T, C) tokens and (n,) int32 lengths.
        """
        # Tokens of the cache: the network ran before, with dropout off.
        hidden: tuple[jax.Array, ...] | None
        if not self._is_raw(given):
            token_lengths = lengths[0] if lengths else _full_lengths(given)
            tokens, hidden = given, None
            if given.ndim == 4:  # (n, T, layers, C)
                hidden = tuple(jnp.moveaxis(given, 2, 0))
                tokens = hidden[-1]
        elif self.tower is None:
            raise UserError(
                "this model reads tokens from a feature cache; it has no network to make them with"
            )
        # A frozen network runs as in evaluation, without dropout.
        else:
            tower_keys = None if self.frozen == "tower" else fold_keys(keys, Site.TOWER)
            tokens, token_lengths, hidden = self.tower(given, *lengths, tower_keys)

        if self.layer == "weighted_sum":
            tokens = self._weighted_sum(hidden)
        # A cache without a layer axis already holds this layer.
        elif self.layer != "last" and hidden is not None:
            tokens = choose_layer(hidden, self.layer)
        return tokens.astype(self.dtype), token_lengths

    def _weighted_sum(self, hidden: tuple[jax.Array, ...] | None) -> jax.Array:
        """Return sum_l softmax(w)_l hidden_l with learned w: (n, T, C)."""
        if hidden is None:
            raise UserError(
                "layer='weighted_sum' needs the features of all layers: c2f features --layer=all"
            )
        logits = self.param("layer_weights", nn.initializers.zeros, (len(hidden),))
        weights = jax.nn.softmax(logits)
        return sum(weight * state for weight, state in zip(weights, hidden, strict=True))

    def _is_raw(self, given: jax.Array) -> bool:
        """Whether the input is for the network, not its tokens."""
        raise NotImplementedError

    def _convolved(
        self, x: jax.Array, lengths: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Run what is between projection and transformer: nothing, except for speech."""
        return x, lengths

    def _head(
        self, tokens: jax.Array, lengths: jax.Array, keys: jax.Array | None, positions: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Run the small transformer.

        Args:
          tokens: (n, T, C) of the network.
          lengths: (n,) valid ones.
          keys: (n,) typed keys for dropout.
          positions: whether position embeddings are added.

        Returns:
          (n, T', M W) tokens, the summary first, and (n,) lengths.
        """
        tokens, lengths = pool_tokens(tokens, lengths, self.pool)
        if not self.depth:
            if self.tower is not None and self.tower.summary == "first":
                return self._pooled(tokens, lengths), lengths
            return jnp.concatenate([mean_token(tokens, lengths), tokens], axis=1), lengths + 1

        # Networks differ in the scale of their tokens; the norm removes it.
        x = nn.LayerNorm(dtype=self.dtype, name="input_norm")(tokens)
        x = dropout(x, self.token_dropout, fold_keys(keys, Site.TOKEN_DROPOUT))
        if keys is not None and self.token_mask:
            masked = span_mask(fold_keys(keys, Site.TOKEN_MASK), x.shape[1], self.token_mask, 1)
            x = jnp.where(masked[..., None], 0, x)
        # (n, T, C) . (C, W) -> (n, T, W)
        x = Dense(self.width, dtype=self.dtype, name="input")(x)

        x, lengths = self._convolved(x, lengths, fold_keys(keys, Site.CONVOLUTIONS))
        if positions:
            x = x + sinusoidal_positions(x.shape[1], self.width).astype(self.dtype)
        x = prepend_cls(self, dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT)))
        lengths = lengths + 1
        return self._encode(x, lengths, keys), lengths


class PublishedSpeech(PublishedEncoder):
    """A published speech network as an encoder.

    Attributes:
      conv_blocks: convolutions of ``TimeConvolutions`` before the transformer. With ``pool`` 4 and
        two blocks, Whisper's tokens of 20 ms become tokens of 320 ms, about a word.
    """

    frozen: str = field(default="tower", metadata={"choices": ("tower", "none", "conv")})
    conv_blocks: int = field(default=0, metadata={"min": 0})

    def _is_raw(self, given: jax.Array) -> bool:
        return given.ndim == 2

    def _convolved(
        self, x: jax.Array, lengths: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        return TimeConvolutions(self.conv_blocks, self.dropout_rate, self.dtype, name="conv")(
            x, lengths, keys
        )

    @nn.compact
    def __call__(
        self, speech: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encode recordings.

        Args:
          speech: waveforms (n, S), or cached tokens (n, T, C) or (n, T, layers, C).
          lengths: (n,) valid samples or tokens.
          keys: (n,) typed keys for dropout.

        Returns:
          Tokens (n, T', M W), the summary first, and (n,) int32 lengths.
        """
        tokens, lengths = self._features(keys, speech, lengths)
        return self._head(tokens, lengths, keys, positions=True)


class PublishedImage(PublishedEncoder):
    """A published image network as an encoder."""

    def _is_raw(self, given: jax.Array) -> bool:
        return given.dtype == jnp.uint8

    @nn.compact
    def __call__(
        self, image: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encode images.

        Args:
          image: (n, H, W, 3) uint8, or cached tokens (n, P, C) or (n, P, layers, C).
          keys: (n,) typed keys for dropout.

        Returns:
          Tokens (n, P', M W), the summary first, and (n,) int32 lengths.
        """
        tokens, lengths = self._features(keys, image)
        return self._head(tokens, lengths, keys, positions=False)


def _full_lengths(tokens: jax.Array) -> jax.Array:
    return jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
