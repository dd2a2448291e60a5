"""c2f_losses: with padding, in chunks, under every kind of device axis, and called wrongly."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rounding import assert_equal_but_for_rounding
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from c2f_jax import objectives as c2f
from c2f_jax.objectives import Features, Pair
from c2f_jax.objectives.embedding_queue import enqueue_features

N, D, T, TAU = 16, 6, 3, 0.2
IDS = jnp.array([0, 1, 1, 2, 3, 4, 0, 5, 6, 7, 8, 9, 9, 10, 11, 12])
KEY = jax.random.key(4)


class Inputs(NamedTuple):
    """What changes from step to step; ``match`` is a bilinear form of the mean tokens."""

    online: Pair
    momentum: Pair
    weights: jax.Array
    tau: jax.Array
    ids: jax.Array
    valid: jax.Array


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def random_inputs(seed, n=N):
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def features():
        tokens = jax.random.normal(next(keys), (n, T, D)), jnp.full(n, T)
        return Features(unit(jax.random.normal(next(keys), (n, D))), tokens)

    pairs = [Pair(features(), features()) for _ in range(2)]
    weights = jax.random.normal(next(keys), (D, D))
    return Inputs(*pairs, weights, jnp.float32(TAU), IDS[:n], jnp.arange(n) < 11)


def match_by(weights):
    def match(speech, image):
        (speech, speech_lengths), (image, image_lengths) = speech, image
        mean = lambda x, k: jnp.sum(x, axis=1) / k[:, None].astype(x.dtype)  # noqa: E731
        score = jnp.sum((mean(speech, speech_lengths) @ weights) * mean(image, image_lengths), -1)
        return jnp.stack([jnp.zeros_like(score), score], axis=-1)

    return match


INPUTS = random_inputs(0)
OPTIONS = {
    "queue": {"negatives": "queue", "mining_tau": 0.3, "alpha": 0.4},
    "padded": {"alpha": 0.4, "padded": True},
    "online": {"momentum": None, "queues": None},
    "sigmoid": {"sigmoid_bias": -3.0, "negatives_per_row": 2},
    "mask": {"id_policy": "mask", "branches": 2, "alpha": 1.0},
    "blocks": {"negatives": "queue", "mining_rows": 8, "padded": True},
}


def some_queues():
    """13 slots, of which 5 rows were written, and 19 for tokens: neither divides the batch."""
    online, *_ = random_inputs(7, 5)
    queues = c2f.create_queues(*online, IDS, size=13, token_size=19)
    return jax.device_get(enqueue_features(queues, online, IDS[:5]))


QUEUES = some_queues()


def losses(inputs, axis_name=None, padded=False, **options):
    options = {"momentum": inputs.momentum, "queues": QUEUES} | options
    return c2f.c2f_losses(
        *inputs.online, inputs.ids, tau=inputs.tau, key=KEY, match=match_by(inputs.weights),
        row_valid=inputs.valid if padded else None, axis_name=axis_name, **options,
    )  # fmt: skip


def value_and_gradients(inputs, axis_name=None, **options):
    """The losses, gradients of everything a stranger trains, queues and metrics."""

    def total(trained):
        found = losses(inputs._replace(**trained), axis_name, **options)
        return found.sic + 0.7 * found.sim, found

    trained = {"weights": inputs.weights, "tau": inputs.tau}
    (_, found), shared = jax.value_and_grad(total, has_aux=True)(trained)
    # Of this device's features; each device's part of the mean over all devices.
    of_embeddings = lambda z: total({"online": with_embeddings(inputs.online, z)})[0]  # noqa: E731
    gradient = jax.grad(of_embeddings)(Pair(*(side.embedding for side in inputs.online)))
    return found, c2f.pmean(shared, axis_name), gradient


def with_embeddings(pair, embeddings):
    return Pair(*(f._replace(embedding=z) for f, z in zip(pair, embeddings, strict=True)))


@functools.cache
def one_device(case):
    return jax.jit(functools.partial(value_and_gradients, **OPTIONS[case]))


def on_devices(case, how, devices=4):
    """The same under a device axis; gradients of features are put together and scaled as on one
    device."""
    options = OPTIONS[case]
    specs = Inputs(P("d"), P("d"), P(), P(), P("d"), P("d"))
    if how in ("shard_map", "check_vma"):
        mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
        run = jax.shard_map(
            functools.partial(value_and_gradients, axis_name="d", **options),
            mesh=mesh, in_specs=(specs,), out_specs=(P(), P(), P("d")),
            check_vma=how == "check_vma",
        )  # fmt: skip
        placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), tuple(specs))
        return jax.jit(run)(Inputs(*map(jax.device_put, INPUTS, placed)))
    if how == "two axes":
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        specs = Inputs(*(P(("a", "b")) if spec else P() for spec in map(tuple, specs)))
        run = jax.shard_map(
            functools.partial(value_and_gradients, axis_name=("a", "b"), **options),
            mesh=mesh, in_specs=(specs,), out_specs=(P(), P(), P(("a", "b"))),
        )  # fmt: skip
        return jax.jit(run)(INPUTS)
    if how in ("explicit", "auto"):
        kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
        mesh = jax.make_mesh((devices,), ("d",), (kind,), devices=jax.devices()[:devices])
        placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), tuple(specs))
        return one_device(case)(Inputs(*map(jax.device_put, INPUTS, placed)))
    split = lambda x: x.reshape(devices, -1, *x.shape[1:])  # noqa: E731
    stacked = Inputs(*(jax.tree.map(split, x) if spec else x for x, spec in zip(INPUTS, specs)))  # noqa: B905
    axes = Inputs(*(0 if spec else None for spec in map(tuple, specs)))
    mapped = {"pmap": jax.pmap, "vmap": jax.vmap}[how](
        functools.partial(value_and_gradients, axis_name="d", **options),
        in_axes=(axes,), axis_name="d",
    )  # fmt: skip
    found, shared, gradient = mapped(stacked)
    found, shared = jax.tree.map(lambda x: x[0], (found, shared))
    return found, shared, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), gradient)


KINDS = ("check_vma", "explicit", "shard_map", "pmap", "vmap", "auto", "two axes")
FAST = {
    ("padded", "check_vma"),
    ("sigmoid", "explicit"),
    ("online", "check_vma"),
    ("mask", "vmap"),
    ("blocks", "check_vma"),
}


@pytest.mark.parametrize(
    "case, how",
    [
        pytest.param(
            case, how, marks=() if case == "queue" or (case, how) in FAST else pytest.mark.slow
        )
        for case in OPTIONS
        for how in KINDS
    ],
)
def test_losses_gradients_queues_and_metrics_are_those_of_one_device(case, how):
    found = on_devices(case, how)
    if how in ("shard_map", "pmap", "vmap"):
        # The loss is a mean over the devices. Unless jax knows what is equal on all of them, the
        # transpose of that mean sums over the devices, which pmean of the gradients undoes.
        found = (*found[:2], jax.tree.map(lambda x: x / 4, found[2]))
    assert_equal_but_for_rounding(one_device(case), (INPUTS,), jax.device_get(found))


@pytest.mark.parametrize("case, chunk", [("queue", 5), ("padded", 8), ("sigmoid", 1)])
def test_chunks_of_rows_change_nothing_but_rounding(case, chunk):
    found = jax.jit(functools.partial(value_and_gradients, chunk=chunk, **OPTIONS[case]))(INPUTS)
    assert_equal_but_for_rounding(one_device(case), (INPUTS,), jax.device_get(found))


def test_chunks_save_memory():
    """Temporaries of value and gradient as the compiler reports them; 256 rows, 4,096 slots."""
    n, slots = 256, 4096
    features = Features(jax.ShapeDtypeStruct((n, D), jnp.float32))
    ids = jax.ShapeDtypeStruct((n,), jnp.int32)
    queues = jax.eval_shape(lambda: c2f.create_queues(features, features, ids, size=slots))

    def temporaries(chunk):
        def loss(z, ids, queues):
            side = Features(z)
            return c2f.c2f_losses(
                side, side, ids, tau=0.1, key=KEY, momentum=Pair(side, side), queues=queues,
                alpha=0.4, chunk=chunk,
            ).sic  # fmt: skip

        compiled = jax.jit(jax.grad(loss)).lower(features.embedding, ids, queues).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16) < temporaries(None) / 4


def test_padding_takes_no_part_whatever_it_holds():
    """Rows 11 to 15 are padding: NaN there changes nothing, SIC and the queues are those of 11
    rows, and no pair that counts has one of them."""

    def poison(x):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[:1] != (N,):
            return x
        return x.at[11:].set(jnp.nan)

    clean = one_device("padded")(INPUTS)
    dirty = one_device("padded")(jax.tree.map(poison, INPUTS))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)

    found, _, gradient = clean
    assert all(not np.asarray(x)[11:].any() and np.asarray(x)[:11].any() for x in gradient)
    eleven = jax.tree.map(lambda x: x[:11] if x.shape[:1] == (N,) else x, INPUTS)
    alone = one_device("padded")(eleven)[0]
    np.testing.assert_allclose(found.sic, alone.sic, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found.queues, alone.queues)
    assert float(found.metrics["sic_loss"].count) == 11

    # Each pair that counts adds to the gradient of its own logits.
    def sim(offsets):
        def match(speech, image):
            return match_by(INPUTS.weights)(speech, image) + offsets

        return c2f.c2f_losses(
            *INPUTS.online, IDS, tau=TAU, key=KEY, match=match, row_valid=INPUTS.valid
        ).sim

    counted = np.asarray(jax.grad(sim)(jnp.zeros((3 * N, 2)))).any(axis=1)
    assert counted.reshape(3, N).tolist() == [INPUTS.valid.tolist()] * 3


def test_padding_without_a_single_token_leaves_the_gradient_finite():
    """Lengths of 0 and masks of False, in which a mean and a softmax of ``match`` are NaN."""
    lengths, real = jnp.where(INPUTS.valid, T, 0), INPUTS.valid[:, None] & jnp.ones(T, bool)
    x = INPUTS.online.speech.tokens[0]

    def loss(weights):
        features = Features(x[:, 0] @ weights, (x @ weights, lengths, real))

        def match(speech, image):
            attention = jax.nn.softmax(speech[0][..., 0], axis=-1, where=speech[2])
            mean = jnp.einsum("nt,ntd->nd", attention, speech[0]) / speech[1][:, None]
            score = jnp.sum(mean * jnp.sum(image[0], axis=1) / image[1][:, None], axis=-1)
            return jnp.stack([jnp.zeros_like(score), score], axis=-1)

        found = c2f.c2f_losses(
            features, features, IDS, tau=TAU, key=KEY, match=match, row_valid=INPUTS.valid
        )
        return found.sic + found.sim

    value, gradient = jax.value_and_grad(loss)(INPUTS.weights)
    assert np.isfinite(value) and np.isfinite(gradient).all() and gradient.any()


def test_queues_that_differ_over_the_devices_are_refused():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    features = Pair(*(Features(f.embedding) for f in INPUTS.online))
    queues = c2f.create_queues(*features, IDS, size=4)

    def sic(features, ids, queues):
        return c2f.c2f_losses(
            *features, ids, tau=TAU, key=KEY, momentum=features, queues=queues, axis_name="d"
        ).sic

    array = P("d")
    specs = (array, array, c2f.Queues(c2f.EmbeddingQueue(array, P(), P()), P()))
    arguments = jax.tree.map(lambda x: x, (features, IDS, queues))
    with pytest.raises(ValueError, match="queues differ over axis_name"):
        with jax.set_mesh(mesh):
            placed = jax.tree.map(
                lambda x, s: jax.device_put(x, s), arguments,
                jax.tree.map(lambda s, x: jax.tree.map(lambda _: s, x), specs, arguments,
                             is_leaf=lambda s: isinstance(s, P)),
            )  # fmt: skip
            jax.jit(jax.shard_map(sic, in_specs=specs, out_specs=P()))(*placed)


def test_no_padding_is_mined():
    seen = []

    def match(speech, image):
        seen.append((speech[0][:, 0], image[0][:, 0]))
        return jnp.zeros((3 * N, 2))

    c2f.c2f_losses(*INPUTS.online, IDS, tau=TAU, key=KEY, match=match, row_valid=INPUTS.valid)
    of_row = [np.asarray(side.tokens[0][:, 0]) for side in INPUTS.online]
    for block, side in ((1, 1), (2, 0)):
        mined = np.asarray(seen[0][side]).reshape(3, N, D)[block][:11]
        numbers = (mined[:, None] == of_row[side]).all(axis=-1).argmax(axis=1)
        assert (numbers < 11).all() and (IDS[numbers] != IDS[:11]).all()


def test_a_row_that_is_not_finite_stays_out_of_the_queues():
    bad = INPUTS.momentum.speech.embedding.at[2].set(jnp.nan)
    momentum = with_embeddings(INPUTS.momentum, Pair(bad, INPUTS.momentum.image.embedding))
    found = losses(INPUTS._replace(momentum=momentum))
    assert float(found.metrics["queue_rejected"].compute()) == pytest.approx(1 / N)
    assert jnp.isnan(found.sic), "the step itself must not hide it"
    for queue in found.queues:
        for entry in jax.tree.leaves(queue.entries):
            assert np.isfinite(np.asarray(entry, np.float32)).all()
    after = losses(random_inputs(1), queues=found.queues)
    assert np.isfinite(after.sic) and np.isfinite(after.sim)


@pytest.mark.parametrize("case", ["queue", "sigmoid", "padded"])
def test_ranks_and_types_are_never_promoted(case, no_rank_promotion):
    embeddings = [Pair(*(f.embedding.astype("bfloat16") for f in pair)) for pair in INPUTS[:2]]
    half = [with_embeddings(pair, z) for pair, z in zip(INPUTS[:2], embeddings, strict=True)]
    half = INPUTS._replace(online=half[0], momentum=half[1])
    with jax.numpy_dtype_promotion("strict"):
        for inputs in (INPUTS, half):
            jax.eval_shape(functools.partial(losses, **OPTIONS[case]), inputs)


def test_a_step_of_a_scan_is_a_step():
    """The queues are a carry: same structure, shapes and types before and after."""

    def step(queues, key):
        found = losses(INPUTS, queues=queues)
        return found.queues, found.sic

    with jax.enable_x64(True):
        jax.eval_shape(lambda: jax.lax.scan(step, some_queues(), jnp.arange(2)))
    queues, _ = jax.lax.scan(step, jax.tree.map(jnp.asarray, QUEUES), jnp.arange(2))
    once = losses(INPUTS).queues
    again = losses(INPUTS, queues=once).queues
    jax.tree.map(np.testing.assert_array_equal, queues, again)


def test_embeddings_of_any_length_give_their_cosines():
    longer = jax.tree.map(
        lambda f: f._replace(embedding=7 * f.embedding),
        (INPUTS.online, INPUTS.momentum), is_leaf=lambda x: isinstance(x, Features),
    )  # fmt: skip
    found = losses(INPUTS._replace(online=longer[0], momentum=longer[1]), alpha=0.4)
    expected = losses(INPUTS, alpha=0.4)
    np.testing.assert_allclose(found.sic, expected.sic, rtol=1e-6)
    np.testing.assert_allclose(
        found.queues.embeddings.entries["image"], expected.queues.embeddings.entries["image"],
        atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_embeddings_numpy_and_tuples_pass(dtype):
    speech, image = ((np.asarray(f.embedding.astype(dtype)), f.tokens) for f in INPUTS.online)
    found = c2f.c2f_losses(
        speech, image, np.asarray(IDS, np.int64), tau=np.float64(TAU), key=jax.random.PRNGKey(0),
        match=match_by(INPUTS.weights), momentum=(speech, image), queues=QUEUES,
        row_valid=np.ones(N, bool), negatives="queue",
    )  # fmt: skip
    assert found.sic.dtype == jnp.float32 and np.isfinite(found.sic) and np.isfinite(found.sim)


def test_precision_reaches_every_similarity():
    def precisions(precision):
        text = str(
            jax.make_jaxpr(lambda x: losses(x, precision=precision, **OPTIONS["queue"]))(INPUTS)
        )  # noqa: E501
        return text.count("Precision.HIGHEST")

    assert precisions("highest") >= 6 and precisions("default") == 0


Z = Features(jnp.eye(4), jnp.eye(4))
WRONG = [
    ({"ids": jnp.arange(3)}, r"speech.embedding has shape \(4, 4\).*with n = 3"),
    ({"image": Features(jnp.eye(4)[:, :3], jnp.eye(4))}, r"image.embedding has shape \(4, 3\)"),
    ({"speech": Features(jnp.eye(4), {"h": jnp.eye(3)})}, r"speech.tokens\['h'\] has shape"),
    ({"speech": Features(jnp.eye(4))}, "speech.tokens is empty.*match=None"),
    ({"speech": jnp.eye(4)}, r"speech is a .*; it must be Features\(embedding, tokens\)"),
    ({"momentum": Pair(Z, jnp.eye(4))}, "momentum.image is a .*; it must be Features"),
    ({"ids": np.arange(4) * 2**32}, "ids has 4294967296, which jax would cut to 32 bits"),
    ({"ids": jnp.arange(0)}, "ids has shape|speech.embedding has shape"),
    ({"tau": np.float32(-0.1)}, "tau is -0.1; it must be above 0"),
    ({"momentum": Pair(Z, Z), "alpha": np.float32(1.5)}, "alpha is 1.5; it must be from 0 to 1"),
    ({"mining_tau": jnp.ones(4)}, r"mining_tau has shape \(4,\)"),
    ({"sigmoid_bias": jnp.ones(4)}, r"sigmoid_bias has shape \(4,\)"),
    ({"negatives_per_row": 2.0}, "negatives_per_row is 2.0; it must be an int"),
    ({"queues": {}}, "queues is a dict; it must be Queues"),
    ({"momentum": Pair(Z, Features(jnp.eye(5)))}, "momentum.image.embedding has shape"),
    ({"tau": 0.0}, "tau is 0; it must be above 0"),
    ({"tau": jnp.ones(4)}, r"tau has shape \(4,\)"),
    ({"alpha": 0.4}, "momentum is None; distillation needs it"),
    ({"momentum": Pair(Z, Z), "alpha": 1.5}, "alpha is 1.5; it must be from 0 to 1"),
    ({"queues": c2f.create_queues(Z, Z, jnp.arange(4), size=3)}, "the queues hold momentum"),
    ({"negatives": "queue", "momentum": Pair(Z, Z)}, "needs a token queue"),
    ({"negatives": "all"}, "negatives is 'all'; it must be one of batch, global, queue"),
    ({"id_policy": "no"}, "unknown id policy 'no'"),
    ({"negatives_per_row": 5}, "per_row is 5; it must be from 1 to .* 4"),
    ({"sigmoid_bias": -1.0, "momentum": Pair(Z, Z), "alpha": 0.1}, "distillation is of the soft"),
    ({"row_valid": jnp.ones(4)}, "row_valid has shape .* float32; it must be bool"),
    ({"row_valid": jnp.ones(3, bool)}, r"row_valid has shape \(3,\)"),
    ({"chunk": 0}, "chunk is 0; it must be an int of at least 1"),
    ({"branches": 3}, "branches=3 must divide the width"),
    ({"key": 3}, r"key is 3; it must be a key, such as jax.random.key\(3\)"),
    ({"key": jax.random.split(KEY, 4)}, r"key has shape \(4,\); it must be one key"),
    ({"match": lambda s, i: jnp.zeros((12, 1))}, r"match_logits has shape \(12, 1\)"),
    ({"match": lambda s, i: jnp.zeros((4, 2))}, r"match_logits has shape \(4, 2\)"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG)
def test_wrong_calls_are_named(change, message):
    match = lambda s, i: jnp.zeros((s.shape[0], 2))  # noqa: E731
    right = dict(speech=Z, image=Z, ids=jnp.arange(4), tau=0.1, key=KEY, match=match)
    c2f.c2f_losses(**right)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: c2f.c2f_losses(**right | change))


def test_chunks_of_rows_sharded_over_explicit_axes_are_refused():
    mesh = jax.make_mesh((4,), ("d",))
    placed = jax.device_put(INPUTS.online, NamedSharding(mesh, P("d")))
    ids = jax.device_put(IDS, NamedSharding(mesh, P("d")))
    with pytest.raises(ValueError, match="chunk cannot cut rows.*use shard_map"):
        jax.jit(lambda z, ids: c2f.c2f_losses(*z, ids, tau=TAU, key=KEY, chunk=4))(placed, ids)


def test_tokens_of_another_structure_than_the_queue_are_named():
    other = Pair(*(f._replace(tokens={"x": f.tokens[0]}) for f in INPUTS.momentum))
    with pytest.raises(ValueError, match="is PyTreeDef.*as what the queue was created with"):
        losses(INPUTS._replace(momentum=other))


def test_momentum_tokens_are_asked_for_where_something_reads_them():
    without = Pair(*(Features(f.embedding) for f in INPUTS.momentum))
    losses(INPUTS._replace(momentum=without), queues=None)
    with pytest.raises(ValueError, match="momentum.speech.tokens is empty"):
        losses(INPUTS._replace(momentum=without))


def test_tokens_larger_than_the_queue_are_named():
    longer = [f._replace(tokens=(jnp.zeros((N, 5, D)), IDS)) for f in INPUTS.momentum]
    with pytest.raises(ValueError, match=r"\(16, 5, 6\); its rows must fit into \(3, 6\)"):
        losses(INPUTS._replace(momentum=Pair(*longer)))
