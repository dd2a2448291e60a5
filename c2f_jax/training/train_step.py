"""One C2F training step: the paper's algorithm in nine steps."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from c2f_jax.models.c2f import C2FModel, Encoded, Tokens, image_input, speech_input
from c2f_jax.models.parameters import clip_temperature, merge_params, momentum_subset
from c2f_jax.objectives import (
    Average,
    C2FLosses,
    Pair,
    Queues,
    Site,
    alpha_at,
    c2f_losses,
    fold_keys,
    pmean,
    row_keys,
    row_numbers,
    step_key,
    update_momentum,
)
from c2f_jax.objectives.collectives import AxisName
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.train_state import C2FTrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Average]


def train_step(
    state: C2FTrainState,
    batch: Batch,
    *,
    model: C2FModel,
    optimizer: optax.GradientTransformation,
    method: MethodConfig,
    axis_name: AxisName = None,
) -> tuple[C2FTrainState, Metrics]:
    """Take one step of C2F on this device's share of the global batch.

    With "global" and "queue" negatives the result depends on the global batch and the seed alone,
    not on the number of devices: every draw is keyed by (seed, step, global row) and every mean is
    over the global batch.

    Args:
      state: C2FTrainState, the same on all devices.
      batch: waveform (n, S), speech_lengths (n,), image (n, H, W, 3) uint8, image_id (n,) int32, or
        speech_tokens (n, T, C), image_tokens (n, P, C) of a feature cache. Row r of device d is row
        d n + r of the global batch.
      model: C2FModel.
      optimizer: optax transformation.
      method: MethodConfig.
      axis_name: device axis under pmap or shard_map; None on one device.

    Returns:
      The next state, and the metrics of the global batch by name. If the loss or a gradient is not
      finite, the state is the same but for its step, and nothing counts but "skipped", the share of
      such steps.

    Reference:
      Zhou and Li 2024 (C2F); Li et al. 2021 (ALBEF), algorithm 1.
    """
    # Step 1. Momentum forward pass: no gradient, no dropout.
    momentum = None
    if method.momentum is not None:
        momentum_params = merge_params(state.momentum_params, state.frozen)
        momentum = encode(model, momentum_params, batch)

    # Steps 2 to 6 are in loss_of_params. Step 7. Gradients. The loss is that of the global batch
    # already; the gradients are averaged here: correct for pmap and shard_map.
    gradient_of_loss = jax.value_and_grad(loss_of_params, has_aux=True)
    (loss, (losses, metrics)), gradients = gradient_of_loss(
        state.params, state, batch, momentum, model=model, method=method, axis_name=axis_name
    )
    gradients = pmean(gradients, axis_name)

    # Step 8. Optimizer step; the temperature stays in its range.
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = clip_temperature(params, method.min_tau, method.max_tau)
    updated = state.replace(params=params, opt_state=opt_state)

    # Step 9. The momentum parameters follow. The queues have the embeddings of step 1, made by the
    # momentum parameters before this update.
    updated = update_momentum_and_queues(updated, losses.queues, method.momentum)

    # NaN in one parameter is NaN everywhere a step later: such a step changes nothing.
    gradient_norm = optax.global_norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, state)
    metrics |= {"loss": Average.of(loss), "gradient_norm": Average.of(gradient_norm)}
    metrics = {name: average.only_if(is_finite) for name, average in metrics.items()}
    metrics["skipped"] = Average.of(1.0 - is_finite.astype(jnp.float32))
    return state.replace(step=state.step + 1), metrics


def loss_of_params(
    trained_params: Any,
    state: C2FTrainState,
    batch: Batch,
    momentum: Pair[Encoded] | None,
    *,
    model: C2FModel,
    method: MethodConfig,
    axis_name: AxisName,
) -> tuple[jax.Array, tuple[C2FLosses, Metrics]]:
    """Compute the loss of the global batch, L = L_SIC + w L_SIM: steps 2 to 6.

    Args:
      trained_params: the parameters to differentiate with respect to.
      state: C2FTrainState, for all others.
      batch: as in ``train_step``.
      momentum: Pair of Encoded of the momentum model; None without one.
      model: C2FModel.
      method: MethodConfig.
      axis_name: device axis.

    Returns:
      The scalar loss, equal on all devices; C2FLosses and the metrics of the global batch by name.
    """
    params = merge_params(trained_params, state.frozen)
    ids = batch["image_id"]

    # Every draw is keyed by the seed, the step and the global row.
    key = step_key(state.rng, state.step)
    keys = row_keys(key, row_numbers(ids, axis_name))

    # Step 2. Online forward pass, with dropout.
    online = encode(model, params, batch, fold_keys(keys, Site.ENCODERS))
    tau = apply_model(model, params, method="tau")
    alpha = distillation_weight(state.step, method)

    # Step 6 matches pairs by the multimodal encoder.
    def match(speech: Tokens, image: Tokens) -> jax.Array:
        return apply_model(model, params, speech, image, keys_of_pairs(keys), method="match")

    # Steps 3 to 6: banks, SIC, hard negatives, SIM.
    losses = c2f_losses(
        online.speech.features,
        online.image.features,
        ids,
        tau=tau,
        key=key,
        match=match if method.sim_weight else None,
        momentum=None if momentum is None else Pair(*(side.features for side in momentum)),
        queues=None if momentum is None else state.queues,
        alpha=alpha if method.alpha else 0.0,
        id_policy=method.id_policy,
        negatives=method.negatives,
        mining_rows=method.mining_rows,
        mining_tau=method.mining_tau,
        branches=model.branches,
        axis_name=axis_name,
    )
    loss = losses.sic + method.sim_weight * losses.sim
    metrics = losses.metrics | {"tau": Average.of(tau), "alpha": Average.of(alpha)}
    return loss, (losses, metrics)


def apply_model(model: C2FModel, params: Any, *inputs: Any, method: str) -> Any:
    """Call a method of the model with these parameters."""
    return model.apply({"params": params}, *inputs, method=method)


def encode(
    model: C2FModel, params: Any, batch: Batch, keys: jax.Array | None = None
) -> Pair[Encoded]:
    """Encode both modalities of a batch.

    Args:
      model: C2FModel.
      params: all parameters that the encoders need.
      batch: as in ``train_step``.
      keys: (n,) typed keys for dropout; None for no dropout.

    Returns:
      Pair of Encoded.
    """
    speech = apply_model(model, params, *speech_input(batch), keys, method="encode_speech")
    image = apply_model(model, params, image_input(batch), keys, method="encode_image")
    return Pair(speech=speech, image=image)


def distillation_weight(step: jax.Array, method: MethodConfig) -> jax.Array:
    """Ramp alpha from the end of the warm-up; raise ValueError without a ramp length."""
    if method.alpha_ramp_steps is None:
        raise ValueError(
            "method.alpha_ramp_steps is None, which means one epoch; give the number of steps"
        )
    return alpha_at(step - method.warm_up_steps, method.alpha, method.alpha_ramp_steps)


def keys_of_pairs(keys: jax.Array) -> jax.Array:
    """Make the dropout keys of the 3n pairs: a row is in three, and each has its own."""
    return jnp.concatenate(
        [
            fold_keys(keys, Site.POSITIVE_PAIRS),
            fold_keys(keys, Site.IMAGE_NEGATIVE_PAIRS),
            fold_keys(keys, Site.SPEECH_NEGATIVE_PAIRS),
        ]
    )


def update_momentum_and_queues(
    state: C2FTrainState, queues: Queues | None, momentum: float | None
) -> C2FTrainState:
    """Let the momentum parameters follow the updated ones, and keep the queues.

    Args:
      state: C2FTrainState with updated parameters.
      queues: Queues with this step's momentum embeddings; None without a momentum model.
      momentum: m; None without a momentum model.

    Returns:
      The state for the next step.
    """
    online_params = momentum_subset(state.params)
    if momentum is None or queues is None:
        if state.momentum_params:
            # Warm-up: the momentum model will start from the online one.
            state = state.replace(momentum_params=online_params)
        return state
    momentum_params = update_momentum(state.momentum_params, online_params, momentum)
    return state.replace(
        momentum_params=momentum_params, queue=queues.embeddings, token_queue=queues.tokens
    )
