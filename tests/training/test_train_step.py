"""The training step: the same on any number of devices, equal to SIC by hand, compiled once,
without host transfers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.faults import plant
from helpers.rounding import EPSILON, assert_equal_but_for_rounding

from c2f_jax.errors import UserError
from c2f_jax.models.factory import create_model
from c2f_jax.models.parameters import momentum_subset
from c2f_jax.objectives.average import Average
from c2f_jax.objectives.collectives import masked_mean, pmean
from c2f_jax.objectives.embedding_queue import create_queue
from c2f_jax.training.health import Watch, find_not_finite
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.parallel import DataParallel
from c2f_jax.training.train_state import create_train_state
from c2f_jax.training.train_step import encode, train_step

N, STEPS = 8, 3
BASE = {"queue_size": 0, "token_queue_size": 0, "dropout_rate": 0.0, "alpha_ramp_steps": 0}
SIC_ONLY = BASE | {"sim_weight": 0.0, "alpha": 0.0}
# Queue sizes that neither divide the batch nor are reached in the first steps.
QUEUES = {"queue_size": 13, "token_queue_size": 19, "negatives": "queue"}
CASES = {
    "queue": BASE | QUEUES | {"alpha_ramp_steps": 4},
    "branches": BASE | QUEUES | {"alpha_ramp_steps": 4, "branches": 2},
    "global": BASE | {"dropout_rate": 0.2},
    "blocks": BASE | {"mining_rows": 4},
    "batch": BASE | {"negatives": "batch"},
    "detached": SIC_ONLY,
    "online": SIC_ONLY | {"momentum": None},
}


def scalable_sgd(rate=0.01):
    """Plain SGD with its rate in the state: the change of the parameters is the gradient times a
    known number.

    Adam would divide rounding errors by themselves where a gradient is zero, as it is for the
    biases of attention keys.
    """
    return optax.GradientTransformation(
        lambda params: jnp.float32(rate),
        lambda grads, rate, params: (jax.tree.map(lambda g: -rate * g, grads), rate),
    )


def tiny_model(dropout_rate=0.0, **options):
    tower = {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 4.0, "dropout_rate": dropout_rate}
    speech = tower | {"name": "log_mel", "mels": 8, "hop": 160, "conv_layers": 1}
    image = tower | {"name": "vit", "patch": 8, "conv_stem": False, "token_pool": 1}
    return create_model(speech, image, tower, embedding_dim=8, **options)


def make_batch(seed, ids=None):
    """Eight recordings of up to half a second; five pictures, one of which has id 0 as unwritten
    slots do."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4000, 8001, N).astype(np.int32)
    waveform = rng.normal(size=(N, 8000)).astype(np.float32) * (np.arange(8000) < lengths[:, None])
    image = rng.integers(0, 256, (N, 16, 16, 3)).astype(np.uint8)
    ids = rng.integers(0, 5, N) if ids is None else ids
    return {
        "waveform": waveform,
        "speech_lengths": lengths,
        "image": image,
        "image_id": np.asarray(ids, np.int32),
    }


BATCHES = [make_batch(seed) for seed in range(STEPS)]


def method_of(case):
    other = ("queue_size", "token_queue_size", "dropout_rate", "branches")
    return MethodConfig(**{name: value for name, value in CASES[case].items() if name not in other})


def model_of(case, **options):
    return tiny_model(
        CASES[case]["dropout_rate"], branches=CASES[case].get("branches", 1), **options
    )


@functools.cache
def initial_state(branches):
    model, sizes = tiny_model(branches=branches), {"queue_size": 13, "token_queue_size": 19}
    return jax.tree.map(
        np.asarray, create_train_state(model, scalable_sgd(), BATCHES[0], seed=3, **sizes)
    )


