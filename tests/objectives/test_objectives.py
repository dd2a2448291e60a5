"""The objectives against float64 numpy loops, finite differences, and values known in closed
form."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rounding import EPSILON
from scipy import stats

from c2f_jax import objectives
from c2f_jax.objectives.collectives import all_gather, masked_mean, pmean
from c2f_jax.objectives.embedding_queue import bank, bank_valid, create_queue, enqueue
from c2f_jax.objectives.momentum import update_momentum

pytestmark = pytest.mark.usefixtures("no_rank_promotion")
RNG = np.random.default_rng


def unit_rows(rng, rows, width=6):
    z = rng.normal(size=(rows, width))
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def f32(*arrays):
    arrays = [jnp.asarray(a, jnp.float32) for a in arrays]
    return arrays if len(arrays) > 1 else arrays[0]


def central_difference(f, x, step=1e-6):
    """Gradient of a float64 function of an array, one entry at a time."""
    x, gradient = np.array(x, np.float64), np.zeros(np.shape(x))
    for index in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            ends.append(f(moved))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


# The oracles: float64, one entry at a time, straight from the equations.


def similarity_oracle(queries, keys, tau):
    return np.array(
        [[sum(q[d] * b[d] for d in range(len(q))) / tau for b in keys] for q in queries]
    )


def softmax_oracle(row, valid):
    top = max(logit for logit, v in zip(row, valid, strict=True) if v)
    weights = [math.exp(logit - top) if v else 0.0 for logit, v in zip(row, valid, strict=True)]
    return np.array(weights) / sum(weights)


def cross_entropy_oracle(logits, targets, valid):
    rows = []
    for row, target, columns in zip(
        logits, targets, np.broadcast_to(valid, logits.shape), strict=True
    ):
        kept = [(logit, t) for logit, t, v in zip(row, target, columns, strict=True) if v]
        top = max(logit for logit, _ in kept)
        log_sum = top + math.log(sum(math.exp(logit - top) for logit, _ in kept))
        rows.append(-sum(t * (logit - log_sum) for logit, t in kept))
    return np.array(rows)


def identity_oracle(ids, bank_ids, pairs, bank_valid, policy):
    targets, valid = np.zeros((len(ids), len(bank_ids))), np.zeros((len(ids), len(bank_ids)), bool)
    for i, own in enumerate(ids):
        for j, other in enumerate(bank_ids):
            pair, same = j == pairs[i], other == own and bank_valid[j]
            targets[i, j] = (pair or same) if policy == "multi_positive" else pair
            valid[i, j] = bank_valid[j] and (pair or not same or policy != "mask")
        targets[i] /= targets[i].sum()
    return targets, valid


def identity_args(case):
    return [jnp.asarray(case[name]) for name in ("ids", "bank_ids", "pairs", "bank_valid")]


def infonce_oracle(z, keys, tau):
    """Plain InfoNCE of one direction, the pair on the diagonal."""
    logits = similarity_oracle(z, keys, tau)
    return np.mean(
        [-math.log(softmax_oracle(row, [True] * len(row))[i]) for i, row in enumerate(logits)]
    )


@pytest.fixture
def case():
    """Five queries, a bank of five and a queue of seven with two unwritten slots, whose id 0 is
    also a query's."""
    rng = RNG(0)
    bank_valid = np.array([True] * 10 + [False] * 2)
    ids = np.array([3, 0, 4, 3, 9])
    return {
        "z": unit_rows(rng, 5),
        "keys": unit_rows(rng, 12),
        "logits": rng.normal(size=(5, 12)) * 4,
        "momentum_logits": rng.normal(size=(5, 12)) * 4,
        "ids": ids,
        "tau": 0.13,
        "pairs": np.arange(5),
        "bank_ids": np.concatenate([ids, [9, 0, 7, 3, 3, 0, 0]]),
        "bank_valid": bank_valid,
    }


