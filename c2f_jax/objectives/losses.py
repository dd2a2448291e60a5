"""C2F's losses in one call: banks, SIC with momentum distillation, hard negatives, SIM, queues."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.average import Average
from c2f_jax.objectives.checks import (
    check_arrays,
    check_ids,
    check_positive,
    check_range,
    check_rows,
)
from c2f_jax.objectives.collectives import (
    AxisName,
    all_gather,
    masked_mean,
    psum,
    row_numbers,
    varies,
)
from c2f_jax.objectives.contrast import (
    SicOptions,
    contrast_rows,
    is_used,
    make_banks,
    map_rows,
)
from c2f_jax.objectives.contrastive import Precision, l2_normalize
from c2f_jax.objectives.embedding_queue import Queues, enqueue_features, pad_rows
from c2f_jax.objectives.hard_negatives import HardNegatives
from c2f_jax.objectives.keys import Site, fold_keys, row_keys
from c2f_jax.objectives.matching import SimPairs, assemble_pairs, sim_loss
from c2f_jax.objectives.negative_pool import (
    NEGATIVE_POOLS,
    NegativePool,
    make_pool,
    take_negatives,
)
from c2f_jax.objectives.pairs import Features, Pair, Rows, as_features

Metrics = dict[str, Average]


class C2FLosses(NamedTuple):
    """What ``c2f_losses`` returns; train on sic + w sim.

    Attributes:
      sic: scalar L_SIC of the global batch, equal on all devices.
      sim: scalar L_SIM, likewise; 0 without ``match``.
      queues: the queues for the next step, the same on all devices; None without queues.
      metrics: averages over the global batch by name: ``sic_loss``, ``sic_accuracy``, and with
        ``match`` ``sim_loss``, ``sim_accuracy``, ``sim_positive_accuracy``; ``queue_negatives`` is
        the share of negative images from the token queue, ``queue_rejected`` the share of rows that
        stayed out of the queues because what would have entered was not finite.
    """

    sic: jax.Array
    sim: jax.Array
    queues: Queues | None
    metrics: Metrics


def c2f_losses(
    speech: Features,
    image: Features,
    ids: jax.Array,
    *,
    tau: jax.Array | float,
    key: jax.Array,
    match: Callable[[Any, Any], jax.Array] | None = None,
    momentum: Pair[Features] | None = None,
    queues: Queues | None = None,
    alpha: jax.Array | float = 0.0,
    row_valid: jax.Array | None = None,
    id_policy: str = "multi_positive",
    negatives: str = "global",
    negatives_per_row: int = 1,
    mining_rows: int | None = None,
    mining_tau: float | None = None,
    sigmoid_bias: jax.Array | float | None = None,
    branches: int = 1,
    chunk: int | None = None,
    precision: Precision = "highest",
    axis_name: AxisName = None,
) -> C2FLosses:
    """Compute L_SIC and L_SIM of a batch and the queues that follow: stages 3 to 6 of the method.

    * Banks: the momentum features of the global batch, then the queue.
    * SIC: online queries against the banks, L_SIC = 1/2 [CE(t_s2i, z_s . I*/tau) + CE(t_i2s,
      z_i . S*/tau)], with targets t = alpha softmax(z' . bank / tau) + (1 - alpha) y.
    * Hard negatives: drawn with probability softmax(cosine / T) among other ids.
    * SIM: ``match`` on one positive and 2 m negative pairs a row.
    * The momentum features enter the queues.

    Gradient reaches the online features, tau and whatever ``match`` closes over; none the momentum
    features and the queues. Under a device axis pass this device's rows. The losses are those of
    the global batch; average the gradients with ``pmean``, unless ``shard_map`` combines them
    (check_vma=True).

    Args:
      speech: Features of the n rows of this device by the online encoder. Embeddings are scaled to
        length 1 here, like all others.
      image: likewise. Row r of both is a pair.
      ids: (n,) int image ids; equal ids match each other.
      tau: scalar temperature, above 0.
      key: key of this step, the same on all devices. With jax's default, threefry, the draws are
        the same on any number of devices; with rbg they are not.
      match: (speech tokens, image tokens) -> (p, 2) logits "no match" and "match" of p pairs, n
        positives, then n m with a mined image, then n m with a mined recording. None for SIC alone.
      momentum: Pair of Features of the same rows by the momentum encoders, without dropout. None
        uses the online ones as banks, with gradient.
      queues: Queues; None for none. They need ``momentum``.
      alpha: weight of momentum distillation, from 0 to 1.
      row_valid: (n,) bool, False for the padding of a batch: these rows take no part in anything.
        None for no padding.
      id_policy: how columns of the same id count; see ``identity_targets``.
      negatives: where hard negatives come from: "batch" (this device), "global" (all devices, with
        gradient) or "queue" (all devices and the token queue, with momentum tokens).
      negatives_per_row: m, negatives of each row in each direction.
      mining_rows: B, which divides the global batch: a row draws its in-batch negatives from the B
        rows of its block, rows 0 to B - 1, B to 2 B - 1 and so on, whatever the devices. The tokens
        of a block are all that travels to a device, so that neither memory nor traffic grows with
        the batch. None for the whole batch.
      mining_tau: T; None for tau.
      sigmoid_bias: scalar; SIC is then SigLIP's ``sigmoid_loss`` of cosine / tau + bias. None for
        the softmax.
      branches: B; see ``branch_logits``.
      chunk: rows that SIC handles at a time, to save memory: without it, several float32 arrays
        (n, M) live until the backward pass. None for all at once.
      precision: of the similarities; see ``similarity_logits``.
      axis_name: device axis under ``pmap``, ``shard_map`` or ``vmap``; None without one, also under
        ``jit`` with sharded arrays.

    Returns:
      C2FLosses.

    Raises:
      ValueError: an argument has another shape, type or range, or two contradict each other.

    Reference:
      Zhou and Li 2024 (C2F); Li et al. 2021 (ALBEF), algorithm 1.

    >>> z = Features(jnp.eye(4), tokens=jnp.eye(4))
    >>> match = lambda s, i: jnp.stack([0 * s[:, 0], jnp.sum(s * i, axis=-1)], axis=-1)
    >>> out = c2f_losses(z, z, jnp.arange(4), tau=1.0, key=jax.random.key(0), match=match)
    >>> round(float(out.sic), 4), round(float(out.sim), 4)  # ln(1 + 3/e), (ln(1 + 1/e) + 2 ln 2)/3
    (0.7437, 0.5665)
    """
    check_ids("ids", ids)
    ids = jnp.asarray(ids)
    row_valid = None if row_valid is None else jnp.asarray(row_valid)
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    online = Pair(as_features("speech", speech), as_features("image", image))
    if momentum is not None:
        momentum = Pair(*map(as_features, ("momentum.speech", "momentum.image"), momentum))
        momentum = jax.lax.stop_gradient(momentum)
    _check_features(online, momentum, ids)
    _check_tokens(online, momentum, queues, negatives, with_sim=match is not None)
    _check_options(momentum, queues, alpha, negatives, sigmoid_bias, with_sim=match is not None)
    _check_numbers(tau, alpha, mining_tau, sigmoid_bias)
    _check_counts(negatives_per_row=negatives_per_row, mining_rows=mining_rows, chunk=chunk)
    if queues is not None and axis_name is not None:
        if any(varies(x, axis_name) for x in jax.tree.leaves(queues)):
            raise ValueError(
                "queues differ over axis_name; they must be whole on every device: P()"
            )

    rows = _number_rows(ids, key, row_valid, axis_name)
    check_arrays(ids=(ids, "int[n]"), row_valid=(rows.valid, "bool[n]"))
    if row_valid is not None:
        # Padding may hold anything, and 0 times NaN would reach the gradient.
        online, momentum = _fill_padding((online, momentum), row_valid, axis_name)

    online, momentum = _unit_length(online), None if momentum is None else _unit_length(momentum)

    # Step 3. Banks: the momentum embeddings of the global batch, then the queue.
    banks = make_banks(online if momentum is None else momentum, rows, queues, axis_name)

    # Step 5a. The pool that hard negatives are drawn from, by the similarities of SIC.
    pool = None
    if match is not None:
        # The token queue holds momentum tokens, so the batch's candidates have them too.
        candidates = momentum if negatives == "queue" and momentum is not None else online
        tokens = Pair(speech=candidates.speech.tokens, image=candidates.image.tokens)
        token_queue = None if queues is None else queues.tokens
        pool = make_pool(tokens, rows, token_queue, negatives, mining_rows, axis_name)

    # Step 4. SIC. Each row is on its own, so that rows can be handled chunk by chunk.
    options = SicOptions(
        tau, alpha, id_policy, negatives_per_row, mining_tau, sigmoid_bias, branches, precision
    )
    contrast = functools.partial(contrast_rows, banks=banks, pool=pool, options=options)
    found = map_rows(contrast, (_embeddings(online), _embeddings(momentum), rows), chunk)
    sic = masked_mean(found.loss, rows.valid, axis_name)
    metrics = {"sic_loss": Average.of(found.loss, rows.valid)}
    metrics["sic_accuracy"] = Average.of(found.hit, rows.valid)

    # Steps 5b and 6. Take the negatives; SIM over (1 + 2m) n pairs.
    sim = jnp.zeros_like(sic)
    if match is not None:
        assert pool is not None and found.negatives is not None
        pairs = make_pairs(online, momentum, pool, found.negatives, rows)
        logits = match(pairs.speech, pairs.image)
        check_arrays(match_logits=(logits, f"float[{pairs.labels.shape[0]}, 2]"))
        losses = sim_loss(logits, pairs.labels)
        sim = masked_mean(losses, pairs.valid, axis_name)
        metrics |= _sim_metrics(losses, logits, pairs)
        if negatives == "queue":
            drawn = found.negatives.image
            from_queue = (drawn.columns >= pool.in_batch).astype(jnp.float32).reshape(-1)
            counts = (drawn.valid & rows.valid[:, None]).reshape(-1)
            metrics["queue_negatives"] = Average.of(from_queue, counts)

    # The momentum features enter the queues, without rows that would poison them.
    if queues is not None and momentum is not None and _sizes(queues) != (0, 0):
        if not queues.tokens.size:
            momentum = Pair(*(Features(features.embedding) for features in momentum))
        finite = _finite_rows(momentum)
        metrics["queue_rejected"] = Average.of(1.0 - finite.astype(jnp.float32), rows.valid)
        newest, all_ids, keep = all_gather((momentum, ids, rows.valid & finite), axis_name)
        queues = enqueue_features(queues, newest, all_ids, keep)
    return C2FLosses(sic, sim, queues, psum(metrics, axis_name))


def make_pairs(
    online: Pair[Features],
    momentum: Pair[Features] | None,
    pool: NegativePool,
    negatives: Pair[HardNegatives],
    rows: Rows,
) -> SimPairs:
    """Make the (1 + 2m) n pairs of SIM.

    Args:
      online: Pair of Features.
      momentum: Pair of Features; read if the pool has a token queue.
      pool: NegativePool.
      negatives: Pair of HardNegatives (n, m).
      rows: Rows.

    Returns:
      SimPairs.
    """
    speech, image, positives = online.speech.tokens, online.image.tokens, None
    if pool.queued is not None:
        # The queue's tokens may be longer than this batch's.
        speech = pad_rows("speech.tokens", speech, pool.tokens.speech)
        image = pad_rows("image.tokens", image, pool.tokens.image)

        # A negative pair has momentum tokens on one side. The positive gets them on one randomly
        # chosen side too, or the matcher would learn which encoder made the tokens.
        assert momentum is not None  # see _check_options
        use_speech = jax.vmap(jax.random.bernoulli)(fold_keys(rows.keys, Site.POSITIVE_SIDES))
        positives = Pair(
            speech=_choose(
                use_speech,
                pad_rows("momentum.speech.tokens", momentum.speech.tokens, pool.tokens.speech),
                speech,
            ),
            image=_choose(
                ~use_speech,
                pad_rows("momentum.image.tokens", momentum.image.tokens, pool.tokens.image),
                image,
            ),
        )
    drawn = take_negatives(pool, negatives.speech, negatives.image)
    return assemble_pairs(
        speech,
        image,
        drawn.speech,
        drawn.image,
        negatives.speech.valid,
        negatives.image.valid,
        row_valid=rows.valid,
        positives=positives,
    )


def _unit_length(features: Pair[Features]) -> Pair[Features]:
    """Scale the embeddings to length 1: products of longer ones would be no cosines."""
    return Pair(*(side._replace(embedding=l2_normalize(side.embedding)) for side in features))


def _embeddings(features: Pair[Features] | None) -> Pair[jax.Array] | None:
    """Return the embeddings of both modalities."""
    if features is None:
        return None
    return Pair(speech=features.speech.embedding, image=features.image.embedding)


def _choose(chosen: jax.Array, tree: Any, other: Any) -> Any:
    """Take the chosen rows of every leaf from one pytree and the rest from another."""

    def of_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(of_leaf, tree, other)


def _fill_padding(tree: Any, row_valid: jax.Array, axis_name: AxisName) -> Any:
    """Give padding zeros, and the lengths and masks of real rows.

    A sequence without a single token would be NaN in a mean or a softmax of ``match``.
    """
    some = _largest(jnp.any(row_valid), axis_name)

    def of_leaf(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return _choose(row_valid, x, jnp.zeros_like(x))
        numbers = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        lowest = jnp.full_like(numbers, jnp.iinfo(numbers.dtype).min)
        largest = _largest(jnp.max(_choose(row_valid, numbers, lowest), axis=0), axis_name)
        spread = jnp.zeros_like(numbers) + largest[None]  # with the sharding of the rows
        filled = jnp.where(some, spread, numbers)
        return _choose(row_valid, x, filled.astype(x.dtype))

    return jax.tree.map(of_leaf, tree)


def _largest(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Return the largest over the devices."""
    return x if axis_name is None else jax.lax.pmax(x.astype(jnp.int32), axis_name).astype(x.dtype)


def _finite_rows(tree: Any) -> jax.Array:
    """Return which rows are finite in every floating-point leaf, (n,) bool."""
    finite = []
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jnp.floating):
            finite.append(jnp.all(jnp.isfinite(x).reshape(x.shape[0], -1), axis=-1))
    return functools.reduce(jnp.logical_and, finite)


