"""The losses of the paper, written a second time from its equations: one device, no padding, no
chunks, nothing shared with c2f_jax.objectives but the random draws."""

import jax
import jax.numpy as jnp

from c2f_jax.objectives import C2FLosses, Site, fold_keys, row_keys, sample_hard_negatives


def oracle_losses(
    speech, image, ids, *, tau, key, match, momentum, queues, alpha, negatives="global",
    axis_name=None,
):  # fmt: skip
    """L_SIC and L_SIM as ``c2f_losses`` defines them, in the precision of its arguments."""
    assert axis_name is None
    queue, n = queues.embeddings, len(ids)
    written = jnp.arange(n + queue.size) < n + queue.count
    bank_ids = jnp.append(ids, queue.entries["id"])
    same = (ids[:, None] == bank_ids) & written
    y = same / same.sum(axis=1, keepdims=True)

    def log_softmax(logits):
        largest = jnp.max(jnp.where(written, logits, -jnp.inf), axis=1, keepdims=True)
        total = jnp.sum(jnp.where(written, jnp.exp(logits - largest), 0), axis=1, keepdims=True)
        return logits - largest - jnp.log(total)

    losses, logits = [], []
    for z, teacher, keys, stored in (
        (speech, momentum.speech, momentum.image, "image"),
        (image, momentum.image, momentum.speech, "speech"),
    ):
        bank = jnp.concatenate([keys.embedding, queue.entries[stored]])
        bank = jax.lax.stop_gradient(bank)
        pseudo = jnp.exp(log_softmax(teacher.embedding @ bank.T / tau)) * written
        target = jax.lax.stop_gradient(alpha * pseudo + (1 - alpha) * y)
        logits.append(z.embedding @ bank.T / tau)
        losses.append(-jnp.sum(target * log_softmax(logits[-1]) * written, axis=1))
    sic = jnp.mean((losses[0] + losses[1]) / 2)

    # The draws: one key for each row, folded with what the draw is for.
    keys = row_keys(key, jnp.arange(n))
    pool_ids, pool_written = ids, jnp.ones(n, bool)
    candidates = [speech.tokens, image.tokens]
    positives = candidates
    if negatives == "queue":
        tokens, teachers = queues.tokens, [momentum.speech.tokens, momentum.image.tokens]
        teachers = jax.lax.stop_gradient(teachers)
        pool_ids = jnp.append(ids, tokens.entries["id"])
        pool_written = jnp.arange(n + tokens.size) < n + tokens.count
        queued = [tokens.entries[name] for name in ("speech_tokens", "image_tokens")]
        candidates = [jnp.concatenate([a, b.astype(a.dtype)]) for a, b in zip(teachers, queued)]  # noqa: B905
        of_queue = [tokens.entries[name].T for name in ("image", "speech")]
        z = [speech.embedding, image.embedding]
        logits = [jnp.append(x[:, :n], a @ b / tau, 1) for x, a, b in zip(logits, z, of_queue)]  # noqa: B905
        half = jnp.float32(0.5)
        chosen = [jax.random.bernoulli(k, half) for k in fold_keys(keys, Site.POSITIVE_SIDES)]
        chosen = jnp.stack(chosen)[:, None, None]
        online = [speech.tokens, image.tokens]
        positives = [jnp.where(c, t, o) for c, t, o in zip((chosen, ~chosen), teachers, online)]  # noqa: B905
    else:
        logits = [x[:, :n] for x in logits]

    mined = []
    for site, x in zip((Site.IMAGE_NEGATIVES, Site.SPEECH_NEGATIVES), logits):  # noqa: B905
        draw = sample_hard_negatives(fold_keys(keys, site), x, ids, pool_ids, pool_written)
        mined.append(draw.columns)

    # -log p(match) of n positives, -log p(no match) of 2 n negatives.
    total = 0.0
    for label, s, i in (
        (1, positives[0], positives[1]),
        (0, speech.tokens, candidates[1][mined[0]]),
        (0, candidates[0][mined[1]], image.tokens),
    ):
        of_label, of_other = match(s, i)[:, label], match(s, i)[:, 1 - label]
        total += jnp.sum(jnp.logaddexp(of_label, of_other) - of_label)
    return C2FLosses(sic, total / (3 * n), queues, {})