def test_similarity_logits_and_their_gradients(case):
    z, keys, tau = case["z"], case["keys"], case["tau"]
    weights = RNG(1).normal(size=(5, 12))
    found = objectives.similarity_logits(*f32(z, keys, tau))
    np.testing.assert_allclose(found, similarity_oracle(z, keys, tau), atol=2e-5)
    loss = lambda z, keys, tau: jnp.sum(objectives.similarity_logits(z, keys, tau) * f32(weights))  # noqa: E731
    found = jax.grad(loss, argnums=(0, 1, 2))(*f32(z, keys, tau))
    oracle = lambda z, keys, tau: np.sum(similarity_oracle(z, keys, tau) * weights)  # noqa: E731
    np.testing.assert_allclose(
        found[0], central_difference(lambda x: oracle(x, keys, tau), z), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        found[1], central_difference(lambda x: oracle(z, x, tau), keys), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        found[2],
        central_difference(lambda x: oracle(z, keys, x), tau),
        atol=16 * EPSILON * np.sum(np.abs(similarity_oracle(z, keys, tau) * weights)) / tau,
    )


def test_similarities_are_float32_for_bfloat16_embeddings(case):
    z, keys = (x.astype(jnp.bfloat16) for x in f32(case["z"], case["keys"]))
    logits = objectives.similarity_logits(z, keys, 0.07)
    assert logits.dtype == jnp.float32
    exact = similarity_oracle(np.asarray(z, np.float64), np.asarray(keys, np.float64), 0.07)
    np.testing.assert_allclose(logits, exact, atol=1e-5)


@pytest.mark.parametrize("policy", objectives.ID_POLICIES)
def test_identity_targets_follow_the_policy(case, policy):
    targets, valid = objectives.identity_targets(*identity_args(case), policy)
    expected_targets, expected_valid = identity_oracle(
        *map(np.asarray, identity_args(case)), policy
    )
    np.testing.assert_allclose(targets, expected_targets, atol=1e-7)
    np.testing.assert_array_equal(valid, expected_valid)


def test_identity_targets_refuse_an_unknown_policy(case):
    with pytest.raises(
        ValueError, match="unknown id policy 'first'.*multi_positive, mask, diagonal"
    ):
        objectives.identity_targets(*identity_args(case), "first")


@pytest.mark.parametrize("policy", objectives.ID_POLICIES)
def test_target_rows_sum_to_one_and_unwritten_slots_get_zero(case, policy):
    hard, valid = objectives.identity_targets(*identity_args(case), policy)
    soft = objectives.distillation_targets(f32(case["momentum_logits"]), hard, valid, 0.4)
    for targets in (hard, soft):
        # Twelve numbers, each rounded when it is divided and when it is added.
        np.testing.assert_allclose(np.sum(targets, axis=1), 1.0, atol=2 * 12 * EPSILON)
        assert not np.any(np.asarray(targets)[:, ~case["bank_valid"]])
    assert not np.any(np.asarray(soft)[~np.asarray(valid)]) and np.all(
        np.asarray(soft)[np.asarray(valid)] > 0
    )


@pytest.mark.parametrize("policy", ["multi_positive", "mask"])
def test_distillation_targets_blend_the_momentum_softmax(case, policy):
    hard, valid = identity_oracle(*map(np.asarray, identity_args(case)), policy)
    logits = case["momentum_logits"]
    expected = [
        0.3 * softmax_oracle(row, v) + 0.7 * y
        for row, v, y in zip(logits, valid, hard, strict=True)
    ]
    found = objectives.distillation_targets(*f32(logits, hard), jnp.asarray(valid), 0.3)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    pulled = jax.grad(
        lambda x: jnp.sum(
            objectives.distillation_targets(x, f32(hard), jnp.asarray(valid), 0.3) ** 2
        )
    )
    assert not np.any(pulled(f32(logits))), "targets carry no gradient"


