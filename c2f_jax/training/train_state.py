"""The train state: what a step reads and writes, and what a checkpoint must hold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.parameters import merge_params, momentum_subset, split_params
from c2f_jax.objectives import EmbeddingQueue, Queues, create_queues, run_keys

_INPUTS = ("waveform", "speech_tokens", "speech_lengths", "image", "image_tokens")


class C2FTrainState(struct.PyTreeNode):
    """State of a training run. Nothing in it depends on the batch size or the number of devices.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      params: online parameters that are trained, float32.
      frozen: parameters that are not trained: no gradient, no optimizer state, no momentum copy, no
        place in checkpoints.
      momentum_params: moving average of both encoders and projections; {} without a momentum model.
      opt_state: optax state of ``params``.
      queue: K momentum embeddings of each modality and their image ids.
      token_queue: the same with momentum token sequences in bfloat16, for negatives from the queue.
      rng: raw key of the run. Every draw folds in the step, so that nothing repeats and a resumed
        run draws what an unbroken one would have.
    """

    step: jax.Array
    params: Any
    frozen: Any
    momentum_params: Any
    opt_state: Any
    queue: EmbeddingQueue
    token_queue: EmbeddingQueue
    rng: jax.Array

    @property
    def queues(self) -> Queues:
        """Both queues, as ``c2f_losses`` takes them."""
        return Queues(self.queue, self.token_queue)


def create_train_state(
    model: C2FModel,
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, Any],
    *,
    seed: int,
    queue_size: int,
    token_queue_size: int,
    momentum_model: bool = True,
    weights: Mapping[str, Any] | None = None,
) -> C2FTrainState:
    """Initialize the state: the same for the same seed on any number of devices.

    Args:
      model: C2FModel.
      optimizer: optax transformation.
      batch: host batch as in ``train_step``, in the longest training shape; only shapes are read.
      seed: seed of the run.
      queue_size: K, slots of the embedding queue; 0 for none.
      token_queue_size: slots of the token queue; 0 unless negatives are mined from the queue.
      momentum_model: whether there is a momentum model.
      weights: published parameters in place of random ones, a part of the nested dict of all.

    Returns:
      C2FTrainState.
    """
    init_key, training_key = run_keys(seed)

    # Shapes of parameters do not depend on the batch size: one row is enough.
    one_row = {name: jnp.asarray(batch[name][:1]) for name in _INPUTS if name in batch}

    # Published parameters are not drawn at random first: they may fill most of the memory.
    weights = weights or {}
    given = _paths(weights)
    initialize = jax.jit(lambda key, row: split_params(model.init(key, row)["params"], given)[0])
    params = merge_params(initialize(init_key, one_row), jax.tree.map(jnp.asarray, weights))

    # The queues hold what the encoders return, one row a slot.
    speech, image, _, _ = jax.eval_shape(
        lambda params, row: model.apply({"params": params}, row), params, one_row
    )
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    queues = create_queues(
        speech.features, image.features, ids, size=queue_size, token_size=token_queue_size
    )
    params, frozen = split_params(params, model.frozen)
    momentum_params = {}
    if momentum_model:
        # A copy: the state is donated, and no buffer may be donated twice.
        momentum_params = jax.tree.map(jnp.copy, momentum_subset(params))

    return C2FTrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        momentum_params=momentum_params,
        opt_state=optimizer.init(params),
        queue=queues.embeddings,
        token_queue=queues.tokens,
        rng=jax.random.key_data(training_key),
    )


def _paths(params: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all leaves of nested dicts."""
    paths = []
    for name, value in params.items():
        if isinstance(value, dict):
            paths += _paths(value, (*prefix, name))
        else:
            paths.append((*prefix, name))
    return paths
