"""The programs of docs/programs, which strangers copy: they run, learn, and their gradients are
those of the paper's equations in float64."""

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.oracle import oracle_losses
from helpers.paths import ROOT
from helpers.rounding import rounding_ratios
from jax.sharding import PartitionSpec as P

from c2f_jax import objectives as c2f

FOLDER = ROOT / "docs" / "programs"
NAMES = ("plain_jit", "flax_nnx", "equinox_modules", "mesh")
RATE = 0.05


def losses_printed(text):
    return [tuple(map(float, x)) for x in re.findall(r"SIC ([\d.]+), SIM ([\d.]+)", text)]


def assert_learns(name, text):
    """SIC falls from that of random similarities; SIM below the value of a blind matcher."""
    losses = losses_printed(text)
    assert losses[0][0] > 4 and losses[-1][0] < 1.5, text
    assert losses[-1][1] < min(losses[0][1], c2f.COLLAPSE_VALUE) - 0.05, text
    if name == "mesh":  # both forms are one computation
        half = len(losses) // 2
        np.testing.assert_allclose(losses[:half], losses[half:], atol=0.02)


@pytest.mark.accelerator
@pytest.mark.parametrize(
    "name", ["plain_jit", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_the_loss_falls(name):
    if name == "equinox_modules":
        pytest.importorskip("equinox")
    done = subprocess.run([sys.executable, FOLDER / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_learns(name, done.stdout)


def test_programs_are_short():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert set(lengths) == {*NAMES, "toy_pairs"} and max(lengths.values()) < 60, lengths


# An optimizer whose state is the gradient: what a program's step returns of it can be compared.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: params, lambda grads, *_: (jax.tree.map(lambda x: -RATE * x, grads), grads)
)


class PlainJit:
    """One step of a program with KEEP_GRADIENT: pytrees in, pytrees out."""

    size = {"size": 128, "token_size": 64}

    def __init__(self, program):
        self.program, self.run = program, program.train_step

    def init(self, seed):
        return self.program.init(jax.random.key(seed))

    def encode(self, params, batch):
        return self.program.encode(params, batch)

    def step(self, params, momentum, queues, batch, number):
        """((params, momentum, queues), (gradient, SIC, SIM)) after the step."""
        *state, gradient, out = self.run(params, momentum, queues, params, batch, number)
        return tuple(state), (gradient, out.sic, out.sim)


class EquinoxModules(PlainJit):
    size = {"size": 128}

    def init(self, seed):
        import equinox

        self.eqx = equinox
        params, self.rest = self.eqx.partition(
            self.program.Model(jax.random.key(seed)), self.eqx.is_inexact_array
        )
        return params

    def encode(self, params, batch):
        return self.eqx.combine(params, self.rest).encode(batch)

    def step(self, params, momentum, queues, batch, number):
        model, momentum = (self.eqx.combine(p, self.rest) for p in (params, momentum))
        model, momentum, queues, gradient, out = self.run(
            model, momentum, queues, params, batch, jnp.int32(number), KEEP_GRADIENT
        )
        state = [self.eqx.filter(m, self.eqx.is_inexact_array) for m in (model, momentum)]
        return (*state, queues), (gradient, out.sic, out.sim)


class FlaxNnx(PlainJit):
    size = {"size": 128}

    def init(self, seed):
        self.graph, params, self.rest = nnx.split(
            self.program.Model(nnx.Rngs(seed)), nnx.Param, ...
        )
        return params

    def encode(self, params, batch):
        return nnx.merge(self.graph, params, self.rest).encode(batch)

    def step(self, params, momentum, queues, batch, number):
        model, momentum = (nnx.merge(self.graph, p, self.rest) for p in (params, momentum))
        optimizer = nnx.Optimizer(model, KEEP_GRADIENT, wrt=nnx.Param)
        queues, out = self.run(model, momentum, optimizer, queues, batch, number)
        state = [nnx.state(m, nnx.Param) for m in (model, momentum)]
        gradient = nnx.state(optimizer.opt_state)
        return (*state, queues), (gradient, out.sic, out.sim)


class Mesh(PlainJit):
    """Under jit with explicit sharding; the same without a mesh for the oracle."""

    size = {"size": 128}
    form = "explicit"

    def __init__(self, program):
        self.program, self.run = program, jax.jit(getattr(program, self.form))

    def step(self, *args):
        if jax.config.jax_enable_x64:
            self.run = jax.jit(self.program.train_step)
            return super().step(*args)
        with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("data",))):
            *state, batch, number = args
            return super().step(*state, jax.device_put(batch, P("data")), number)


class MeshMapped(Mesh):
    """Under shard_map."""

    form = "mapped"


CASES = {
    PlainJit: "plain_jit",
    FlaxNnx: "flax_nnx",
    EquinoxModules: "equinox_modules",
    Mesh: "mesh",
    MeshMapped: "mesh",
}


@pytest.mark.accelerator
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_equations(case, monkeypatch):
    """One step from a queue that is partly full: gradient and losses against the oracle in float64.
    The program itself runs its encoders and its matcher in float64 there."""
    if case is EquinoxModules:
        pytest.importorskip("equinox")
    monkeypatch.syspath_prepend(str(FOLDER))
    program = importlib.import_module(CASES[case])
    toy_batch = importlib.import_module("toy_pairs").toy_batch
    monkeypatch.setattr(program, "OPTIMIZER", KEEP_GRADIENT, raising=False)
    program = case(program)

    batch, momentum, params = toy_batch(0), program.init(1), program.init(0)
    queues = c2f.create_queues(*program.encode(params, batch), batch["ids"], **program.size)
    state = params, momentum, queues
    for number in range(2):
        state, _ = program.step(*state, toy_batch(number), number)
    inputs = jax.device_get((*state, toy_batch(50)))
    assert int(inputs[2].embeddings.count) == 64

    with jax.enable_x64(True), monkeypatch.context() as patch:
        patch.setattr(c2f, "c2f_losses", oracle_losses)
        _, exact = program.step(*jax.tree.map(in_float64, inputs), 50)
        assert all(x.dtype == np.float64 for x in jax.tree.leaves(exact))
    exact = jax.tree.map(np.float32, exact)
    ratios = rounding_ratios(lambda *inputs: program.step(*inputs, 50)[1], inputs, exact)
    assert max(ratios.values()) <= 1, ratios
    # Not a comparison of zeros, which the gradient of the keys' biases in attention is.
    assert np.median([np.abs(x).max() for x in jax.tree.leaves(exact)]) > 1e-3


def in_float64(x):
    return np.asarray(x, np.float64) if x.dtype == np.float32 else x


@pytest.mark.slow
def test_programs_need_the_light_install_alone(tmp_path):
    """`pip install .`, Equinox beside it, and all programs as they are."""
    pytest.importorskip("equinox")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("c2f_jax", "configs"):
        shutil.copytree(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", source], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}

    run = functools.partial(subprocess.run, capture_output=True, text=True, env=environment)
    without = run([python, FOLDER / "equinox_modules.py"], cwd=tmp_path)
    assert "No module named 'equinox'" in without.stderr
    for name in sorted(NAMES, key="equinox_modules".__eq__):
        if name == "equinox_modules":
            subprocess.run([python, "-m", "pip", "install", "-q", "equinox"], check=True)
        done = run([python, FOLDER / f"{name}.py"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert_learns(name, done.stdout)