@pytest.mark.parametrize("per_row", [False, True])
def test_soft_target_cross_entropy_and_its_gradient(case, per_row):
    valid = identity_oracle(*map(np.asarray, identity_args(case)), "mask")[1]
    valid = valid if per_row else case["bank_valid"][None]
    columns = np.broadcast_to(valid, (5, 12))
    targets = np.stack(
        [softmax_oracle(*row) for row in zip(case["momentum_logits"], columns, strict=True)]
    )
    # Masked columns hold the largest logits: they must not reach the softmax.
    logits = np.where(valid, case["logits"], 50.0)
    loss = lambda x: objectives.soft_target_cross_entropy(x, f32(targets), jnp.asarray(valid))  # noqa: E731
    np.testing.assert_allclose(
        loss(f32(logits)), cross_entropy_oracle(logits, targets, valid), rtol=1e-5
    )
    gradient = jax.grad(lambda x: jnp.sum(loss(x) * jnp.arange(1.0, 6.0)))(f32(logits))
    expected = central_difference(
        lambda x: cross_entropy_oracle(x, targets, valid) @ np.arange(1.0, 6.0), logits
    )
    np.testing.assert_allclose(gradient, expected, atol=2e-5)


def test_cross_entropy_stays_finite_at_the_smallest_temperature():
    logits = f32([[1000.0, -1000.0, 0.0]])
    loss, gradient = jax.value_and_grad(
        lambda x: objectives.soft_target_cross_entropy(
            x, f32([[0.0, 1.0, 0.0]]), jnp.array([[True, True, False]])
        )[0]
    )(logits)
    assert float(loss) == 2000.0
    np.testing.assert_allclose(gradient, [[1.0, -1.0, 0.0]], atol=1e-6)


def test_sic_loss_is_the_mean_of_both_directions(case):
    rng, valid = RNG(2), case["bank_valid"]
    s2i, i2s = case["logits"], case["momentum_logits"]
    targets = [
        np.stack([softmax_oracle(row, valid) for row in rng.normal(size=(5, 12))]) for _ in range(2)
    ]
    found = objectives.sic_loss(*f32(s2i, i2s, *targets), jnp.asarray(valid)[None])
    expected = (
        cross_entropy_oracle(s2i, targets[0], valid) + cross_entropy_oracle(i2s, targets[1], valid)
    ) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Each direction has its own logits and targets: exchanged arguments would be another value.
    assert (
        np.abs(
            found - objectives.sic_loss(*f32(i2s, s2i, *targets), jnp.asarray(valid)[None])
        ).max()
        > 0.1
    )


def test_without_queue_and_distillation_sic_is_symmetric_infonce():
    rng, n, tau = RNG(3), 6, 0.07
    speech, image, key_speech, key_image = (unit_rows(rng, n) for _ in range(4))
    ids = jnp.arange(n) + 5

    def loss(speech, image, tau):
        hard, valid = objectives.identity_targets(ids, ids, jnp.arange(n), jnp.ones(n, bool))
        s2i = objectives.similarity_logits(speech, f32(key_image), tau)
        i2s = objectives.similarity_logits(image, f32(key_speech), tau)
        soft = objectives.distillation_targets(s2i, hard, valid, 0.0)
        return jnp.mean(objectives.sic_loss(s2i, i2s, soft, soft, valid))

    def oracle(speech, image, tau):
        return (infonce_oracle(speech, key_image, tau) + infonce_oracle(image, key_speech, tau)) / 2

    np.testing.assert_allclose(
        loss(*f32(speech, image, tau)), oracle(speech, image, tau), rtol=1e-5
    )
    found = jax.grad(loss, argnums=(0, 1, 2))(*f32(speech, image, tau))
    np.testing.assert_allclose(
        found[0], central_difference(lambda x: oracle(x, image, tau), speech), atol=1e-4
    )
    np.testing.assert_allclose(
        found[1], central_difference(lambda x: oracle(speech, x, tau), image), atol=1e-4
    )
    np.testing.assert_allclose(
        found[2], central_difference(lambda x: oracle(speech, image, x), tau), rtol=1e-3
    )


def test_alpha_one_with_momentum_equal_to_online_has_no_gradient(case):
    hard, valid = objectives.identity_targets(*identity_args(case), "mask")

    def loss(logits, alpha):
        targets = objectives.distillation_targets(f32(case["logits"]), hard, valid, alpha)
        return jnp.sum(objectives.sic_loss(logits, logits, targets, targets, valid))

    assert np.abs(jax.grad(loss)(f32(case["logits"]), 1.0)).max() < 1e-6
    assert np.abs(jax.grad(loss)(f32(case["logits"]), 0.9)).max() > 1e-2


