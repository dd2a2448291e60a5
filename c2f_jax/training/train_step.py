"""One C2F training step, the algorithm in numbered stages. Nothing else composes the objectives."""

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from c2f_jax import objectives
from c2f_jax.models.c2f import image_input, speech_input
from c2f_jax.models.parameters import clip_temperature, merge_params, momentum_subset
from c2f_jax.objectives.collectives import all_gather, axis_index, masked_mean, pmean, psum
from c2f_jax.objectives.embedding_queue import bank, bank_valid, enqueue
from c2f_jax.objectives.keys import Site, fold_keys, step_key
from c2f_jax.objectives.momentum import update_momentum
from c2f_jax.training.negative_pool import (
    Rows,
    negative_pool,
    pad_tokens,
    queue_rows,
    replace_rows,
    token_rows,
    without_embedding,
)


def train_step(state, batch, *, model, optimizer, method, axis_name=None):
    """Take one step of C2F on this device's share of the global batch.

    With ``global`` and ``queue`` negatives the result depends on the global batch and the seed alone, not on the number
    of devices: every draw is keyed by (seed, step, global row) and every mean is over the global batch.

    Args:
      state: C2FTrainState, the same on all devices.
      batch: waveform (n, S), speech_lengths (n,), image (n, H, W, 3) uint8, image_id (n,) int32; row r of device d is
        row d n + r of the global batch. From a feature cache: speech_tokens (n, T, C), image_tokens (n, P, C).
      model: C2FModel.
      optimizer: optax transformation.
      method: MethodConfig.
      axis_name: device axis under pmap or shard_map; None on one device.

    Returns:
      The next state, and metrics: name -> clu Average (sum and count, merged over steps by the caller).

    Source: C2F, as specified in sections "SIC", "SIM" and "momentum distillation"; ALBEF, algorithm 1.
    """
    ids = batch["image_id"]
    index = axis_index(axis_name) * ids.shape[0] + jnp.arange(ids.shape[0])
    rows = Rows(ids, index, objectives.row_keys(step_key(state.rng, state.step), index))
    alpha = objectives.alpha_at(
        state.step - method.warm_up_steps, method.alpha, method.alpha_ramp_steps
    )

    # 1. Momentum forward: no gradient, no dropout.
    momentum = None
    if method.momentum is not None:
        momentum = jax.lax.stop_gradient(
            encode(model, merge_params(state.momentum_params, state.frozen), batch)
        )

    def loss_fn(trained):
        params = merge_params(trained, state.frozen)
        # 2. Online forward.
        speech, image = encode(model, params, batch, fold_keys(rows.keys, Site.ENCODERS))
        tau = model.apply({"params": params}, method="tau")

        # 3. Banks: the global batch first, then the queue.
        key_speech_z, key_image_z, bank_ids = all_gather(
            (speech.embedding, image.embedding, ids)
            if momentum is None
            else (momentum[0].embedding, momentum[1].embedding, ids),
            axis_name,
        )
        global_ids = bank_ids
        valid = bank_valid(global_ids.shape[0], state.queue)
        bank_speech = bank(key_speech_z, state.queue, "speech")
        bank_image = bank(key_image_z, state.queue, "image")
        bank_ids = bank(bank_ids, state.queue, "id")

        # 4. SIC of each branch with identity targets, softened by momentum distillation, which takes all branches
        # together for the teacher.
        of_branches = [  # (M, n, N + K)
            objectives.branch_logits(z, other, tau, model.branches)
            for z, other in ((speech.embedding, bank_image), (image.embedding, bank_speech))
        ]
        logits_s2i, logits_i2s = (jnp.mean(logits, axis=0) for logits in of_branches)
        hard, keep = objectives.identity_targets(ids, bank_ids, index, valid, method.id_policy)
        targets_s2i = targets_i2s = hard
        if momentum is not None and method.alpha:
            soft = [
                objectives.similarity_logits(z, other, tau)
                for z, other in (
                    (momentum[0].embedding, bank_image),
                    (momentum[1].embedding, bank_speech),
                )
            ]
            targets_s2i, targets_i2s = (
                objectives.distillation_targets(s, hard, keep, alpha) for s in soft
            )
        branch_loss = jax.vmap(objectives.sic_loss, in_axes=(0, 0, None, None, None))
        sic_rows = jnp.mean(branch_loss(*of_branches, targets_s2i, targets_i2s, keep), axis=0)
        sic = pmean(jnp.mean(sic_rows), axis_name)
        metrics = {"sic_loss": sic_rows, "tau": tau, "sic_accuracy": _hits(logits_s2i, hard, keep)}
        if not method.sim_weight:
            return sic, (metrics, momentum, global_ids)

        # 5. and 6. Hard negatives and SIM.
        sim, sim_metrics = sim_stage(
            params,
            state.token_queue,
            rows,
            (speech, image),
            momentum,
            (logits_s2i, logits_i2s),
            tau,
            model=model,
            method=method,
            axis_name=axis_name,
        )
        return sic + method.sim_weight * sim, (
            metrics | sim_metrics,
            momentum,
            global_ids,
        )

    # 7. Gradients. The loss is averaged over the devices inside, the gradients outside: right for pmap and shard_map.
    (loss, (metrics, momentum, global_ids)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    grads = pmean(grads, axis_name)

    # 8. Optimiser step; the temperature stays in its range.
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = clip_temperature(params, method.min_tau, method.max_tau)

    # 9. Momentum update, and the global batch's momentum embeddings enter the queue.
    momentum_params, queue, token_queue = state.momentum_params, state.queue, state.token_queue
    if momentum is not None:
        momentum_params = update_momentum(momentum_params, momentum_subset(params), method.momentum)
        queue = enqueue(queue, all_gather(queue_rows(momentum, ids), axis_name))
        if token_queue.size:
            token_queue = enqueue(
                token_queue, all_gather(token_rows(momentum, ids, token_queue), axis_name)
            )
    elif momentum_params:
        momentum_params = momentum_subset(
            params
        )  # warm-up: the momentum model will start from the online one

    metrics |= {"loss": loss, "gradient_norm": optax.global_norm(grads), "alpha": alpha}
    state = state.replace(
        step=state.step + 1,
        params=params,
        momentum_params=momentum_params,
        opt_state=opt_state,
        queue=queue,
        token_queue=token_queue,
    )
    return state, {name: _average(value, axis_name) for name, value in metrics.items()}


def sim_stage(
    params, token_queue, rows, online, momentum, logits, tau, *, model, method, axis_name
):
    """Stages 5 and 6: mine hard negatives, match 3n pairs.

    Args:
      params: of the whole model.
      token_queue: EmbeddingQueue with token sequences; read for "queue" negatives alone.
      rows: Rows.
      online, momentum: (speech, image), each Encoded of ``rows``; ``momentum`` is read for "queue" negatives alone.
      logits: SIC logits (s2i, i2s) whose first N columns are the global batch.
      tau: temperature.
      model, method, axis_name: as in ``train_step``.

    Returns:
      L_SIM, and its metrics: name -> (values, valid).
    """
    n = rows.ids.shape[0]
    speech, image = candidates = online
    if method.negatives == "queue":
        # The queue holds momentum tokens. With online tokens in the positives and in the batch's candidates, the
        # matcher would learn which encoder made the tokens of a pair instead of what they say.
        candidates = [o._replace(tokens=m.tokens) for o, m in zip(online, momentum, strict=True)]
    # 5. Hard negatives, drawn with probability softmax(cosine / mining temperature), never of the same id.
    pool_speech, pool_image, scores, pool_ids, pool_valid = negative_pool(
        token_queue, rows, *candidates, logits, tau, method.negatives, axis_name
    )
    if method.mining_tau is not None:
        scores = [s * (tau / method.mining_tau) for s in scores]
    (image_index, image_valid), (speech_index, speech_valid) = (
        objectives.sample_hard_negatives(
            fold_keys(rows.keys, site), s, rows.ids, pool_ids, pool_valid
        )
        for site, s in zip((Site.IMAGE_NEGATIVES, Site.SPEECH_NEGATIVES), scores, strict=True)
    )

    # 6. SIM over the 3n pairs.
    pair_speech, pair_image, labels, valid = objectives.assemble_pairs(
        pad_tokens(without_embedding(speech), pool_speech.tokens.shape[1]),
        without_embedding(image),
        jax.tree.map(lambda x: x[speech_index], pool_speech),
        jax.tree.map(lambda x: x[image_index], pool_image),
        speech_valid,
        image_valid,
    )
    if method.negatives == "queue":
        # As in a negative pair, one side of a positive is the momentum encoder's: which one is drawn for each row.
        from_momentum = jax.vmap(jax.random.bernoulli)(fold_keys(rows.keys, Site.POSITIVE_SIDES))
        pair_speech = replace_rows(pair_speech, from_momentum, candidates[0])
        pair_image = replace_rows(pair_image, ~from_momentum, candidates[1])
    pair_keys = jnp.concatenate(
        [
            fold_keys(rows.keys, site)
            for site in (Site.POSITIVE_PAIRS, Site.IMAGE_NEGATIVE_PAIRS, Site.SPEECH_NEGATIVE_PAIRS)
        ]
    )
    sim_logits = model.apply({"params": params}, pair_speech, pair_image, pair_keys, method="match")
    sim_rows = objectives.sim_loss(sim_logits, labels)
    correct = (jnp.argmax(sim_logits, axis=-1) == labels).astype(jnp.float32)
    from_queue = (image_index >= pool_ids.shape[0] - token_queue.size).astype(jnp.float32)
    metrics = {
        "sim_loss": (sim_rows, valid),
        "sim_accuracy": (correct, valid),
        "sim_positive_accuracy": (correct[:n], valid[:n]),
    }
    if method.negatives == "queue":
        metrics["queue_negatives"] = (from_queue, image_valid)
    return masked_mean(sim_rows, valid, axis_name), metrics


def encode(model, params, batch, keys=None):
    """Both modalities of a batch: (Encoded speech, Encoded image)."""
    variables = {"params": params}
    speech = model.apply(variables, *speech_input(batch), keys, method="encode_speech")
    return speech, model.apply(variables, image_input(batch), keys, method="encode_image")


def _hits(logits, targets, valid):
    """(n,) 1.0 where the best valid column is a positive."""
    best = jnp.argmax(jnp.where(valid, logits, -jnp.inf), axis=-1)
    return (jnp.take_along_axis(targets, best[:, None], axis=-1)[:, 0] > 0).astype(jnp.float32)


def _average(value, axis_name):
    """A value, an array of per-row values, or (values, valid) as a clu Average over all devices."""
    values, mask = value if isinstance(value, tuple) else (value, None)
    return psum(clu_metrics.Average.from_model_output(jnp.atleast_1d(values), mask), axis_name)
