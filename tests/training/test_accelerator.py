"""What must hold on whatever device jax chooses: `JAX_PLATFORMS=cuda,cpu pytest -m accelerator
tests/training`. On a CPU the comparisons with the CPU are skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rounding import assert_equal_but_for_rounding

from c2f_jax import objectives as c2f
from c2f_jax.models.factory import create_model
from c2f_jax.models.layers import cudnn_attention, dot_product_attention
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.parallel import DataParallel
from c2f_jax.training.train_state import create_train_state
from c2f_jax.training.train_step import train_step

pytestmark = pytest.mark.accelerator

N, SAMPLES, SIDE = 8, 8000, 32
ON_CPU = jax.default_backend() == "cpu"
needs_accelerator = pytest.mark.skipif(ON_CPU, reason="the default device is a CPU")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
WIDTHS = {"width": 64, "depth": 1, "heads": 2}


@pytest.fixture(autouse=True)
def whole_products():
    """Products in float32, not in TF32 or bfloat16 as is the default of accelerators."""
    with jax.default_matmul_precision("highest"):
        yield


def small_model(**options):
    speech = WIDTHS | {"name": "log_mel", "mels": 20, "conv_layers": 2}
    image = WIDTHS | {"name": "vit", "patch": 8, "conv_blocks": 1, "token_pool": 2}
    return create_model(speech, image, WIDTHS, embedding_dim=32, **options)


def make_batch(seed):
    """Eight recordings of up to half a second; two rows show the same picture."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4000, SAMPLES + 1, N).astype(np.int32)
    waveform = 0.1 * rng.normal(size=(N, SAMPLES)) * (np.arange(SAMPLES) < lengths[:, None])
    ids = rng.choice(100, N, replace=False)
    ids[-1] = ids[0]
    return {
        "waveform": waveform.astype(np.float32),
        "speech_lengths": lengths,
        "image": rng.integers(0, 256, (N, SIDE, SIDE, 3)).astype(np.uint8),
        "image_id": ids.astype(np.int32),
    }


def gradient_descent():
    """Updates of plain SGD: what rounding does to a gradient, Adam may make as large as a step."""
    return optax.sgd(0.01)


@functools.cache
def host_state():
    """The initial state as numpy arrays: the same for all tests and devices."""
    state = create_train_state(
        small_model(), gradient_descent(), make_batch(0), seed=0, queue_size=24, token_queue_size=16
    )
    return jax.tree.map(np.asarray, state)


def step_of(**options):
    method = MethodConfig(alpha_ramp_steps=0, negatives="queue")
    return functools.partial(
        train_step, model=small_model(**options), optimizer=gradient_descent(), method=method
    )


def run_on(device, function, *inputs):
    """The result of a function under jit on a device, as numpy arrays."""
    with jax.default_device(device):
        return jax.tree.map(np.asarray, function(*jax.device_put(inputs, device)))


@needs_accelerator
def test_train_step_is_that_of_the_cpu():
    step = jax.jit(step_of())

    def take(state, batch):
        state, metrics = step(state, batch)
        return state, {name: average.compute() for name, average in metrics.items()}

    state = host_state()
    for seed in range(3):  # with empty queues, and with queues that fill
        inputs = state, make_batch(seed)
        expected = run_on(jax.devices("cpu")[0], take, *inputs)
        assert_equal_but_for_rounding(take, inputs, expected)
        state = expected[0]


def random_features(seed, n=16, tokens=5, width=24):
    keys = jax.random.split(jax.random.key(seed), 2)
    embeddings = c2f.l2_normalize(jax.random.normal(keys[0], (n, width)))
    return c2f.Features(embeddings, jax.random.normal(keys[1], (n, tokens, width)))


@functools.cache
def loss_inputs():
    """Online and momentum features, queues that are partly full, as numpy arrays."""
    pairs = [c2f.Pair(random_features(2 * k), random_features(2 * k + 1)) for k in range(3)]
    ids = jnp.arange(16) // 2
    queues = c2f.create_queues(*pairs[2], ids, size=40, token_size=24)
    out = jax.jit(functools.partial(losses, chunk=None))(*pairs[:2], queues, ids + 4)
    return jax.tree.map(np.asarray, (*pairs[:2], out[0].queues, ids))


def losses(online, momentum, queues, ids, *, chunk):
    """C2FLosses and the gradient of SIC + SIM by the online features."""

    def match(speech, image):
        score = jnp.mean(speech * image, axis=(1, 2))
        return jnp.stack([-score, 3 * score], axis=-1)

    def loss(online):
        out = c2f.c2f_losses(
            *online, ids, tau=0.1, key=jax.random.key(5), match=match, momentum=momentum,
            queues=queues, alpha=0.4, negatives="queue", negatives_per_row=2, chunk=chunk,
        )  # fmt: skip
        return out.sic + out.sim, out

    gradient, out = jax.grad(loss, has_aux=True)(online)
    return out._replace(metrics={k: v.compute() for k, v in out.metrics.items()}), gradient


