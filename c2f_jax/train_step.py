"""One C2F training step, the algorithm in numbered stages. Nothing else composes the objectives."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from c2f_jax import objectives
from c2f_jax.collectives import all_gather, axis_index, masked_mean, pmean, psum
from c2f_jax.embedding_queue import bank, bank_valid, enqueue
from c2f_jax.errors import UserError
from c2f_jax.models.c2f import (
    Encoded,
    clip_temperature,
    image_input,
    merge_params,
    momentum_subset,
    speech_input,
)
from c2f_jax.models.layers import fold_keys
from c2f_jax.momentum import update_momentum

NEGATIVE_POOLS = ("batch", "global", "queue")


class Rows(NamedTuple):
    """This device's rows of the global batch.

    Attributes:
      ids: (n,) int32 image ids.
      index: (n,) int32 rows in the global batch.
      keys: (n,) typed PRNG keys, one for each (seed, step, global row): all draws come from them.
    """

    ids: jax.Array
    index: jax.Array
    keys: jax.Array


@dataclass(frozen=True)
class MethodConfig:
    """What the paper's method is made of. Values are inherited from ALBEF and BLIP where the paper's are not known.

    Attributes:
      momentum: m of the momentum model; None trains without one, with online keys that receive gradient (plain
        in-batch contrastive learning; needs an empty queue and alpha = 0).
      alpha: weight of momentum distillation.
      alpha_ramp_steps: steps after the warm-up over which alpha grows from 0; 0 for none, None for one
        epoch, which the trainer knows.
      id_policy: "multi_positive", "mask" or "diagonal".
      sic_weight, sim_weight: L = sic_weight L_SIC + sim_weight L_SIM; sim_weight = 0 skips SIM altogether.
      negatives: pool of SIM's hard negatives: "batch" (own device), "global" (all devices) or "queue" (all devices and
        the token queue).
      mining_tau: temperature T of hard-negative mining, probability ~ exp(cosine / T); None for tau, as in ALBEF. A
        larger one draws easier negatives: a matcher that starts from nothing learns nothing from those that SIC, whose
        tau falls as it learns, cannot tell from the right ones either.
      warm_up_steps: steps of plain in-batch contrastive learning before the whole method (``warm_up``); 0 for
        pretrained encoders. Encoders that start from nothing change so fast that momentum keys lag behind, queued
        embeddings are told from fresh ones by their age alone, and hard negatives mean nothing yet.
      min_tau, max_tau: the temperature is clipped to this range after each update.
    """

    momentum: float | None = 0.995
    alpha: float = 0.4
    alpha_ramp_steps: int | None = 0
    id_policy: str = "multi_positive"
    sic_weight: float = 1.0
    sim_weight: float = 1.0
    negatives: str = "global"
    mining_tau: float | None = None
    warm_up_steps: int = 0
    min_tau: float = 0.001
    max_tau: float = 0.5

    def warm_up(self):
        """The method of the first ``warm_up_steps`` steps: SIC in the batch, without momentum model, queue or SIM."""
        return dataclasses.replace(self, momentum=None, alpha=0.0, sim_weight=0.0)

    def has_sim(self, step):
        """Whether SIM was trained by the end of ``step``; before, its scores are those of a random matcher."""
        return self.sim_weight > 0 and step > self.warm_up_steps

    def check(self, queue_size, token_queue_size):
        """Raise UserError for values that contradict each other."""
        if self.id_policy not in objectives.ID_POLICIES:
            raise UserError(f"method.id_policy={self.id_policy!r}: choose one of {', '.join(objectives.ID_POLICIES)}")
        if self.negatives not in NEGATIVE_POOLS:
            raise UserError(f"method.negatives={self.negatives!r}: choose one of {', '.join(NEGATIVE_POOLS)}")
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"method.alpha={self.alpha}: a weight from 0 to 1 is expected")
        if self.momentum is not None and not 0.0 <= self.momentum <= 1.0:
            raise UserError(f"method.momentum={self.momentum}: a value from 0 to 1, or None, is expected")
        if min(self.sic_weight, self.sim_weight) < 0 or not self.sic_weight + self.sim_weight > 0:
            raise UserError("method.sic_weight and method.sim_weight must not be negative, and one of them above 0")
        if queue_size < 0 or token_queue_size < 0:
            raise UserError(f"queue_size={queue_size}, token_queue_size={token_queue_size}: sizes are 0 or more")
        if self.warm_up_steps < 0:
            raise UserError(f"method.warm_up_steps={self.warm_up_steps}: 0 or more is expected")
        if self.alpha_ramp_steps is not None and self.alpha_ramp_steps < 0:
            raise UserError(f"method.alpha_ramp_steps={self.alpha_ramp_steps}: 0 or more, or None, is expected")
        if not 0 < self.min_tau <= self.max_tau:
            raise UserError(
                f"method.min_tau={self.min_tau}, method.max_tau={self.max_tau}: temperatures above 0, the lower one "
                "first, are expected"
            )
        if self.mining_tau is not None and not self.mining_tau > 0:
            raise UserError(f"method.mining_tau={self.mining_tau}: a temperature above 0, or None for tau, is expected")
        if self.momentum is None and (queue_size or token_queue_size or self.alpha):
            raise UserError(
                "method.momentum=None trains without a momentum model, which the queue and distillation need: "
                "set queue_size=0, token_queue_size=0 and method.alpha=0, or give method.momentum a value"
            )
        if (self.negatives == "queue") != (token_queue_size > 0):
            raise UserError(
                f"method.negatives={self.negatives!r} with token_queue_size={token_queue_size}: negatives from the "
                "queue need token_queue_size > 0, and no other pool uses it"
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
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    rows = Rows(ids, index, objectives.row_keys(step_key, index))
    alpha = objectives.alpha_at(state.step - method.warm_up_steps, method.alpha, method.alpha_ramp_steps)

    # 1. Momentum forward: no gradient, no dropout.
    momentum = None
    if method.momentum is not None:
        momentum = jax.lax.stop_gradient(encode(model, merge_params(state.momentum_params, state.frozen), batch))

    def loss_fn(trained):
        params = merge_params(trained, state.frozen)
        # 2. Online forward.
        speech, image = encode(model, params, batch, fold_keys(rows.keys, 0))
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
                for z, other in ((momentum[0].embedding, bank_image), (momentum[1].embedding, bank_speech))
            ]
            targets_s2i, targets_i2s = (objectives.distillation_targets(s, hard, keep, alpha) for s in soft)
        branch_loss = jax.vmap(objectives.sic_loss, in_axes=(0, 0, None, None, None))
        sic_rows = jnp.mean(branch_loss(*of_branches, targets_s2i, targets_i2s, keep), axis=0)
        sic = pmean(jnp.mean(sic_rows), axis_name)
        metrics = {"sic_loss": sic_rows, "tau": tau, "sic_accuracy": _hits(logits_s2i, hard, keep)}
        if not method.sim_weight:
            return method.sic_weight * sic, (metrics, momentum, global_ids)

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
        return method.sic_weight * sic + method.sim_weight * sim, (metrics | sim_metrics, momentum, global_ids)

    # 7. Gradients. The loss is averaged over the devices inside, the gradients outside: right for pmap and shard_map.
    (loss, (metrics, momentum, global_ids)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    grads = pmean(grads, axis_name)

    # 8. Optimiser step; the temperature stays in its range.
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = clip_temperature(params, method.min_tau, method.max_tau)

    # 9. Momentum update, and the global batch's momentum embeddings enter the queue.
    momentum_params, queue, token_queue = state.momentum_params, state.queue, state.token_queue
    if momentum is not None:
        momentum_params = update_momentum(momentum_params, momentum_subset(params), method.momentum)
        queue = enqueue(queue, all_gather(_queue_rows(momentum, ids), axis_name))
        if token_queue.size:
            token_queue = enqueue(token_queue, all_gather(_token_rows(momentum, ids, token_queue), axis_name))
    elif momentum_params:
        momentum_params = momentum_subset(params)  # warm-up: the momentum model will start from the online one

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


def sim_stage(params, token_queue, rows, online, momentum, logits, tau, *, model, method, axis_name):
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
        objectives.sample_hard_negatives(fold_keys(rows.keys, site), s, rows.ids, pool_ids, pool_valid)
        for site, s in zip((1, 2), scores, strict=True)
    )

    # 6. SIM over the 3n pairs.
    pair_speech, pair_image, labels, valid = objectives.assemble_pairs(
        _pad_tokens(_without_embedding(speech), pool_speech.tokens.shape[1]),
        _without_embedding(image),
        jax.tree.map(lambda x: x[speech_index], pool_speech),
        jax.tree.map(lambda x: x[image_index], pool_image),
        speech_valid,
        image_valid,
    )
    if method.negatives == "queue":
        # As in a negative pair, one side of a positive is the momentum encoder's: which one is drawn for each row.
        from_momentum = jax.vmap(jax.random.bernoulli)(fold_keys(rows.keys, 6))
        pair_speech = _replace_rows(pair_speech, from_momentum, candidates[0])
        pair_image = _replace_rows(pair_image, ~from_momentum, candidates[1])
    pair_keys = jnp.concatenate([fold_keys(rows.keys, site) for site in (3, 4, 5)])
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


def negative_pool(token_queue, rows, speech, image, logits, tau, pool, axis_name):
    """Candidates for SIM's hard negatives, with the SIC logits that they are drawn by.

    Args:
      token_queue: EmbeddingQueue with token sequences; read for "queue" alone.
      rows: Rows.
      speech, image: Encoded of ``rows``: candidates by their tokens, queries by their embeddings.
      logits: SIC logits (s2i, i2s) whose first N columns are the global batch.
      tau, pool, axis_name: temperature, one of ``NEGATIVE_POOLS``, device axis.

    Returns:
      speech and image candidates (Encoded without embeddings, leaves (C, ...)), logits (s2i, i2s) each (n, C),
      ids (C,), valid (C,). "batch": C = n, "global": C = N, "queue": C = N + token queue slots.
    """
    n = rows.ids.shape[0]
    speech_pool, image_pool, pool_ids = _without_embedding(speech), _without_embedding(image), rows.ids
    if pool == "batch":
        own = tuple(jax.lax.dynamic_slice_in_dim(x, rows.index[0], n, axis=1) for x in logits)
        return speech_pool, image_pool, own, pool_ids, jnp.ones((n,), bool)
    # Gathered with gradient: a negative on another device trains the encoders as one on this device would.
    speech_pool, image_pool, pool_ids = all_gather((speech_pool, image_pool, pool_ids), axis_name)
    total = pool_ids.shape[0]
    in_batch = tuple(x[:, :total] for x in logits)
    if pool == "global":
        return speech_pool, image_pool, in_batch, pool_ids, jnp.ones((total,), bool)
    entries = token_queue.entries
    scores = tuple(
        jnp.concatenate([own, objectives.similarity_logits(z, entries[name], tau)], axis=1)
        for own, z, name in ((in_batch[0], speech.embedding, "image"), (in_batch[1], image.embedding, "speech"))
    )
    padded = _pad_tokens(speech_pool, entries["speech_tokens"].shape[1])
    queued_speech = Encoded(None, entries["speech_tokens"].astype(padded.tokens.dtype), entries["speech_lengths"])
    queued_image = Encoded(None, entries["image_tokens"].astype(image_pool.tokens.dtype), entries["image_lengths"])
    append = lambda a, b: jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)  # noqa: E731
    return (
        append(padded, queued_speech),
        append(image_pool, queued_image),
        scores,
        jnp.concatenate([pool_ids, entries["id"]]),
        bank_valid(total, token_queue),
    )


def _replace_rows(pairs, chosen, encoded):
    """Pairs whose first n token sequences are those of ``encoded`` where ``chosen`` (n,)."""
    n, length = encoded.tokens.shape[:2]
    tokens = pairs.tokens.at[:n, :length].set(
        jnp.where(chosen[:, None, None], encoded.tokens, pairs.tokens[:n, :length])
    )
    return pairs._replace(tokens=tokens)


def _without_embedding(encoded):
    return encoded._replace(embedding=None)


def _pad_tokens(encoded, length):
    """Tokens padded to ``length``, where a shorter bucket meets the queue; the lengths hide the padding."""
    missing = length - encoded.tokens.shape[1]
    return encoded._replace(tokens=jnp.pad(encoded.tokens, ((0, 0), (0, missing), (0, 0))))


def _queue_rows(momentum, ids):
    return {"id": ids, "speech": momentum[0].embedding, "image": momentum[1].embedding}


def _token_rows(momentum, ids, token_queue):
    speech, image = _pad_tokens(momentum[0], token_queue.entries["speech_tokens"].shape[1]), momentum[1]
    return _queue_rows(momentum, ids) | {
        "speech_tokens": speech.tokens,
        "speech_lengths": speech.lengths,
        "image_tokens": image.tokens,
        "image_lengths": image.lengths,
    }


def _hits(logits, targets, valid):
    """(n,) 1.0 where the best valid column is a positive."""
    best = jnp.argmax(jnp.where(valid, logits, -jnp.inf), axis=-1)
    return (jnp.take_along_axis(targets, best[:, None], axis=-1)[:, 0] > 0).astype(jnp.float32)


def _average(value, axis_name):
    """A value, an array of per-row values, or (values, valid) as a clu Average over all devices."""
    values, mask = value if isinstance(value, tuple) else (value, None)
    return psum(clu_metrics.Average.from_model_output(jnp.atleast_1d(values), mask), axis_name)
