"""A published network as an encoder: its tokens, or their weighted sum over layers, under a small transformer.

A frozen network may also have run before: given its tokens from the feature cache, the encoder leaves it out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from c2f_jax.errors import UserError
from c2f_jax.models.encoder import BranchedEncoder, mean_token, prepend_cls
from c2f_jax.models.layers import Dense, dropout, length_mask, sinusoidal_positions
from c2f_jax.models.networks.wav2vec2 import span_mask
from c2f_jax.objectives.keys import Site, fold_keys

FROZEN = ("tower", "conv", "none")


def choose_layer(hidden, layer):
    """One of a network's hidden states, as in ``hidden[int(layer)]``; "last" is its output.

    Raises:
      UserError: no such layer.
    """
    if layer == "last":
        return hidden[-1]
    try:
        return hidden[int(layer)]
    except (ValueError, IndexError):
        raise UserError(
            f"layer={layer!r}: last, weighted_sum or a number below {len(hidden)} is expected (0 is the input of the "
            "first block)"
        ) from None


def pool_tokens(tokens, lengths, size):
    """Means over ``size`` consecutive valid tokens: (n, T, W), (n,) -> (n, ceil(T / size), W), ceil(lengths / size)."""
    if size == 1:
        return tokens, lengths
    n, length, width = tokens.shape
    padding = -length % size
    valid = length_mask(lengths, length + padding).reshape(n, -1, size, 1)
    x = jnp.pad(tokens, ((0, 0), (0, padding), (0, 0))).reshape(n, -1, size, width)
    total = jnp.sum(jnp.where(valid, x, 0), axis=2)
    return total / jnp.maximum(jnp.sum(valid, axis=2), 1).astype(x.dtype), (
        lengths + size - 1
    ) // size


class TimeConvolutions(nn.Module):
    """Residual convolutions over five tokens, x + gelu(conv(layer_norm(x))), each followed by means over two tokens.

    Small transformers that start from nothing learn words faster with them, as vision transformers learn shapes
    (Xiao et al. 2021, "Early Convolutions Help Transformers See Better"); residual as in He et al. 2016.

    Attributes:
      blocks: number of convolutions; a token then stands for 2^blocks.
      dropout_rate: of the convolutions' outputs.
      dtype: compute type.
    """

    blocks: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, lengths, keys=None):
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
      tower: the published network; None for tokens of another tool, which no waveform or image can be turned into.
      frozen: "tower" keeps the published weights: they get no gradient, optimiser state or momentum copy, and no
        dropout. "conv" keeps the convolutions of a speech network only, "none" nothing.
      layer: "last", the number of a hidden state (0 is the input of the first block), or "weighted_sum", a learnt
        softmax-weighted sum of all hidden states, equal weights at the start.
      pool: tokens are means over so many consecutive ones.
      width: W of the tokens; those of the network are normalised and projected to it.
      depth: of the small transformer with its learnt [CLS]. With depth 0 there is neither: tokens are the network's,
        the first one its summary: [CLS] where it has one and ``pooling`` is "cls", or the mean of all.
      token_dropout: share of the entries of the network's tokens that are set to 0 in training.
      token_mask: share of the tokens that are set to 0 as a whole in training, as if a part of the sentence or of the
        picture were missing.
      others: as in ``BranchedEncoder``.
    """

    tower: nn.Module | None = None
    frozen: str = "tower"
    layer: str = "last"
    pool: int = 1
    width: int = 256
    depth: int = 2
    token_dropout: float = 0.0
    token_mask: float = 0.0

    def _features(self, keys, given, *lengths):
        """Tokens (n, T, C) of the network or of the cache, and their lengths."""
        if not self._is_raw(given):
            lengths = (
                lengths[0] if lengths else jnp.full((given.shape[0],), given.shape[1], jnp.int32)
            )
            hidden = (
                tuple(jnp.moveaxis(given, 2, 0)) if given.ndim == 4 else None
            )  # (n, T, layers, C)
            tokens = given if hidden is None else hidden[-1]
        elif self.tower is None:
            raise UserError(
                "this model reads tokens from a feature cache; it has no network to make them with"
            )
        else:
            tower_keys = None if self.frozen == "tower" else fold_keys(keys, Site.TOWER)
            tokens, lengths, hidden = self.tower(given, *lengths, tower_keys)
        if self.layer == "weighted_sum":
            if hidden is None:
                raise UserError(
                    "layer='weighted_sum' needs the features of all layers: c2f features --layer=all"
                )
            weights = self.param("layer_weights", nn.initializers.zeros, (len(hidden),))
            weights = jax.nn.softmax(weights)
            tokens = sum(w * h for w, h in zip(weights, hidden, strict=True))
        elif self.layer != "last" and hidden is not None:
            tokens = choose_layer(
                hidden, self.layer
            )  # a cache without layers is of this layer already
        return tokens.astype(self.dtype), lengths

    def _convolved(self, x, lengths, keys):
        """What stands between projection and transformer: nothing, but for speech with convolutions."""
        return x, lengths

    def _head(self, tokens, lengths, keys, positions):
        tokens, lengths = pool_tokens(tokens, lengths, self.pool)
        if not self.depth:
            if self.tower is not None and self.tower.summary == "first":
                return self._pooled(tokens, lengths), lengths
            return jnp.concatenate([mean_token(tokens, lengths), tokens], axis=1), lengths + 1
        x = nn.LayerNorm(dtype=self.dtype, name="input_norm")(tokens)
        x = dropout(x, self.token_dropout, fold_keys(keys, Site.TOKEN_DROPOUT))
        if keys is not None and self.token_mask:
            masked = span_mask(fold_keys(keys, Site.TOKEN_MASK), x.shape[1], self.token_mask, 1)
            x = jnp.where(masked[..., None], 0, x)
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
      conv_blocks: of ``TimeConvolutions`` before the transformer. With ``pool`` 4 and two blocks, Whisper's tokens of
        20 ms become ones of 320 ms, about a word.
      others: as in ``PublishedEncoder``.
    """

    conv_blocks: int = 0

    def _is_raw(self, speech):
        return speech.ndim == 2

    def _convolved(self, x, lengths, keys):
        return TimeConvolutions(self.conv_blocks, self.dropout_rate, self.dtype, name="conv")(
            x, lengths, keys
        )

    @nn.compact
    def __call__(self, speech, lengths, keys=None):
        """Waveforms (n, S) with (n,) samples, or cached tokens (n, T, C) with (n,) tokens -> tokens and lengths."""
        tokens, lengths = self._features(keys, speech, lengths)
        return self._head(tokens, lengths, keys, positions=True)


class PublishedImage(PublishedEncoder):
    """A published image network as an encoder; attributes as in ``PublishedEncoder``."""

    def _is_raw(self, image):
        return image.dtype == jnp.uint8

    @nn.compact
    def __call__(self, image, keys=None):
        """Images (n, H, W, 3) uint8, or cached tokens (n, P, C) -> tokens and lengths."""
        tokens, lengths = self._features(keys, image)
        return self._head(tokens, lengths, keys, positions=False)
