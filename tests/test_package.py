"""Importing the package and the objectives in a fresh interpreter: what they load, and how long it takes."""

import subprocess
import sys
import time

import pytest

REPORT = """
import sys, jax._src.xla_bridge
print(*sys.modules, bool(jax._src.xla_bridge._backends))
"""


def fresh(code):
    """Top-level modules that ``code`` loads and whether a jax backend was started, in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *modules, started = done.stdout.split()
    return {name.partition(".")[0] for name in modules}, started == "True"


def test_objectives_need_jax_alone():
    names = "embedding_queue", "momentum", "collectives", "keys", "matching", "hard_negatives"
    modules, started = fresh(f"import {', '.join(f'c2f_jax.objectives.{name}' for name in names)}")
    assert not modules & {
        "tensorflow",
        "absl",
        "flax",
        "optax",
        "clu",
        "orbax",
        "ml_collections",
        "librosa",
        "grain",
    }
    assert not started


def test_the_step_needs_jax_flax_optax_and_what_these_need():
    names = "train_step", "train_state", "method", "optimizer", "parallel", "average", "pairs"
    modules, started = fresh(f"import {', '.join(f'c2f_jax.training.{name}' for name in names)}")
    assert not modules & {
        "tensorflow",
        "tensorflow_datasets",
        "clu",
        "tqdm",
        "ml_collections",
        "librosa",
        "grain",
        "PIL",
    }
    assert not started


def test_public_names_load_no_tensorflow_and_start_no_backend():
    modules, started = fresh("import c2f_jax\nfor name in c2f_jax.__all__: getattr(c2f_jax, name)")
    assert not modules & {"tensorflow", "matplotlib"} and "flax" in modules
    assert not started


def test_the_check_sees_a_started_backend_and_absl_flags():
    modules, started = fresh("import jax.numpy; jax.numpy.zeros(1); import absl.flags")
    assert started and "absl" in modules


def test_importing_the_package_is_fast_and_light():
    modules, started = fresh("import c2f_jax")
    assert not modules & {"tensorflow", "absl", "flax"} and not started
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import c2f_jax"], check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2


def test_an_unknown_name_is_an_attribute_error():
    import c2f_jax

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        c2f_jax.trian  # noqa: B018