def start_of(case):
    """The initial state as numpy arrays: one initialisation, fitted to the case's queues and
    momentum model."""
    state = initial_state(CASES[case].get("branches", 1))
    if not CASES[case]["queue_size"]:
        empty = [
            jax.tree.map(np.asarray, create_queue(0, q.entries))
            for q in (state.queue, state.token_queue)
        ]
        state = state.replace(queue=empty[0], token_queue=empty[1])
    return state.replace(momentum_params={}) if method_of(case).momentum is None else state


@functools.cache
def compiled(case, mode=None, devices=1, **options):
    """DataParallel and its compiled step; mode None is the step under jit without any device
    axis."""
    step = functools.partial(
        train_step,
        model=model_of(case, **options),
        optimizer=scalable_sgd(),
        method=method_of(case),
    )
    parallel = DataParallel(mode or "shard_map", jax.devices()[:devices])
    return parallel, parallel.compile_step(step) if mode else jax.jit(step)


class Run:
    """Steps from the initial state: ``states`` (host copies, the initial one first), ``metrics`` of
    each step."""

    def __init__(self, case, mode=None, devices=1, batches=BATCHES, **options):
        parallel, step = compiled(case, mode, devices, **options)
        state = parallel.place_state(start_of(case)) if mode else jax.device_put(start_of(case))
        self.states, self.metrics = [start_of(case)], []
        for batch in batches:
            state, metrics = step(state, parallel.place_batch(batch) if mode else batch)
            self.states.append(parallel.host_copy(state))
            self.metrics.append(means(parallel.host_copy(metrics)))


def means(metrics):
    return {name: np.float32(value.compute()) for name, value in metrics.items()}


@functools.cache
def reference(case):
    """One device, no device axis."""
    return Run(case)


def assert_same(found, case):
    """Every step of a run is one device's step from the same state; so no rounding adds up over the
    steps."""
    _, step = compiled(case)

    def take(state, batch):
        state, metrics = jax.device_get(step(state, batch))
        return state, means(metrics)

    for k, batch in enumerate(BATCHES):
        assert_equal_but_for_rounding(
            take, (found.states[k], batch), (found.states[k + 1], found.metrics[k])
        )


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "case, mode, devices",
    [
        ("queue", "shard_map", 4),
        ("global", "pmap", 4),
        ("blocks", "shard_map", 4),
        # The others, with global on two devices under shard_map in the test of rematerialisation.
        pytest.param("queue", "pmap", 1, marks=slow),
        pytest.param("queue", "pmap", 2, marks=slow),
        pytest.param("queue", "pmap", 4, marks=slow),
        pytest.param("branches", "pmap", 2, marks=slow),
        pytest.param("queue", "shard_map", 1, marks=slow),
        pytest.param("queue", "shard_map", 2, marks=slow),
        pytest.param("global", "pmap", 1, marks=slow),
        pytest.param("global", "pmap", 2, marks=slow),
        pytest.param("global", "shard_map", 1, marks=slow),
        pytest.param("global", "shard_map", 4, marks=slow),
    ],
)
def test_three_steps_do_not_depend_on_the_number_of_devices(case, mode, devices):
    expected = reference(case)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), expected.states[0].params, expected.states[-1].params
    )
    assert max(jax.tree.leaves(moved)) > 1e-2, "gradients of some size were compared"
    if case == "queue":
        assert 0 < expected.metrics[-1]["queue_negatives"] < 1, (
            "both sources of negatives were compared"
        )
    assert_same(Run(case, mode, devices), case)


def batch_pool_metrics(parallel, step):
    """A step with negatives from each device's own rows: device 0 has one picture only, device 1
    has four."""
    batch = make_batch(0, ids=[7, 7, 7, 7, 1, 2, 3, 4])
    return step(parallel.place_state(start_of("batch")), parallel.place_batch(batch))[1]


def loss_against_metrics(metrics):
    """How far the loss is from the sum of the losses in the metrics, in last bits of the loss."""
    sic, sim, loss = (float(metrics[name].compute()) for name in ("sic_loss", "sim_loss", "loss"))
    return abs(sic + sim - loss) / (EPSILON * loss)