def test_alpha_ramps_linearly_then_stays():
    found = [float(objectives.alpha_at(jnp.asarray(s), 0.4, 8)) for s in range(12)]
    np.testing.assert_allclose(found, [0.4 * min(1, s / 8) for s in range(12)], rtol=1e-6)
    assert float(objectives.alpha_at(jnp.asarray(0), 0.4, 0)) == pytest.approx(0.4)


# Hard negatives.


def sampler_case(rows=4000, seed=4):
    logits = RNG(seed).normal(size=7) * 1.5
    candidate_ids, valid = jnp.array([1, 2, 3, 4, 2, 5, 6]), jnp.array([1, 1, 1, 1, 1, 0, 1], bool)
    keys = objectives.row_keys(jax.random.key(seed), jnp.arange(rows))
    tiled = jnp.broadcast_to(f32(logits)[None], (rows, 7))
    return keys, tiled, jnp.full(rows, 2), candidate_ids, valid, logits


def test_sampler_frequencies_match_the_masked_softmax():
    *args, logits = sampler_case()
    columns, valid = objectives.sample_hard_negatives(*args)
    counts = np.bincount(columns, minlength=7)
    legal = np.array(
        [1, 0, 1, 1, 0, 0, 1], bool
    )  # columns 1 and 4 have the row's id, 5 is unwritten
    assert np.all(valid) and not counts[~legal].any()
    expected = softmax_oracle(logits, legal)[legal] * counts.sum()
    assert stats.chisquare(counts[legal], expected).pvalue > 1e-3
    assert stats.chisquare(counts[legal]).pvalue < 1e-9, (
        "the test can tell this softmax from a uniform draw"
    )


def test_sampler_never_takes_the_same_id_and_flags_rows_without_a_candidate():
    rng = RNG(5)
    ids, candidate_ids = rng.integers(0, 4, 300), rng.integers(0, 3, 9)
    for candidates in (candidate_ids, np.full(9, 2)):
        for written in (np.ones(9, bool), rng.random(9) < 0.3, np.zeros(9, bool)):
            keys = objectives.row_keys(jax.random.key(1), jnp.arange(300))
            logits = f32(rng.normal(size=(300, 9)) * 10)
            args = map(jnp.asarray, (ids, candidates, written))
            columns, valid = objectives.sample_hard_negatives(keys, logits, *args)
            for row in range(300):
                legal = [j for j in range(9) if written[j] and candidates[j] != ids[row]]
                assert bool(valid[row]) == bool(legal)
                assert int(columns[row]) in (legal or [0])


def test_sampler_survives_a_positive_with_all_the_mass():
    # exp(logit - max) underflows to 0 for every negative: a softmax masked afterwards has nothing
    # left to draw from.
    rows, tau = 3000, 0.001
    logits = np.array([1.0, -1.0, -1.0 + tau, -1.0]) / tau
    keys = objectives.row_keys(jax.random.key(2), jnp.arange(rows))
    tiled = jnp.broadcast_to(f32(logits)[None], (rows, 4))
    columns, valid = objectives.sample_hard_negatives(
        keys, tiled, jnp.full(rows, 7), jnp.array([7, 1, 2, 3]), jnp.ones(4, bool)
    )
    counts = np.bincount(columns, minlength=4)
    assert np.all(valid) and counts[0] == 0
    assert stats.chisquare(counts[1:], rows * softmax_oracle(logits[1:], [True] * 3)).pvalue > 1e-3


def test_draws_belong_to_the_global_row_however_rows_are_spread():
    keys, logits, ids, candidates, valid, _ = sampler_case(rows=64)
    whole = objectives.sample_hard_negatives(keys, logits, ids, candidates, valid)[0]
    parts = []
    for device in range(4):
        rows = device * 16 + jnp.arange(16)
        part = objectives.row_keys(jax.random.key(4), rows)
        parts.append(
            objectives.sample_hard_negatives(part, logits[:16], ids[:16], candidates, valid)[0]
        )
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len(np.unique(whole)) > 1, "rows draw independently"


# SIM.