def _sim_metrics(losses: jax.Array, logits: jax.Array, pairs: SimPairs) -> Metrics:
    """Average the SIM loss and its accuracies over the valid pairs.

    Args:
      losses: (p,) loss of each pair.
      logits: (p, 2).
      pairs: SimPairs.

    Returns:
      Averages by name.
    """
    correct = (jnp.argmax(logits, axis=-1) == pairs.labels).astype(jnp.float32)
    is_positive = pairs.labels == 1
    return {
        "sim_loss": Average.of(losses, pairs.valid),
        "sim_accuracy": Average.of(correct, pairs.valid),
        "sim_positive_accuracy": Average.of(correct, pairs.valid & is_positive),
    }


def _number_rows(
    ids: jax.Array, key: jax.Array, row_valid: jax.Array | None, axis_name: AxisName
) -> Rows:
    """Number this device's rows in the global batch and make their keys."""
    numbers = row_numbers(ids, axis_name)
    valid = jnp.ones_like(ids, bool) if row_valid is None else row_valid
    return Rows(ids, numbers, row_keys(key, numbers), valid)


def _sizes(queues: Queues) -> tuple[int, int]:
    """Return the numbers of slots of both queues."""
    return queues.embeddings.size, queues.tokens.size


def _check_features(online: Pair[Features], momentum: Pair[Features] | None, ids: Any) -> None:
    """Raise ValueError unless all features have one number of rows and one width."""
    named = {"speech": online.speech, "image": online.image}
    if momentum is not None:
        named |= {"momentum.speech": momentum.speech, "momentum.image": momentum.image}
    embeddings = {
        f"{name}.embedding": (features.embedding, "float[n, D]") for name, features in named.items()
    }
    n = check_arrays(ids=(ids, "int[n]"), **embeddings)["n"]
    if n == 0:
        raise ValueError("ids has shape (0,); there must be at least one row")
    for name, features in named.items():
        check_rows(f"{name}.tokens", features.tokens, n)


