"""The network and the objective of docs/extending.md do what the page says; its data set is in
tests/datasets."""

import functools
import importlib
import json
import math
import sys

import jax
import numpy as np
import pytest
from helpers.pages import python_blocks
from helpers.paths import ROOT
from helpers.published_sets import put, wav
from jax.sharding import PartitionSpec
from PIL import Image
from safetensors.numpy import save_file

import c2f_jax.models.networks
import c2f_jax.pretrained.families
from c2f_jax.config import default_config
from c2f_jax.config.experiment import create_experiment
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.errors import UserError
from c2f_jax.models.factory import IMAGE_TOWERS, create_model
from c2f_jax.pretrained import families
from c2f_jax.pretrained.extract_features import extract_features
from c2f_jax.pretrained.weights import convert, load_published

CHANNELS, BLOCKS, SIDE = 6, 2, 12


def block_with(text):
    (code,) = [block for block in python_blocks(ROOT / "docs" / "extending.md") if text in block]
    return code


@pytest.fixture
def conv_net(tmp_path, monkeypatch):
    """The two files of the page and their two lines; returns a published folder."""
    added = (
        (c2f_jax.models.networks, "class ConvNet"),
        (c2f_jax.pretrained.families, "import Layout, module_rules"),
    )
    modules = []
    for package, text in added:
        folder = tmp_path / package.__name__
        put(folder / "conv_net.py", block_with(text))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        modules.append(importlib.import_module(f"{package.__name__}.conv_net"))
    network, family = modules
    monkeypatch.setitem(IMAGE_TOWERS, "conv_net", network.ConvNet)
    monkeypatch.setattr(families, "LAYOUTS", (*families.LAYOUTS, family.LAYOUT))

    folder = tmp_path / "published"
    config = {"channels": CHANNELS, "blocks": BLOCKS, "image_size": SIDE}
    put(folder / "config.json", json.dumps(config))
    save_file(published_tensors(), folder / "model.safetensors")
    yield folder
    for module in modules:
        del sys.modules[module.__name__]
        package, _, name = module.__name__.rpartition(".")
        delattr(sys.modules[package], name)


def published_tensors():
    """Random tensors under the published names, kernels (out, in, row, column)."""
    rng = np.random.default_rng(0)
    shapes = {"stem.conv": (CHANNELS, 3, 4, 4), "classifier": (10, CHANNELS)}
    for block in range(BLOCKS):
        shapes[f"blocks.{block}.conv"] = (CHANNELS, CHANNELS, 3, 3)
    tensors = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(np.prod(shape[1:]))
        tensors[f"{name}.weight"] = rng.normal(0, scale, shape).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0, 0.5, shape[:1]).astype(np.float32)
    return tensors


def reference_tokens(images):
    """The network in NumPy, in float64: (n, H, W, 3) uint8 -> (n, H W / 16, C)."""
    tensors = {name: value.astype(np.float64) for name, value in published_tensors().items()}
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)

    def convolution(name, x, stride):
        kernel, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        side = kernel.shape[-1]
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
        windows = windows[:, ::stride, ::stride]  # (n, row, column, in, side, side)
        return np.einsum("nrcixy,oixy->nrco", windows, kernel) + bias

    x = convolution("stem.conv", images / 127.5 - 1, 4)
    for block in range(BLOCKS):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = x + gelu(convolution(f"blocks.{block}.conv", padded, 1))
    return x.reshape(len(x), -1, CHANNELS)


def test_a_published_network_is_converted_and_makes_tokens(conv_net, tmp_path):
    weights = tmp_path / "weights"
    card = convert([conv_net], weights)
    assert card["layout"] == "ConvNet" and card["preprocessing"]["image_size"] == SIDE

    # Through the encoder: with depth 0 the tokens are the network's, their mean first.
    model = create_model(
        {"name": "log_mel", "width": 8, "depth": 0},
        {"name": "published", "tower": card["tower"], "depth": 0},
        {"width": 8, "depth": 1},
        embedding_dim=8,
        dtype="float32",
    )
    images = np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    batch = {
        "waveform": np.zeros((2, 4000), np.float32),
        "speech_lengths": np.full(2, 4000, np.int32),
        "image": images,
    }
    params = model.init(jax.random.key(0), images, method="encode_image")["params"]
    params = {**params, **load_published(model, {"image": weights}, batch)}
    encoded = model.apply({"params": params}, images, method="encode_image")
    expected = reference_tokens(images)
    np.testing.assert_allclose(encoded.tokens[:, 1:], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encoded.tokens[:, 0], expected.mean(axis=1), rtol=1e-5, atol=1e-5)

    # Through the feature cache, in float16.
    rows = []
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
        put(tmp_path / f"{k}.wav", wav(0.3, k))
        rows.append(json.dumps({"image": f"{k}.png", "audio": f"{k}.wav", "split": "train"}))
    put(tmp_path / "manifest.jsonl", "\n".join(rows))
    source = load_pairs(f"{tmp_path}/manifest.jsonl", "train")
    features = extract_features(weights, [source], tmp_path / "cache", batch_size=3)
    for k, tokens in enumerate(expected):
        found = features.tokens(f"{k}.png")
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, tokens, rtol=2e-3, atol=2e-3)