def test_sim_loss_and_its_gradient():
    rng = RNG(6)
    logits, labels = rng.normal(size=(9, 2)) * 3, rng.integers(0, 2, 9)

    def oracle(logits):
        return np.array(
            [
                math.log(sum(map(math.exp, row))) - row[y]
                for row, y in zip(logits, labels, strict=True)
            ]
        )

    found = objectives.sim_loss(f32(logits), jnp.asarray(labels))
    np.testing.assert_allclose(found, oracle(logits), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(objectives.sim_loss(x, jnp.asarray(labels)) ** 2))(
        f32(logits)
    )
    np.testing.assert_allclose(
        gradient, central_difference(lambda x: np.sum(oracle(x) ** 2), logits), atol=1e-4
    )
    np.testing.assert_allclose(
        objectives.match_logit(f32(logits)), logits[:, 1] - logits[:, 0], rtol=1e-6
    )


def test_known_sim_values_of_a_blind_matcher():
    labels = objectives.assemble_pairs(*[jnp.ones((4, 1))] * 4, *[jnp.ones(4, bool)] * 2)[2]
    third = jnp.log(jnp.broadcast_to(f32([[2 / 3, 1 / 3]]), (12, 2)))
    assert float(jnp.mean(objectives.sim_loss(third, labels))) == pytest.approx(0.636514, abs=1e-6)
    assert objectives.COLLAPSE_VALUE == pytest.approx(math.log(3) - 2 / 3 * math.log(2), abs=1e-15)
    assert float(jnp.mean(objectives.sim_loss(jnp.zeros((12, 2)), labels))) == pytest.approx(
        math.log(2), abs=1e-6
    )


def test_pairs_hold_the_positives_then_a_negative_image_then_a_negative_speech():
    rows = lambda k: {"tokens": jnp.arange(6.0).reshape(2, 3) + k, "lengths": jnp.array([k, k + 1])}  # noqa: E731
    speech, image, other_speech, other_image = map(rows, (10, 20, 30, 40))
    found_speech, found_image, labels, valid = objectives.assemble_pairs(
        speech, image, other_speech, other_image, jnp.array([True, False]), jnp.array([False, True])
    )
    for name in ("tokens", "lengths"):
        for row, source in enumerate([speech, speech, speech, speech, other_speech, other_speech]):
            np.testing.assert_array_equal(found_speech[name][row], source[name][row % 2])
        for row, source in enumerate([image, image, other_image, other_image, image, image]):
            np.testing.assert_array_equal(found_image[name][row], source[name][row % 2])
    assert labels.tolist() == [1, 1, 0, 0, 0, 0]
    assert valid.tolist() == [True, True, False, True, True, False]


# What the objectives stand on: means over devices, the queue, the momentum parameters.


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_masked_mean_and_its_gradient_do_not_depend_on_the_devices(devices):
    rng = RNG(7)
    values, valid = rng.normal(size=8), np.array([0, 0, 1, 1, 0, 0, 1, 0], bool)
    split = lambda x: jnp.asarray(x).reshape(devices, -1)  # noqa: E731
    mean = jax.vmap(lambda v, m: masked_mean(v, m, "devices"), axis_name="devices")
    found = mean(split(f32(values)), split(valid))
    np.testing.assert_allclose(found, np.full(devices, values[valid].mean()), rtol=1e-6)
    gradient = jax.grad(lambda v: mean(v, split(valid))[0])(split(f32(values)))
    np.testing.assert_allclose(np.ravel(gradient), valid / 3, rtol=1e-6)
    assert float(masked_mean(f32(values), jnp.zeros(8, bool))) == 0.0


def test_collectives_join_rows_in_device_order():
    rows = jnp.arange(24.0).reshape(4, 3, 2)
    gathered = jax.vmap(lambda x: all_gather({"a": x}, "devices"), axis_name="devices")(rows)["a"]
    for device in range(4):
        np.testing.assert_array_equal(gathered[device], rows.reshape(12, 2))
    np.testing.assert_allclose(
        jax.vmap(lambda x: pmean(x, "devices"), axis_name="devices")(rows)[2], rows.mean(0)
    )
    assert all_gather(rows) is rows and pmean(rows) is rows


