"""The optimisers: which values Muon takes as matrices, and what a step does to each kind of
value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from c2f_jax.errors import UserError
from c2f_jax.models.factory import create_model
from c2f_jax.training.optimizer import OptimizerConfig, create_optimizer, muon_dimensions

SMALL = {"width": 8, "depth": 1, "heads": 2, "mlp_ratio": 4.0}


@pytest.fixture(scope="module")
def params():
    model = create_model(
        {"name": "log_mel", "mels": 10, "conv_layers": 1} | SMALL,
        {"name": "vit", "conv_stem": True, "conv_blocks": 1, "token_pool": 1} | SMALL,
        SMALL,
        embedding_dim=6,
    )
    batch = {
        "waveform": jnp.zeros((1, 2000)),
        "speech_lengths": jnp.array([2000]),
        "image": jnp.zeros((1, 16, 16, 3), jnp.uint8),
    }
    return jax.jit(model.init)(jax.random.key(0), batch)["params"]


def matrix(value, dimensions):
    """The value as Muon sees it: inputs by outputs."""
    inputs, outputs = dimensions.reduction_axis, dimensions.output_axis
    size = int(np.prod([value.shape[axis] for axis in inputs]))
    return np.transpose(value, (*inputs, *outputs)).reshape(size, -1)


def test_muon_sees_kernels_as_inputs_by_outputs(params):
    dimensions = muon_dimensions(params)

    def shape(*path):
        value, dims = params, dimensions
        for name in path:
            value, dims = value[name], dims[name]
        return matrix(np.asarray(value), dims).shape

    block = ("speech_encoder", "transformer", "block_0", "self_attention")
    assert shape(*block, "query", "kernel") == (8, 8)
    assert shape(*block, "out", "kernel") == (8, 8)
    assert shape("speech_encoder", "conv_0", "kernel") == (3 * 10, 8)
    assert shape("image_encoder", "conv_0", "kernel") == (9 * 3, 2)
    assert shape("image_encoder", "block_0", "kernel") == (9 * 8, 8)
    assert shape("speech_projection", "kernel") == (8, 6)


def test_muon_leaves_all_else_to_adam(params):
    dimensions = muon_dimensions(params)
    assert dimensions["temperature"]["log_tau"] is None
    assert dimensions["image_encoder"]["positions"] is None
    assert dimensions["speech_projection"]["bias"] is None


def test_muon_orthogonalises_the_update_of_a_kernel(params):
    """All singular values of the update are near 0.2 sqrt(max(inputs, outputs)) times the learning
    rate.

    The five Newton-Schulz steps of Muon bring singular values into about [0.7, 1.2], not exactly to
    1.
    """
    config = OptimizerConfig("muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.0)
    optimizer = create_optimizer(config, 10)
    params = {
        "image_encoder": {"block_0": params["image_encoder"]["block_0"]},
        "speech_projection": params["speech_projection"],
    }
    generator = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32), params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    dimensions = muon_dimensions(params)
    block, projection = (
        matrix(np.asarray(tree["kernel"]), dims["kernel"])
        for tree, dims in (
            (updates["image_encoder"]["block_0"], dimensions["image_encoder"]["block_0"]),
            (updates["speech_projection"], dimensions["speech_projection"]),
        )
    )
    for update in (block, projection):
        singular = np.linalg.svd(
            update / (0.01 * 0.2 * np.sqrt(max(update.shape))), compute_uv=False
        )
        assert 0.6 < singular.min() and singular.max() < 1.3
    adam = optax.adam(0.01, b2=config.b2, nesterov=True)
    clipped = jax.tree.map(lambda g: g / optax.global_norm(grads), grads)
    expected, _ = adam.update(clipped, adam.init(params))
    bias = (tree["speech_projection"]["bias"] for tree in (updates, expected))
    np.testing.assert_allclose(*bias, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_reaches_kernels_alone(params, name):
    config = OptimizerConfig(name, learning_rate=0.01, warmup_steps=0, weight_decay=0.5)
    optimizer = create_optimizer(config, 10)
    ones = jax.tree.map(jnp.ones_like, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(ones), ones)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        np.testing.assert_allclose(
            update, -0.005 if path[-1].key == "kernel" else 0.0, rtol=1e-6, err_msg=str(path)
        )


def test_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="optimizer.name='sgd': choose one of adamw, muon"):
        create_optimizer(OptimizerConfig("sgd"), 10)