def test_batch_pool_drops_rows_whose_device_holds_no_other_picture():
    # Device 0 has one picture only: its 4 positives stay, its 8 negatives leave the loss. Device 1
    # has all 12 pairs.
    metrics = batch_pool_metrics(*compiled("batch", "pmap", 2))
    assert float(metrics["sim_loss"].count) == 4 + 12
    assert float(metrics["sim_positive_accuracy"].count) == 8
    # Either way at most 16 positive numbers are added, divided and added to one more: under 32
    # roundings in all.
    assert loss_against_metrics(metrics) < 32


def test_a_mean_of_the_means_of_the_devices_is_far_beyond_rounding(monkeypatch):
    def mean_of_means(values, valid, axis_name=None):
        return pmean(masked_mean(values, valid), axis_name)

    plant(monkeypatch, masked_mean, mean_of_means)
    assert (
        loss_against_metrics(batch_pool_metrics(*compiled.__wrapped__("batch", "pmap", 2))) > 32_000
    )


@functools.cache
def encoder(case):
    return jax.jit(functools.partial(encode, model_of(case)))


def sic_oracle(z, momentum_z, queued, ids, tau, alpha, branches):
    """L_SIC of one batch in float64: multi-positive targets, distilled, the banks being the batch
    and ``queued``.

    The mean over the branches, each with its own part of the embeddings, the teacher with whole
    ones.
    """
    rows, bank_ids = [], np.concatenate([ids, [row[0] for row in queued]])
    for own, other, own_momentum in ((0, 1, 0), (1, 0, 1)):
        bank = np.concatenate(
            [momentum_z[other], np.reshape([row[1 + other] for row in queued], (-1, z[0].shape[1]))]
        )
        targets = (ids[:, None] == bank_ids).astype(float)
        targets /= targets.sum(1, keepdims=True)
        soft = np.exp(momentum_z[own_momentum] @ bank.T / tau)
        targets = alpha * soft / soft.sum(1, keepdims=True) + (1 - alpha) * targets
        for query, keys in zip(
            np.split(z[own], branches, axis=1), np.split(bank, branches, axis=1), strict=True
        ):
            unit = query / np.linalg.norm(query, axis=1, keepdims=True)
            logits = unit @ (keys / np.linalg.norm(keys, axis=1, keepdims=True)).T / tau
            rows.append(
                -np.sum(targets * (logits - np.log(np.exp(logits).sum(1, keepdims=True))), axis=1)
            )
    return np.mean(rows)


@pytest.mark.parametrize("case", ["queue", "branches"])
def test_each_step_equals_the_method_by_hand(case):
    """The loss, the momentum parameters and both queues of every step, from the parameters that it
    began with."""
    run, queued, branches = reference(case), [], CASES[case].get("branches", 1)
    for step, batch in enumerate(BATCHES):
        before, after = run.states[step], run.states[step + 1]
        z, momentum_z = (
            [np.asarray(x.embedding, np.float64) for x in encoder(case)(params, batch)]
            for params in (before.params, before.momentum_params)
        )
        tau = run.metrics[step]["tau"]
        expected = sic_oracle(
            z, momentum_z, queued[-13:], batch["image_id"], tau, 0.4 * step / 4, branches
        )
        assert run.metrics[step]["sic_loss"] == pytest.approx(expected, rel=1e-4)
        assert run.metrics[step]["alpha"] == pytest.approx(0.4 * step / 4)

        queued += [(i, *pair) for i, *pair in zip(batch["image_id"], *momentum_z, strict=True)]
        for queue, size in ((after.queue, 13), (after.token_queue, 19)):
            kept, first = queued[-size:], max(0, len(queued) - size)
            assert int(queue.count) == len(kept)
            # Embeddings of length 1 from two programs: up to hundreds of eps apart, other rows 0.1.
            slots = [(first + k) % size for k in range(len(kept))]
            assert queue.entries["id"][slots].tolist() == [row[0] for row in kept]
            np.testing.assert_allclose(
                queue.entries["speech"][slots], [row[1] for row in kept], atol=1e-4
            )
            np.testing.assert_allclose(
                queue.entries["image"][slots], [row[2] for row in kept], atol=1e-4
            )

        m = 0.995
        trees = after.momentum_params, before.momentum_params, momentum_subset(after.params)
        for found, old, online in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(found, m * old + (1 - m) * online, atol=1e-6)
        assert int(after.step) == step + 1


