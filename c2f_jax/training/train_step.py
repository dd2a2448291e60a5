"""One C2F training step: the paper's algorithm in nine steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from c2f_jax.models.c2f import C2FModel, Encoded, image_input, speech_input
from c2f_jax.models.parameters import clip_temperature, merge_params, momentum_subset
from c2f_jax.objectives import (
    EmbeddingQueue,
    SimPairs,
    Site,
    all_gather,
    alpha_at,
    assemble_pairs,
    axis_index,
    bank,
    bank_valid,
    branch_logits,
    distillation_targets,
    enqueue,
    fold_keys,
    identity_targets,
    masked_mean,
    pmean,
    psum,
    row_keys,
    sic_loss,
    sim_loss,
    similarity_logits,
    step_key,
    update_momentum,
)
from c2f_jax.objectives.collectives import AxisName
from c2f_jax.training.average import Average
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.negative_pool import (
    MinedNegatives,
    mine_negatives,
    pad_tokens,
    queue_rows,
    replace_first_rows,
    token_rows,
    tokens_of,
    with_momentum_tokens,
)
from c2f_jax.training.pairs import Directions, Pair, Rows
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
      The next state, and the metrics of the global batch by name.

    Reference:
      Zhou and Li 2024 (C2F); Li et al. 2021 (ALBEF), algorithm 1.
    """
    # Every draw below is keyed by these rows.
    rows = rows_of_this_device(state, batch["image_id"], axis_name)

    # Step 1. Momentum forward pass: no gradient, no dropout.
    momentum = None
    if method.momentum is not None:
        momentum_params = merge_params(state.momentum_params, state.frozen)
        momentum = jax.lax.stop_gradient(encode(model, momentum_params, batch))

    # Steps 2 to 6 are in c2f_loss. Step 7. Gradients. The loss is averaged over the devices inside,
    # the gradients outside: correct for pmap and shard_map.
    gradient_of_loss = jax.value_and_grad(c2f_loss, has_aux=True)
    (loss, metrics), gradients = gradient_of_loss(
        state.params, state, batch, rows, momentum, model=model, method=method, axis_name=axis_name
    )
    gradients = pmean(gradients, axis_name)

    # Step 8. Optimizer step; the temperature stays in its range.
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = clip_temperature(params, method.min_tau, method.max_tau)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    # Step 9. Momentum update; the momentum embeddings of the global batch enter the queues.
    state = update_momentum_and_queues(state, momentum, rows.ids, method, axis_name)

    metrics["loss"] = Average.of(loss)
    metrics["gradient_norm"] = Average.of(optax.global_norm(gradients))
    return state, psum(metrics, axis_name)