def _check_tokens(
    online: Pair[Features],
    momentum: Pair[Features] | None,
    queues: Queues | None,
    negatives: str,
    with_sim: bool,
) -> None:
    """Raise ValueError where tokens that something reads are missing."""
    needed: dict[str, Features] = {}
    if with_sim:
        needed |= {"speech": online.speech, "image": online.image}
    keeps_tokens = isinstance(queues, Queues) and queues.tokens.size > 0
    if momentum is not None and (keeps_tokens or with_sim and negatives == "queue"):
        needed |= {"momentum.speech": momentum.speech, "momentum.image": momentum.image}
    for name, features in needed.items():
        if not jax.tree.leaves(features.tokens):
            raise ValueError(
                f"{name}.tokens is empty; match and the token queue read tokens, so give "
                "Features(embedding, tokens), or match=None and no token queue for SIC alone"
            )


def _check_numbers(
    tau: Any,
    alpha: Any,
    mining_tau: Any,
    sigmoid_bias: Any,
) -> None:
    """Raise ValueError unless all are scalars in their ranges."""
    check_arrays(tau=(tau, "number[]"), alpha=(alpha, "number[]"))
    check_positive("tau", tau)
    check_range("alpha", alpha, 0.0, 1.0)
    if mining_tau is not None:
        check_arrays(mining_tau=(mining_tau, "number[]"))
        check_positive("mining_tau", mining_tau)
    if sigmoid_bias is not None:
        check_arrays(sigmoid_bias=(sigmoid_bias, "number[]"))