def test_token_queue_keeps_the_momentum_tokens_that_were_encoded():
    state = reference("queue").states[1]
    speech, image = encoder("queue")(state.momentum_params, BATCHES[1])
    entries = reference("queue").states[2].token_queue.entries
    for name, encoded in (("speech", speech), ("image", image)):
        kept = entries[f"{name}_tokens"]
        assert kept.tokens.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            kept.tokens[8:16].astype(np.float32),
            encoded.tokens,
            rtol=2**-7,
            atol=1e-3,
        )
        assert kept.lengths[8:16].tolist() == encoded.lengths.tolist()


@pytest.mark.parametrize(
    "case, mode, devices", [("online", "shard_map", 4), ("detached", "pmap", 2)]
)
def test_sic_alone_has_the_gradient_of_plain_infonce(case, mode, devices):
    """K = 0, alpha = 0, unique ids, momentum = online: symmetric InfoNCE, its keys detached if they
    are momentum's."""
    batch, start = make_batch(4, ids=np.arange(N)), start_of(case)
    model = tiny_model()

    @jax.jit
    def gradient(params):
        def infonce(params):
            speech, image = (encoded.embedding for encoded in encode(model, params, batch))
            keys = (speech, image) if case == "online" else jax.lax.stop_gradient((speech, image))
            tau = jnp.exp(params["temperature"]["log_tau"])
            s2i, i2s = speech @ keys[1].T / tau, image @ keys[0].T / tau
            pairs = [
                optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(N))
                for logits in (s2i, i2s)
            ]
            return jnp.mean(jnp.stack(pairs))

        return jax.value_and_grad(infonce)(params)

    loss, expected = jax.device_get(gradient(start.params))
    run = Run(case, mode, devices, batches=[batch])
    # Embeddings that are tens of eps apart are divided by tau = 0.07.
    assert run.metrics[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    found = jax.tree.map(lambda a, b: (a - b) / 0.01, start.params, run.states[1].params)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), found, expected
    )
    if case == "online":
        assert not run.states[1].momentum_params
    else:
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected)))
        assert run.metrics[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def poisoned(name, tree):
    """A tree with one NaN in its first leaf of that name."""

    def of_leaf(path, x):
        if name not in jax.tree_util.keystr(path) or poisoned_leaves:
            return x
        poisoned_leaves.append(path)
        x = np.array(x)
        x.reshape(-1)[x.size // 2] = np.nan
        return x

    poisoned_leaves = []
    found = jax.tree_util.tree_map_with_path(of_leaf, tree)
    assert poisoned_leaves
    return found


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
    batches = [BATCHES[0], poisoned("waveform", BATCHES[1]), BATCHES[2]]
    run = Run("queue", "pmap", 2, batches)
    before, after = run.states[1:3]
    jax.tree.map(np.testing.assert_array_equal, after, before.replace(step=after.step))
    assert [int(state.step) for state in run.states] == [0, 1, 2, 3]
    assert [float(metrics["skipped"]) for metrics in run.metrics] == [0, 1, 0]
    assert [bool(np.isfinite(metrics["loss"])) for metrics in run.metrics] == [True, False, True]
    last = jax.tree.leaves(run.states[3])
    assert all(np.isfinite(x).all() for x in last if np.issubdtype(x.dtype, np.floating))
    assert not np.array_equal(
        run.states[3].params["temperature"]["log_tau"], after.params["temperature"]["log_tau"]
    )


@pytest.mark.parametrize(
    "state_part, batch_part, first",
    [
        ("params['image_projection']", None, "parameter['image_projection']['bias']"),
        ("momentum_params", None, "momentum parameter["),
        (".queue.entries['image']", None, "queue['image']"),
        (".token_queue.entries['speech']", None, "token queue['speech']"),
        (None, "waveform", "batch['waveform']"),
        ("log_tau", None, "parameter['temperature']['log_tau']"),
    ],
)
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_what_is_not_finite_is_named_causes_first(state_part, batch_part, first, mode):
    state = start_of("queue")
    # Slots that were written: others are left out of the loss.
    _, step = compiled("queue")
    state, _ = jax.device_get(step(state, BATCHES[0]))
    state = poisoned(state_part, state) if state_part else state
    batch = poisoned(batch_part, BATCHES[1]) if batch_part else BATCHES[1]
    parallel = DataParallel(mode, jax.devices()[:2])
    names = find_not_finite(
        parallel,
        parallel.place_state(state),
        parallel.place_batch(batch),
        model=model_of("queue"),
        method=method_of("queue"),
    )
    assert names[0].startswith(first), names
    effects = ("sic_loss", "gradient") if "token" not in first else ("token queue",)
    assert all(any(name.startswith(effect) for name in names) for effect in effects), names


def test_the_watch_counts_steps_in_a_row_and_stays_behind():
    watch = Watch(limit=3)
    for step, skipped in enumerate([0, 1, 1, 0, 1, 1, 1, 0, 0] + [0] * 5):
        watch.add(Average.of(jnp.float32(skipped)), step)
    assert not watch.is_over, "the last 8 steps are not looked at"
    watch.settle()
    assert watch.is_over and watch.rows == [4, 5, 6], "what follows does not undo it"


def test_temperature_stays_in_its_range_under_a_huge_learning_rate():
    parallel, step = compiled("detached", "pmap", 2)
    reached = set()
    for rate in (1e6, -1e6):
        state = parallel.place_state(start_of("detached").replace(opt_state=np.float32(rate)))
        state, _ = step(state, parallel.place_batch(make_batch(4, ids=np.arange(N))))
        reached.add(
            round(float(np.exp(parallel.host_copy(state.params)["temperature"]["log_tau"])), 6)
        )
    assert reached == {0.001, 0.5}


@pytest.mark.parametrize("mode, devices", [("pmap", 2), ("shard_map", 4)])
def test_step_compiles_once_and_moves_nothing_from_or_to_the_host(mode, devices):
    parallel, step = compiled("queue", mode, devices)
    state, batches = (
        parallel.place_state(start_of("queue")),
        [parallel.place_batch(batch) for batch in BATCHES],
    )
    state, _ = step(state, batches[0])
    given, compilations = jax.tree.leaves(state), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event)
    )
    try:
        with jax.transfer_guard("disallow"):
            with pytest.raises(Exception, match="Disallowed host-to-device"):
                jnp.add(np.ones(3), 1.0)  # the guard is on
            compilations.clear()
            for batch in batches[1:]:
                state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
        assert not [event for event in compilations if "compile" in event]
        assert all(leaf.is_deleted() for leaf in given), "the given state is donated"
        jax.jit(lambda x: x + 3.0)(state.step)
        assert [event for event in compilations if "compile" in event], "compilations are seen"
    finally:
        jax.monitoring.clear_event_listeners()