def test_a_configuration_takes_the_published_files(conv_net):
    config = default_config()
    config.data.name = "spoken_scenes"
    config.model.image = {"name": "published", "weights": str(conv_net), "width": 16}
    experiment = create_experiment(config)
    assert experiment.data.image_size == SIDE and experiment.weights == {"image": str(conv_net)}
    network = experiment.model.image_encoder.tower
    assert (network.width, network.depth) == (CHANNELS, BLOCKS)


def test_tensors_that_do_not_fit_the_network_are_named(conv_net, tmp_path):
    tensors = published_tensors()
    tensors["blocks.1.conv.weight"] = tensors["blocks.1.conv.weight"][:, :2].copy()
    tensors["extra.weight"] = tensors.pop("stem.conv.bias")
    save_file(tensors, conv_net / "model.safetensors")
    with pytest.raises(UserError) as error:
        convert([conv_net], tmp_path / "weights")
    listed = str(error.value)
    assert "missing: stem.conv.bias (for stem/bias)" in listed
    assert "unused: extra.weight (6,)" in listed
    assert "misshaped: blocks.1.conv.weight (6, 2, 3, 3) does not fit block_1/kernel" in listed


@pytest.fixture
def objective():
    scope = {"__name__": "block"}
    exec(block_with("def sigmoid_loss"), scope)  # noqa: S102
    return scope


def objective_batch(rows=8, width=5, inputs=7):
    """A batch in which two pairs of rows are of one image each, and parameters."""
    rng = np.random.default_rng(2)
    image = rng.normal(size=(rows, width))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    ids = np.arange(rows)
    ids[[3, 6]] = ids[[0, 5]]
    batch = {"speech": rng.normal(size=(rows, inputs)), "image": image, "id": ids}
    params = {"map": rng.normal(size=(inputs, width)), "log_tau": np.log(0.2), "bias": -1.5}
    return batch, params


def reference_loss(params, batch):
    """The mean of the page's equation in float64, pair by pair."""
    speech = batch["speech"] @ params["map"]
    speech /= np.linalg.norm(speech, axis=1, keepdims=True)
    total = 0.0
    for s, own in zip(speech, batch["id"], strict=True):
        for v, other in zip(batch["image"], batch["id"], strict=True):
            logit = s @ v / np.exp(params["log_tau"]) + params["bias"]
            total += math.log1p(math.exp(-logit if own == other else logit))
    return total / len(speech)


def reference_gradient(params, batch, step=1e-6):
    """Central differences of ``reference_loss``."""
    gradient = {}
    for name, value in params.items():
        value = np.asarray(value, np.float64)
        slopes = np.zeros(value.size)
        for k in range(value.size):
            change = np.zeros(value.size)
            change[k] = step
            change = change.reshape(value.shape)
            above = reference_loss(params | {name: value + change}, batch)
            below = reference_loss(params | {name: value - change}, batch)
            slopes[k] = (above - below) / (2 * step)
        gradient[name] = slopes.reshape(value.shape)
    return gradient


@pytest.mark.parametrize("devices", [1, 4])
def test_an_objective_and_its_gradient_are_those_of_the_equation(objective, devices):
    batch, params = objective_batch()
    train = objective["train"]
    if devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("devices",))
        step = functools.partial(objective["step"], axis_name="devices")
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("devices")),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        train = jax.jit(mapped)

    of_jax = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    ids = batch["id"].astype(np.int32)
    in_float32 = {name: batch[name].astype(np.float32) for name in ("speech", "image")}
    updated, loss = train(of_jax, in_float32 | {"id": ids})
    assert float(loss) == pytest.approx(reference_loss(params, batch), rel=1e-5)
    for name, slope in reference_gradient(params, batch).items():
        found = (np.asarray(of_jax[name], np.float64) - np.asarray(updated[name])) / 0.01
        np.testing.assert_allclose(found, slope, rtol=1e-3, atol=2e-4)


def test_an_objective_trains(objective):
    batch, params = objective_batch()
    losses = []
    for _ in range(20):
        params, loss = objective["train"](params, batch)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
