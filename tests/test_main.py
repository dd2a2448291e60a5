"""What every command does before its own work."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from c2f_jax.main import main
assert main(["search", "--workdir=nowhere", "--audio", "nothing.wav"]) == 2
import jax
jax.jit(lambda x: 3 * x + 1)(1.0)
"""


def run(**environment):
    """The program with a cache folder of its own; every program is slow enough to be kept."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def files(folder):
    return [path.name for path in folder.rglob("*-cache")]


def test_compiled_programs_are_kept(tmp_path):
    pytest.importorskip("filelock")
    run(XDG_CACHE_HOME=str(tmp_path))
    assert len(files(tmp_path / "c2f_jax")) == 1

    # JAX's own variables have priority.
    other = tmp_path / "other"
    run(XDG_CACHE_HOME=str(tmp_path / "new"), JAX_COMPILATION_CACHE_DIR=str(other))
    assert files(other) and not files(tmp_path / "new")
    run(XDG_CACHE_HOME=str(tmp_path / "new"), JAX_ENABLE_COMPILATION_CACHE="false")
    assert not files(tmp_path / "new")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert "cache" not in run(XDG_CACHE_HOME=str(tmp_path / "file")).replace("nowhere", "")