def test_step_calls_nothing_on_the_host():
    parallel, step = compiled("queue", "shard_map", 4)
    text = step.lower(
        parallel.place_state(start_of("queue")), parallel.place_batch(BATCHES[0])
    ).as_text()
    assert "stablehlo.dot_general" in text
    assert not [
        word
        for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv")
        if word in text
    ]


def test_bfloat16_leaves_parameters_momentum_and_queue_in_float32():
    run, exact = Run("queue", dtype="bfloat16", batches=BATCHES[:1]), reference("queue")
    state = run.states[1]
    for tree in (
        state.params,
        state.momentum_params,
        state.queue.entries["speech"],
        state.queue.entries["image"],
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}
    assert run.metrics[0]["sic_loss"] == pytest.approx(exact.metrics[0]["sic_loss"], rel=0.05)
    assert run.metrics[0]["loss"] == pytest.approx(exact.metrics[0]["loss"], rel=0.1)
    assert run.metrics[0]["gradient_norm"] == pytest.approx(
        exact.metrics[0]["gradient_norm"], rel=0.1
    )
    assert run.metrics[0]["loss"] != exact.metrics[0]["loss"], "it was computed in another type"


def test_rematerialisation_changes_neither_loss_nor_gradients():
    rematerialised = functools.partial(encode, tiny_model(remat=True))
    assert "remat" in str(jax.make_jaxpr(rematerialised)(start_of("global").params, BATCHES[0]))
    assert_same(Run("global", "shard_map", 2, remat=True), "global")