def c2f_loss(
    trained_params: Any,
    state: C2FTrainState,
    batch: Batch,
    rows: Rows,
    momentum: Pair[Encoded] | None,
    *,
    model: C2FModel,
    method: MethodConfig,
    axis_name: AxisName,
) -> tuple[jax.Array, Metrics]:
    """Compute the loss of the global batch, L = L_SIC + w L_SIM: steps 2 to 6.

    Args:
      trained_params: the parameters to differentiate with respect to.
      state: C2FTrainState, for all others.
      batch: as in ``train_step``.
      rows: Rows.
      momentum: Pair of Encoded of the momentum model; None without one.
      model: C2FModel.
      method: MethodConfig.
      axis_name: device axis.

    Returns:
      The scalar loss, equal on all devices, and the metrics of this device's rows by name.
    """
    params = merge_params(trained_params, state.frozen)

    # Step 2. Online forward pass, with dropout.
    online = encode(model, params, batch, fold_keys(rows.keys, Site.ENCODERS))
    tau = apply_model(model, params, method="tau")

    # Step 3. Banks: the momentum embeddings of the global batch, then the queue.
    banks = make_banks(online if momentum is None else momentum, rows.ids, state.queue, axis_name)

    # Step 4. SIC: identity targets, softened by momentum distillation.
    alpha = distillation_weight(state.step, method)
    targets = sic_targets(momentum, banks, rows, tau, alpha, method)
    sic_rows, logits = sic_of_branches(online, banks, targets, tau, model.branches)
    loss = pmean(jnp.mean(sic_rows), axis_name)
    metrics = sic_metrics(sic_rows, logits, targets) | {"tau": Average.of(tau)}
    metrics["alpha"] = Average.of(alpha)
    if not method.sim_weight:
        return loss, metrics

    # Step 5. Hard negatives, mined by the similarities of SIC.
    candidates = online
    if method.negatives == "queue":
        assert momentum is not None  # see MethodConfig.check
        candidates = with_momentum_tokens(online, momentum)
    negatives = mine_negatives(state.token_queue, rows, candidates, logits, tau, method, axis_name)

    # Step 6. SIM over 3n pairs.
    pairs = make_pairs(online, candidates, negatives, rows.keys, method)
    sim_logits = match(model, params, pairs, rows.keys)
    sim_rows = sim_loss(sim_logits, pairs.labels)
    loss += method.sim_weight * masked_mean(sim_rows, pairs.valid, axis_name)
    return loss, metrics | sim_metrics(sim_rows, sim_logits, pairs, negatives, method)


class Banks(NamedTuple):
    """What the queries are scored against: the global batch, then the queue; M = N + K columns.

    Attributes:
      speech: (M, D) momentum embeddings; online ones without a momentum model.
      image: (M, D), likewise.
      ids: (M,) int32 image ids.
      valid: (M,) bool, False for slots never written.
    """

    speech: jax.Array
    image: jax.Array
    ids: jax.Array
    valid: jax.Array


class SicTargets(NamedTuple):
    """Targets of SIC.

    Attributes:
      hard: (n, M) identity targets.
      soft: Directions of (n, M) targets that the loss takes.
      valid: (n, M) bool, the columns that stay in the softmax.
    """

    hard: jax.Array
    soft: Directions[jax.Array]
    valid: jax.Array


def rows_of_this_device(state: C2FTrainState, ids: jax.Array, axis_name: AxisName) -> Rows:
    """Number this device's rows in the global batch and make their keys."""
    n = ids.shape[0]
    numbers = axis_index(axis_name) * n + jnp.arange(n)
    return Rows(ids, numbers, row_keys(step_key(state.rng, state.step), numbers))


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


def make_banks(
    encoded: Pair[Encoded], ids: jax.Array, queue: EmbeddingQueue, axis_name: AxisName
) -> Banks:
    """Gather the embeddings and ids of the global batch and append the queue.

    Args:
      encoded: Pair of Encoded of this device's rows, by the momentum model if there is one.
      ids: (n,) int32 image ids.
      queue: EmbeddingQueue.
      axis_name: device axis.

    Returns:
      Banks.
    """
    # In device order, so that row r of device d is column d n + r.
    speech, image, all_ids = all_gather(
        (encoded.speech.embedding, encoded.image.embedding, ids), axis_name
    )
    return Banks(
        speech=bank(speech, queue, "speech"),
        image=bank(image, queue, "image"),
        ids=bank(all_ids, queue, "id"),
        valid=bank_valid(all_ids.shape[0], queue),
    )


def distillation_weight(step: jax.Array, method: MethodConfig) -> jax.Array:
    """Ramp alpha from the end of the warm-up; raise ValueError without a ramp length."""
    if method.alpha_ramp_steps is None:
        raise ValueError(
            "method.alpha_ramp_steps is None, which means one epoch; give the number of steps"
        )
    return alpha_at(step - method.warm_up_steps, method.alpha, method.alpha_ramp_steps)