@pytest.mark.parametrize("size", [0, 1, 5, 8, 13])
def test_queue_equals_a_deque_of_its_size(size):
    rng = RNG(size)
    queue = create_queue(size, {"id": jnp.zeros(1, jnp.int32), "speech": jnp.zeros((1, 2))})
    expected = collections.deque(maxlen=size)
    for written in rng.integers(1, 18, 12):
        rows = {
            "id": jnp.asarray(rng.integers(0, 1000, written)),
            "speech": f32(rng.normal(size=(written, 2))),
        }
        queue = enqueue(queue, rows)
        expected.extend(zip(rows["id"].tolist(), rows["speech"].tolist(), strict=True))
        count, cursor = int(queue.count), int(queue.cursor)
        assert count == len(expected) and queue.size == size
        assert queue.valid.tolist() == [slot < count for slot in range(size)]
        # The oldest row is in slot 0 until the buffer is full, then where the next one will be
        # written.
        order = [(slot + (cursor if count == size else 0)) % size for slot in range(count)]
        found = [(int(queue.entries["id"][s]), queue.entries["speech"][s].tolist()) for s in order]
        assert found == list(expected)


def test_bank_is_the_batch_then_the_queue_with_unwritten_slots_masked():
    queue = enqueue(create_queue(4, {"z": jnp.zeros((1, 2))}), {"z": jnp.ones((3, 2))})
    batch = jnp.full((2, 2), 7.0)
    np.testing.assert_array_equal(
        bank(batch, queue, "z"), [[7, 7], [7, 7], [1, 1], [1, 1], [1, 1], [0, 0]]
    )
    assert bank_valid(2, queue).tolist() == [True] * 5 + [False]


def test_queue_stops_the_gradient_and_keeps_its_type():
    queue = create_queue(3, {"z": jax.ShapeDtypeStruct((1, 2), jnp.bfloat16)})
    stored = lambda x: enqueue(queue, {"z": x}).entries["z"]  # noqa: E731
    assert stored(jnp.ones((2, 2))).dtype == jnp.bfloat16
    assert not np.any(jax.grad(lambda x: jnp.sum(stored(x).astype(jnp.float32)))(jnp.ones((2, 2))))


def test_momentum_parameters_approach_a_constant_geometrically():
    rng = RNG(8)
    theta, start, m = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), 0.9
    momentum = {"a": {"b": f32(start)}}
    for k in range(1, 8):
        momentum = update_momentum(momentum, {"a": {"b": f32(theta)}}, m)
        # Seven steps of three roundings each, of values below 2.
        np.testing.assert_allclose(momentum["a"]["b"], theta + m**k * (start - theta), atol=5e-6)
    lowered = update_momentum(momentum, {"a": {"b": f32(theta).astype(jnp.bfloat16)}}, m)
    assert lowered["a"]["b"].dtype == jnp.float32


def test_a_logit_of_minus_infinity_costs_nothing_where_the_target_is_zero():
    logits, targets = f32([[1.0, 2.0, -np.inf]]), f32([[1.0, 0.0, 0.0]])
    valid = jnp.ones((1, 3), bool)
    loss, gradients = jax.value_and_grad(
        lambda *x: objectives.soft_target_cross_entropy(*x, valid)[0], argnums=(0, 1)
    )(logits, targets)
    assert float(loss) == pytest.approx(math.log(1 + math.e))
    assert all(np.isfinite(x).all() for x in gradients)


def test_a_candidate_of_minus_infinity_or_nan_is_never_valid():
    ids, keys = jnp.arange(4), objectives.row_keys(jax.random.key(0), jnp.arange(4))
    own = jnp.eye(4, dtype=bool)
    for bad in (-jnp.inf, jnp.nan):
        logits = jnp.where(own, 0.0, bad)
        columns, valid = objectives.sample_hard_negatives(keys, logits, ids, ids, ids >= 0)
        assert not valid.any() and not columns.any()
    logits = jnp.tile(jnp.where(ids == 3, 0.0, -jnp.inf), (4, 1))
    columns, valid = objectives.sample_hard_negatives(keys, logits, ids, ids, ids >= 0, 2)
    assert valid.tolist() == [[True, False]] * 3 + [[False, False]]
    assert columns.tolist() == [[3, 0]] * 3 + [[0, 0]]


