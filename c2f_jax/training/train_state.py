"""The explicit train state: everything that a step reads and writes, and all that a checkpoint must hold."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.parameters import merge_params, momentum_subset, split_params
from c2f_jax.objectives.embedding_queue import EmbeddingQueue, create_queue
from c2f_jax.objectives.keys import run_keys


@struct.dataclass
class C2FTrainState:
    """State of one C2F training run. Nothing in it depends on the batch size or the number of devices."""

    step: jax.Array  # int32 [], optimiser steps taken
    params: Any  # online parameters that are trained, float32
    frozen: Any  # parameters that are not: no gradient, optimiser state or momentum copy, not in checkpoints
    momentum_params: (
        Any  # moving average of both encoders and projections; {} without a momentum model
    )
    opt_state: Any  # optax state of ``params``
    queue: EmbeddingQueue  # K momentum embeddings of each modality and their ids
    token_queue: (
        EmbeddingQueue  # the same and momentum token sequences, bf16, for ``queue`` negatives
    )
    rng: (
        jax.Array
    )  # raw key of the run; every draw folds in the step, so nothing replays and resume is exact


def create_train_state(
    model: C2FModel,
    optimizer,
    batch,
    *,
    seed,
    queue_size,
    token_queue_size,
    momentum_model=True,
    weights=None,
):
    """Initialise the state; device-independent and deterministic in ``seed``.

    Args:
      model: the C2F model.
      optimizer: optax transformation.
      batch: host batch (see the loader) with the longest training shape; only shapes are used.
      seed: int.
      queue_size: K of the embedding queue, 0 for none.
      token_queue_size: slots of the token queue, 0 unless negatives are mined from the queue.
      momentum_model: whether momentum parameters are kept.
      weights: published parameters in place of random ones, a part of the nested dict of all parameters.
    """
    init_rng, run_rng = run_keys(seed)
    names = ("waveform", "speech_tokens", "speech_lengths", "image", "image_tokens")
    one = {name: jnp.asarray(batch[name][:1]) for name in names if name in batch}
    given = _paths(weights or {})
    params = jax.jit(lambda rng, b: split_params(model.init(rng, b)["params"], given)[0])(
        init_rng, one
    )
    params = merge_params(params, jax.tree.map(jnp.asarray, weights or {}))
    speech, image, _, _ = jax.eval_shape(lambda p, b: model.apply({"params": p}, b), params, one)
    params, frozen = split_params(params, model.frozen)
    rows = {
        "id": jax.ShapeDtypeStruct((1,), jnp.int32),
        "speech": jax.ShapeDtypeStruct(speech.embedding.shape, jnp.float32),
        "image": jax.ShapeDtypeStruct(image.embedding.shape, jnp.float32),
    }
    token_rows = rows | {
        "speech_tokens": jax.ShapeDtypeStruct(speech.tokens.shape, jnp.bfloat16),
        "speech_lengths": jax.ShapeDtypeStruct((1,), jnp.int32),
        "image_tokens": jax.ShapeDtypeStruct(image.tokens.shape, jnp.bfloat16),
        "image_lengths": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    return C2FTrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        # A copy: the state is donated, and one buffer must not be given away twice.
        momentum_params=jax.tree.map(jnp.copy, momentum_subset(params)) if momentum_model else {},
        opt_state=optimizer.init(params),
        queue=create_queue(queue_size, rows),
        token_queue=create_queue(token_queue_size, token_rows),
        rng=jax.random.key_data(run_rng),
    )


def _paths(params, prefix=()):
    """The paths of all leaves of nested dicts."""
    paths = []
    for name, value in params.items():
        paths += _paths(value, (*prefix, name)) if isinstance(value, dict) else [(*prefix, name)]
    return paths
