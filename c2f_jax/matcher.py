"""SIM of a trained model: logits and attention of pairs, and what all pairs of an item share."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from c2f_jax.models.c2f import Tokens
from c2f_jax.retrieval.ranking import fixed_blocks
from c2f_jax.retrieval.reranking import StagedMatch
from c2f_jax.training.parallel import replicate, round_up_rows, split_rows

MOST_ITEMS = 1024  # recordings, or images, that are prepared at once
MOST_BYTES = 1 << 30  # of what is prepared at once
AT_ONCE = 128  # items in each call that prepares them

Params = Mapping[str, Any]


@functools.partial(jax.jit, static_argnames="model")
def match(
    model: nn.Module,
    params: Params,
    speech_tokens: jax.Array,
    speech_lengths: jax.Array,
    image_tokens: jax.Array,
) -> jax.Array:
    """Compute the SIM logits (b, 2) of b pairs of token sequences.

    Args:
      model: C2FModel.
      params: its parameters.
      speech_tokens: (b, T, W).
      speech_lengths: (b,) valid tokens.
      image_tokens: (b, P, W), all valid.
    """
    pair = _pair(speech_tokens, speech_lengths, image_tokens)
    logits: Any = model.apply({"params": params}, *pair, method="match")
    return logits


@functools.partial(jax.jit, static_argnames="model")
def cross_attention(
    model: nn.Module,
    params: Params,
    speech_tokens: jax.Array,
    speech_lengths: jax.Array,
    image_tokens: jax.Array,
) -> jax.Array:
    """Compute the cross-attention (b, T, P) of b pairs, the mean over heads and blocks.

    Args:
      model: C2FModel, with at least one multimodal block.
      params: its parameters.
      speech_tokens: (b, T, W).
      speech_lengths: (b,) valid tokens.
      image_tokens: (b, P, W), all valid.
    """
    pair = _pair(speech_tokens, speech_lengths, image_tokens)
    _, sown = model.apply({"params": params}, *pair, method="match", mutable="intermediates")
    weights = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(sown)
        if any(getattr(part, "key", None) == "cross_attention" for part in path)
    ]
    # (blocks, b, heads, T, P) -> (b, T, P)
    return jnp.mean(jnp.stack(weights), axis=(0, 2))


def _pair(
    speech_tokens: jax.Array, speech_lengths: jax.Array, image_tokens: jax.Array
) -> tuple[Tokens, Tokens]:
    """Return what ``C2FModel.match`` takes of token sequences; image tokens are all valid."""
    image_lengths = jnp.full((image_tokens.shape[0],), image_tokens.shape[1], jnp.int32)
    return Tokens(speech_tokens, speech_lengths), Tokens(image_tokens, image_lengths)


def staged_match(
    model: nn.Module,
    params: Params,
    speech_shape: tuple[int, int],
    image_shape: tuple[int, int],
) -> StagedMatch:
    """Return the match function of a model in two stages.

    Args:
      model: C2FModel.
      params: its parameters, replicated on the devices to use.
      speech_shape: the most tokens of a recording, and the entries of each.
      image_shape: tokens of an image, and the entries of each.
    """

    def prepare_speech(tokens: np.ndarray, lengths: np.ndarray, size: int) -> jax.Array:
        function = functools.partial(_prepare_speech, model, params)
        return _prepare(function, params, size, tokens, lengths)

    def prepare_image(tokens: np.ndarray, size: int) -> jax.Array:
        return _prepare(functools.partial(_prepare_image, model, params), params, size, tokens)

    def match_rows(
        speech: jax.Array,
        lengths: np.ndarray,
        image: jax.Array,
        speech_rows: np.ndarray,
        image_rows: np.ndarray,
    ) -> jax.Array:
        rows = split_rows(params, (speech_rows.astype(np.int32), image_rows.astype(np.int32)))
        return _match_prepared(model, params, speech, lengths, image, *rows)

    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = (
        jax.eval_shape(
            functools.partial(_prepare_speech, model),
            params,
            jax.ShapeDtypeStruct((1, *speech_shape), jnp.float32),
            one,
        ),
        jax.eval_shape(
            functools.partial(_prepare_image, model),
            params,
            jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
        ),
    )
    item_bytes = max(4 * shape.size for shape in shapes)
    most_items = max(1, min(MOST_ITEMS, MOST_BYTES // max(item_bytes, 1)))
    return StagedMatch(prepare_speech, prepare_image, match_rows, most_items)


def _prepare(
    function: Callable[..., jax.Array], params: Params, size: int, *rows: np.ndarray
) -> jax.Array:
    """Run a function on rows, and return an array of ``size`` rows that begins with the results."""
    count = len(rows[0])
    # Two shapes are compiled: for the query of a search, and for many items.
    batch = round_up_rows(params, 1 if count == 1 else min(size, AT_ONCE))
    result = None
    for start, block in fixed_blocks(np.arange(count), batch):
        found = np.asarray(function(*split_rows(params, [part[block] for part in rows])))
        if result is None:
            result = np.zeros((size, *found.shape[1:]), found.dtype)
        stop = min(start + batch, count)
        result[start:stop] = found[: stop - start]
    return replicate(result, list(jax.tree.leaves(params)[0].sharding.mesh.devices.flat))


@functools.partial(jax.jit, static_argnames="model")
def _prepare_speech(
    model: nn.Module, params: Params, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    prepared: Any = model.apply({"params": params}, tokens, lengths, method="prepare_speech")
    return prepared


@functools.partial(jax.jit, static_argnames="model")
def _prepare_image(model: nn.Module, params: Params, tokens: jax.Array) -> jax.Array:
    prepared: Any = model.apply({"params": params}, tokens, method="prepare_image")
    return prepared


@functools.partial(jax.jit, static_argnames="model")
def _match_prepared(
    model: nn.Module,
    params: Params,
    speech: jax.Array,
    lengths: jax.Array,
    image: jax.Array,
    speech_rows: jax.Array,
    image_rows: jax.Array,
) -> jax.Array:
    """Compute the SIM logits (b, 2) of rows (b,) of what was prepared."""
    image_lengths = jnp.full(image_rows.shape, image.shape[1], jnp.int32)
    speech, lengths, image = speech[speech_rows], lengths[speech_rows], image[image_rows]
    logits: Any = model.apply(
        {"params": params}, speech, lengths, image, image_lengths, method="match_prepared"
    )
    return logits