def sic_targets(
    momentum: Pair[Encoded] | None,
    banks: Banks,
    rows: Rows,
    tau: jax.Array,
    alpha: jax.Array,
    method: MethodConfig,
) -> SicTargets:
    """Make the targets of SIC: by identity, then softened by the momentum model's similarities.

    Args:
      momentum: Pair of Encoded; None without a momentum model.
      banks: Banks.
      rows: Rows.
      tau: temperature.
      alpha: weight of distillation at this step.
      method: MethodConfig.

    Returns:
      SicTargets.
    """
    # Hard targets: other captions of the same image may be positives, by the id policy.
    hard, valid = identity_targets(rows.ids, banks.ids, rows.numbers, banks.valid, method.id_policy)
    if momentum is None or not method.alpha:
        return SicTargets(hard, Directions(s2i=hard, i2s=hard), valid)

    # Soft targets: what the momentum model finds similar. All branches together are the teacher.
    momentum_s2i = similarity_logits(momentum.speech.embedding, banks.image, tau)
    momentum_i2s = similarity_logits(momentum.image.embedding, banks.speech, tau)
    soft = Directions(
        s2i=distillation_targets(momentum_s2i, hard, valid, alpha),
        i2s=distillation_targets(momentum_i2s, hard, valid, alpha),
    )
    return SicTargets(hard, soft, valid)


def sic_of_branches(
    online: Pair[Encoded], banks: Banks, targets: SicTargets, tau: jax.Array, branches: int
) -> tuple[jax.Array, Directions[jax.Array]]:
    """Compute SIC, each branch of the encoders with its own loss against the same targets.

    With one branch, as in the paper, this is ``similarity_logits`` and ``sic_loss``.

    Args:
      online: Pair of Encoded.
      banks: Banks.
      targets: SicTargets.
      tau: temperature.
      branches: B.

    Returns:
      The loss of each row (n,), and Directions of the logits of whole embeddings (n, M): the means
      over the branches.
    """
    # (n, D) . (D, M) -> (n, M) for each branch
    logits_s2i = branch_logits(online.speech.embedding, banks.image, tau, branches)
    logits_i2s = branch_logits(online.image.embedding, banks.speech, tau, branches)
    loss_of_each = jax.vmap(sic_loss, in_axes=(0, 0, None, None, None))
    losses = loss_of_each(logits_s2i, logits_i2s, *targets.soft, targets.valid)  # (B, n)

    # Hard negatives are mined by what retrieval ranks by, the mean cosine of the branches.
    logits = Directions(s2i=jnp.mean(logits_s2i, axis=0), i2s=jnp.mean(logits_i2s, axis=0))
    return jnp.mean(losses, axis=0), logits


def sic_metrics(sic_rows: jax.Array, logits: Directions, targets: SicTargets) -> Metrics:
    """Average the SIC loss, and how often the best valid column of s2i is a positive."""
    best = jnp.argmax(jnp.where(targets.valid, logits.s2i, -jnp.inf), axis=-1)
    target_of_best = jnp.take_along_axis(targets.hard, best[:, None], axis=-1)[:, 0]
    hits = (target_of_best > 0).astype(jnp.float32)
    return {"sic_loss": Average.of(sic_rows), "sic_accuracy": Average.of(hits)}


def make_pairs(
    online: Pair[Encoded],
    candidates: Pair[Encoded],
    negatives: MinedNegatives,
    keys: jax.Array,
    method: MethodConfig,
) -> SimPairs:
    """Make the 3n pairs of SIM.

    Args:
      online: Pair of Encoded.
      candidates: Pair of Encoded as in ``mine_negatives``.
      negatives: MinedNegatives.
      keys: (n,) typed keys.
      method: MethodConfig.

    Returns:
      SimPairs of Tokens.
    """
    pairs = assemble_pairs(
        pad_tokens(tokens_of(online.speech), negatives.tokens.speech.tokens.shape[1]),
        tokens_of(online.image),
        negatives.tokens.speech,
        negatives.tokens.image,
        negatives.valid.speech,
        negatives.valid.image,
    )
    if method.negatives != "queue":
        return pairs

    # A negative pair has momentum tokens on one side. The positive gets them on one randomly chosen
    # side too, or the matcher would learn which encoder made the tokens.
    speech_from_momentum = jax.vmap(jax.random.bernoulli)(fold_keys(keys, Site.POSITIVE_SIDES))
    return pairs._replace(
        speech=replace_first_rows(pairs.speech, speech_from_momentum, candidates.speech),
        image=replace_first_rows(pairs.image, ~speech_from_momentum, candidates.image),
    )