def test_several_negatives_are_drawn_one_after_the_other_without_replacement():
    """The first is distributed as softmax(l), the second as softmax(l) without the first."""
    rows, logits = 20_000, np.array([0.0, 1.0, 2.0, 0.5])
    keys = objectives.row_keys(jax.random.key(2), jnp.arange(rows))
    columns, valid = objectives.sample_hard_negatives(
        keys,
        jnp.tile(f32(logits), (rows, 1)),
        jnp.full(rows, 9),
        jnp.arange(4),
        jnp.ones(4, bool),
        2,
    )
    assert valid.all()
    p = np.exp(logits) / np.exp(logits).sum()
    expected = np.array(
        [[0 if a == b else p[a] * p[b] / (1 - p[a]) for b in range(4)] for a in range(4)]
    )  # noqa: E501
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(np.asarray(columns).T), 1)
    # Five standard deviations of a binomial share.
    bound = 5 * np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(counts / rows - expected) <= bound + 1e-12).all()


def test_sigmoid_loss_and_its_gradient():
    rng = RNG(6)
    logits, positives = rng.normal(size=(4, 6)) * 3, rng.random((4, 6)) < 0.3
    valid = rng.random((4, 6)) < 0.8

    def oracle(x):
        signs = np.where(positives, 1.0, -1.0)
        return np.sum(np.where(valid, np.log1p(np.exp(-signs * x)), 0.0), axis=1)

    loss = lambda x: objectives.sigmoid_loss(x, jnp.asarray(positives), jnp.asarray(valid))  # noqa: E731
    masked = np.where(valid, logits, np.nan)
    np.testing.assert_allclose(loss(f32(masked)), oracle(logits), rtol=1e-5)
    gradient = jax.grad(lambda x: loss(x) @ jnp.arange(1.0, 5.0))(f32(masked))
    expected = central_difference(lambda x: oracle(x) @ np.arange(1.0, 5.0), logits)
    np.testing.assert_allclose(gradient, expected, atol=2e-5)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_rows_that_are_not_valid_do_not_enter_the_queue(size):
    """Against a deque, with masks of every density, also more valid rows than slots."""
    rng, oracle = RNG(8), collections.deque(maxlen=size)
    queue = objectives.create_queue(size, {"id": jnp.zeros(1, jnp.int32)})
    step = jax.jit(objectives.enqueue)
    for _ in range(12):
        ids, valid = rng.integers(1, 100, 6), rng.random(6) < rng.random()
        queue = step(queue, {"id": jnp.asarray(ids)}, jnp.asarray(valid))
        oracle.extend(ids[valid].tolist())
        first = int(queue.cursor) - len(oracle)
        slots = [(first + k) % size for k in range(len(oracle))]
        assert queue.entries["id"][np.array(slots, int)].tolist() == list(oracle)
        assert int(queue.count) == len(oracle)


def test_queues_of_no_slots_have_no_arrays_without_elements():
    """jax 0.11 compiles none of those for several devices: the process ends."""
    z = objectives.Features(jnp.eye(3), tokens=jnp.ones((3, 2, 4)))
    queues = objectives.create_queues(z, z, jnp.arange(3), size=0)
    assert all(x.size for x in jax.tree.leaves(queues))
    momentum = objectives.Pair(z, z)
    out = objectives.c2f_losses(
        z, z, jnp.arange(3), tau=0.1, key=jax.random.key(0), momentum=momentum, queues=queues
    )
    alone = objectives.c2f_losses(
        z, z, jnp.arange(3), tau=0.1, key=jax.random.key(0), momentum=momentum
    )
    assert float(out.sic) == float(alone.sic)
    jax.tree.map(np.testing.assert_array_equal, out.queues, queues)

    # Rows that do not belong together are no less wrong there.
    rows = {"speech": jnp.eye(3), "image": jnp.eye(3)[:2], "id": jnp.arange(3)}
    with pytest.raises(ValueError, match="rows"):
        objectives.enqueue(queues.embeddings, rows)
