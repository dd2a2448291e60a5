"""Importing the package and the objectives in a fresh interpreter: what they load, and how long it
takes."""

import ast
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
from helpers.paths import CONFIGS, ROOT

import c2f_jax
from c2f_jax.errors import EXTRA_OF_MODULE
from c2f_jax.main import main
from c2f_jax.objectives.average import Average
from c2f_jax.training.recorder import Recorder

REPORT = """
import sys, jax._src.xla_bridge
print(*sys.modules, bool(jax._src.xla_bridge._backends))
"""


def fresh(code):
    """Top-level modules that ``code`` loads and whether a jax backend was started, in a new
    interpreter."""
    done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *modules, started = done.stdout.split()
    return {name.partition(".")[0] for name in modules}, started == "True"


def test_objectives_need_jax_alone():
    names = "losses", "momentum", "keys"
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
    names = "train_step", "train_state", "method", "optimizer", "parallel"
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
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        c2f_jax.trian  # noqa: B018


def test_editors_and_users_see_the_same_names():
    tree = ast.parse((ROOT / "c2f_jax" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    for name in c2f_jax.__all__:
        value = getattr(c2f_jax, name)
        if name in seen and name != "objectives":
            assert value is getattr(importlib.import_module(seen[name]), name)
    assert seen.keys() | {"UserError"} == set(c2f_jax.__all__)
    assert c2f_jax.objectives.sic_loss


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_collections", None)  # importing it raises
    for name in ("c2f_jax.config.files", "c2f_jax.config.default", "c2f_jax.config"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["evaluate", "--workdir=x"]) == 2
    expected = "c2f evaluate needs the extra `train`: pip install 'c2f_jax[train]'"
    assert capsys.readouterr().err.strip() == expected


def test_a_harness_without_its_package_names_the_extra(monkeypatch):
    from c2f_jax.harnesses.mteb import MtebEncoder

    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setitem(sys.modules, "mteb.models.model_meta", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the extra `mteb`: pip install 'c2f_jax"):
        MtebEncoder(None)


def test_training_without_tensorflow_says_once_that_there_are_no_event_files(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "clu"]:
        monkeypatch.delitem(sys.modules, name)
    recorder = Recorder(tmp_path, steps=2, batch_size=4, sim_from=None)
    assert capsys.readouterr().err.strip() == (
        "writing no event files: TensorBoard needs the extra `tensorboard`: "
        "pip install 'c2f_jax[tensorboard]'"
    )
    recorder.start(0)
    recorder.add({"loss": Average.of(2.0), "tau": Average.of(0.07)}, 0.0)
    recorder.log(1)
    recorder.close()
    assert [list(point) for point in recorder.history["train/loss"]] == [[1, 2.0]]
    assert not list(tmp_path.iterdir())


def test_each_package_of_an_extra_is_known_by_its_module():
    text = (ROOT / "setup.py").read_text()
    modules = {
        "orbax": "orbax-checkpoint",
        "absl": "absl-py",
        "PIL": "pillow",
        "libtpu": "jax[tpu]",
    }
    for module in EXTRA_OF_MODULE:
        package = modules.get(module, module)
        assert package in text or package.replace("_", "-") in text, module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the sdist, and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, source)
    for name in ("c2f_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "build", "-o", folder, source], check=True)
    return folder


def install(folder, what, extras=""):
    """What runs programs of a fresh environment, in an empty folder and without this clone."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    binaries = folder / "venv" / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", f"{what}{extras}"], check=True)
    empty = folder / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    environment["TFDS_DATA_DIR"] = str(folder / "tfds")
    run = functools.partial(
        subprocess.run, capture_output=True, text=True, cwd=empty, env=environment
    )
    return binaries, run


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_a_run_needs(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    version = c2f_jax.__version__
    assert (wheel.name, sdist.name) == (
        f"c2f_jax-{version}-py3-none-any.whl",
        f"c2f_jax-{version}.tar.gz",
    )
    twine = [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist]
    assert subprocess.run(twine).returncode == 0

    files = [path for path in (ROOT / "c2f_jax").rglob("*") if path.is_file()]
    needed = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    configs = {path.name for path in CONFIGS.glob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == needed | {f"c2f_jax/configs/{name}" for name in configs}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert needed | {f"configs/{name}" for name in configs} | {"CITATION.cff"} <= names
    assert not any(name.startswith("tests") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_the_first_block_of_readme_runs_from_an_installation(built, kind, tmp_path):
    """Its `c2f` commands, with the run of seconds, in an empty folder."""
    (distribution,) = built.glob(kind)
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    pip, commands = re.search(r'install -q "\.(\[.*?\])"$(.*)', block, re.M | re.S).groups()
    commands = commands.replace("--config=spoken_scenes ", "--config=spoken_scenes:runlocal ")
    assert ":runlocal" in commands and commands.count("c2f ") == 2
    _, run = install(tmp_path, distribution, pip)
    done = run(["bash", "-euo", "pipefail", "-c", commands])
    assert done.returncode == 0, done.stderr
    assert "R@1" in done.stdout and "  5. " in done.stdout
    page = (tmp_path / "empty/runs/spoken_scenes/eval/spoken_scenes-tiny-test.html").read_text()
    assert (ROOT / "c2f_jax/reports/style.css").read_text()[:200] in page
    version = run(["c2f", "--version"])
    assert version.stdout == f"c2f_jax {c2f_jax.__version__}\n"


@pytest.mark.slow
def test_the_light_core_alone(built, tmp_path):
    """`pip install c2f_jax` brings the losses, the models and the training step, and a command says
    what it lacks."""
    (wheel,) = built.glob("*.whl")
    binaries, run = install(tmp_path, wheel)
    done = run([binaries / "python", ROOT / "tests" / "helpers" / "core_program.py"])
    assert done.returncode == 0, done.stderr
    needed = "c2f_jax.train_and_evaluate needs the extra `train`: pip install 'c2f_jax[train]'"
    assert done.stdout.strip() == needed

    train = run([binaries / "c2f", "train", "--config=spoken_scenes", "--workdir=run"])
    assert train.returncode == 2
    needed = "c2f train needs the extra `train`: pip install 'c2f_jax[train]'"
    assert train.stderr.strip() == needed
    assert run([binaries / "c2f", "--help"]).returncode == 0