def test_metrics_are_sums_and_counts_over_the_global_batch():
    parallel, step = compiled("queue", "pmap", 2)
    _, metrics = step(parallel.place_state(start_of("queue")), parallel.place_batch(BATCHES[0]))
    assert all(isinstance(value, Average) for value in metrics.values())
    counts = {
        name: float(metrics[name].count)
        for name in ("sic_loss", "sic_accuracy", "sim_loss", "queue_negatives")
    }
    assert counts == {"sic_loss": 8, "sic_accuracy": 8, "sim_loss": 24, "queue_negatives": 8}
    assert float(metrics["queue_negatives"].total) == 0, "nothing was in the queue yet"


@pytest.mark.parametrize(
    "values, sizes, message",
    [
        ({"min_tau": 0.6}, (0, 0), "method.min_tau=0.6 must be at most method.max_tau=0.5"),
        (
            {"momentum": None, "alpha": 0.0},
            (8, 0),
            "set queue_size=0, token_queue_size=0 and method.alpha=0",
        ),
        ({"momentum": None}, (0, 0), "set queue_size=0, token_queue_size=0 and method.alpha=0"),
        ({"negatives": "queue"}, (8, 0), "need token_queue_size > 0"),
        ({"negatives": "global"}, (8, 4), "no other pool uses it"),
        (
            {"mining_rows": 6},
            (0, 0),
            "method.mining_rows=6 does not divide batch_size=8: use 4",
        ),
    ],
)
def test_contradicting_method_values_are_named(values, sizes, message):
    with pytest.raises(UserError, match=message):
        MethodConfig(**values).check(N, *sizes)


@pytest.mark.parametrize("case", CASES)
def test_the_method_values_of_these_tests_are_legal(case):
    method_of(case).check(N, CASES[case]["queue_size"], CASES[case]["token_queue_size"])


def test_devices_and_batch_size_must_fit():
    with pytest.raises(UserError, match="parallel='mpi': choose one of pmap, shard_map"):
        DataParallel("mpi")
    for batch_size in (0, 6):
        with pytest.raises(
            UserError,
            match=f"batch_size={batch_size} does not divide over 4 devices: .*multiple of 4",
        ):
            DataParallel("pmap", jax.devices()[:4]).check_batch_size(batch_size)
    DataParallel("pmap", jax.devices()[:4]).check_batch_size(8)


def test_warm_up_is_plain_contrastive_learning_and_the_momentum_model_follows():
    method = dataclasses.replace(method_of("queue"), warm_up_steps=1).warm_up()
    assert method.momentum is None and not method.sim_weight and not method.alpha
    run = functools.partial(
        train_step, model=model_of("queue"), optimizer=scalable_sgd(), method=method
    )
    after, metrics = jax.jit(run)(start_of("queue"), BATCHES[0])
    jax.tree.map(
        np.testing.assert_array_equal, after.momentum_params, momentum_subset(after.params)
    )
    assert int(after.queue.count) == int(after.token_queue.count) == 0 and "sim_loss" not in metrics