def _check_counts(**counts: Any) -> None:
    """Raise ValueError unless each is None or an int of at least 1."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be an int of at least 1")


def _check_options(
    momentum: Pair[Features] | None,
    queues: Queues | None,
    alpha: jax.Array | float,
    negatives: str,
    sigmoid_bias: jax.Array | float | None,
    with_sim: bool,
) -> None:
    """Raise ValueError where options contradict each other."""
    if queues is not None and not isinstance(queues, Queues):
        raise ValueError(
            f"queues is a {type(queues).__name__}; it must be Queues(embeddings, tokens)"
        )
    if negatives not in NEGATIVE_POOLS:
        raise ValueError(
            f"negatives is {negatives!r}; it must be one of {', '.join(NEGATIVE_POOLS)}"
        )
    if momentum is None:
        if queues is not None and _sizes(queues) != (0, 0):
            raise ValueError("momentum is None; the queues hold momentum features")
        if is_used(alpha):
            raise ValueError("momentum is None; distillation needs it: give alpha=0.0")
    if with_sim and negatives == "queue" and (queues is None or not queues.tokens.size):
        raise ValueError(
            'negatives is "queue"; it needs a token queue: see token_size of create_queues'
        )
    if sigmoid_bias is not None and is_used(alpha):
        raise ValueError(
            "sigmoid_bias is given; distillation is of the softmax only: give alpha=0.0"
        )