@pytest.mark.parametrize("chunk", [3, 4, 16])
def test_losses_in_chunks_are_those_at_once(chunk):
    found = jax.jit(functools.partial(losses, chunk=chunk))(*loss_inputs())
    whole = jax.jit(functools.partial(losses, chunk=None))
    assert_equal_but_for_rounding(whole, loss_inputs(), found)


@needs_accelerator
@pytest.mark.parametrize("chunk", [None, 4])
def test_losses_are_those_of_the_cpu(chunk):
    function = jax.jit(functools.partial(losses, chunk=chunk))
    expected = run_on(jax.devices("cpu")[0], function, *loss_inputs())
    assert_equal_but_for_rounding(function, loss_inputs(), expected)


def plant_xla(monkeypatch):
    """XLA's attention in the place of cuDNN's, with what JAX refuses of it."""
    attend = jax.nn.dot_product_attention

    def planted(query, key, value, bias, *, implementation, **options):
        assert implementation == "cudnn" and query.shape[1] % 2 == key.shape[1] % 2 == 0
        return attend(query, key, value, bias, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", planted)


@pytest.mark.parametrize("planted", [True, pytest.param(False, marks=needs_gpu)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("queries, keys", [(96, 96), (97, 97), (97, 64), (64, 33)])
def test_attention_of_cudnn_agrees_with_that_of_xla(
    queries, keys, with_lengths, with_bias, planted, monkeypatch
):
    """Output and gradients, also for odd numbers of tokens, which JAX refuses."""
    if planted:
        plant_xla(monkeypatch)
    draws = iter(jax.random.split(jax.random.key(0), 4))
    query, key, value = (
        jax.random.normal(next(draws), (3, size, 2, 64), jnp.bfloat16)
        for size in (queries, keys, keys)
    )
    lengths = jnp.array([keys, keys // 2, 7]) if with_lengths else None
    bias = jax.random.normal(next(draws), (1, 2, queries, keys), jnp.bfloat16)

    def loss(attend, *inputs):
        y = attend(*inputs[:3], inputs[3] if with_bias else None, lengths).astype(jnp.float32)
        return jnp.mean(jnp.square(y)), y

    results = []
    for attend in (dot_product_attention, cudnn_attention):
        function = jax.grad(functools.partial(loss, attend), argnums=(0, 1, 2, 3), has_aux=True)
        results.append(jax.tree.leaves(jax.jit(function)(query, key, value, bias)))
    for expected, found in zip(*results, strict=True):
        expected, found = (np.asarray(x, np.float32) for x in (expected, found))
        scale = np.abs(expected).max()
        assert expected.shape == found.shape and (scale > 0 or not with_bias)
        # Weights and products are rounded to bfloat16, of 8 bits.
        np.testing.assert_allclose(found, expected, atol=0.03 * scale)


@pytest.mark.parametrize("attention", ["xla", pytest.param("cudnn", marks=needs_gpu)])
def test_bfloat16_steps_stay_near_those_in_float32(attention):
    runs = {}
    for options in ({}, {"dtype": "bfloat16", "attention": attention}):
        state, step = host_state(), jax.jit(step_of(**options))
        for seed in range(3):
            state, metrics = step(state, make_batch(seed))
        runs[options.get("dtype")] = {name: float(x.compute()) for name, x in metrics.items()}
        leaves = jax.tree.leaves(state.params)
        assert all(x.dtype == jnp.float32 and bool(jnp.isfinite(x).all()) for x in leaves)
    # bfloat16 keeps 8 bits: a product of a few layers is off by a few hundredths. Rounding may also
    # draw another negative, which the gradient shows most.
    for name, rtol in {"sic_loss": 0.1, "sim_loss": 0.1, "gradient_norm": 0.3}.items():
        np.testing.assert_allclose(
            runs["bfloat16"][name], runs[None][name], rtol=rtol, err_msg=name
        )


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_twenty_steps_take_the_memory_of_one(mode):
    """The state is donated, and no array of a step outlives it."""
    parallel = DataParallel(mode, jax.devices()[:1])
    step = parallel.compile_step(step_of())
    state = parallel.place_state(host_state())
    batches = [parallel.place_batch(make_batch(seed)) for seed in range(2)]
    counts, sizes = [], []
    for number in range(22):
        given = jax.tree.leaves(state)
        state, metrics = jax.block_until_ready(step(state, batches[number % 2]))
        assert all(leaf.is_deleted() for leaf in given)
        del given
        counts.append(len(jax.live_arrays()))
        sizes.append((jax.devices()[0].memory_stats() or {}).get("bytes_in_use"))
    assert len(set(counts[1:])) == 1, counts
    if not ON_CPU:
        assert max(sizes[1:]) < 1.01 * min(sizes[1:]), sizes
    assert bool(jnp.isfinite(metrics["loss"].compute()))