def match(model: C2FModel, params: Any, pairs: SimPairs, keys: jax.Array) -> jax.Array:
    """Score 3n pairs by the multimodal encoder, with dropout keyed by row.

    Args:
      model: C2FModel.
      params: parameters of the whole model.
      pairs: SimPairs.
      keys: (n,) typed keys.

    Returns:
      (3n, 2) logits, "no match" and "match".
    """
    # A row is in three pairs; each has its own dropout.
    pair_keys = jnp.concatenate(
        [
            fold_keys(keys, Site.POSITIVE_PAIRS),
            fold_keys(keys, Site.IMAGE_NEGATIVE_PAIRS),
            fold_keys(keys, Site.SPEECH_NEGATIVE_PAIRS),
        ]
    )
    return apply_model(model, params, pairs.speech, pairs.image, pair_keys, method="match")


def sim_metrics(
    sim_rows: jax.Array,
    sim_logits: jax.Array,
    pairs: SimPairs,
    negatives: MinedNegatives,
    method: MethodConfig,
) -> Metrics:
    """Average the SIM loss and its accuracies over the valid pairs.

    Args:
      sim_rows: (3n,) loss of each pair.
      sim_logits: (3n, 2).
      pairs: SimPairs.
      negatives: MinedNegatives.
      method: MethodConfig.

    Returns:
      Averages by name; ``queue_negatives`` is the share of negative images from the token queue.
    """
    # The positives are the first third.
    n = pairs.labels.shape[0] // 3
    correct = (jnp.argmax(sim_logits, axis=-1) == pairs.labels).astype(jnp.float32)
    metrics = {
        "sim_loss": Average.of(sim_rows, pairs.valid),
        "sim_accuracy": Average.of(correct, pairs.valid),
        "sim_positive_accuracy": Average.of(correct[:n], pairs.valid[:n]),
    }
    if method.negatives == "queue":
        from_queue = negatives.image_from_queue.astype(jnp.float32)
        metrics["queue_negatives"] = Average.of(from_queue, negatives.valid.image)
    return metrics


def update_momentum_and_queues(
    state: C2FTrainState,
    momentum: Pair[Encoded] | None,
    ids: jax.Array,
    method: MethodConfig,
    axis_name: AxisName,
) -> C2FTrainState:
    """Let the momentum parameters follow the updated ones, and enqueue the momentum embeddings.

    Args:
      state: C2FTrainState with updated parameters.
      momentum: Pair of Encoded of this device's rows; None without a momentum model.
      ids: (n,) int32 image ids.
      method: MethodConfig.
      axis_name: device axis.

    Returns:
      The state for the next step.
    """
    online_params = momentum_subset(state.params)
    if momentum is None:
        if state.momentum_params:
            # Warm-up: the momentum model will start from the online one.
            state = state.replace(momentum_params=online_params)
        return state

    assert method.momentum is not None

    # The queue gets the embeddings of step 1, by the momentum parameters before this update.
    momentum_params = update_momentum(state.momentum_params, online_params, method.momentum)
    queue = enqueue(state.queue, all_gather(queue_rows(momentum, ids), axis_name))
    token_queue = state.token_queue
    if token_queue.size:
        newest = all_gather(token_rows(momentum, ids, token_queue), axis_name)
        token_queue = enqueue(token_queue, newest)
    return state.replace(momentum_params=momentum_params, queue=queue, token_queue=token_queue)
