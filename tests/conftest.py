"""Four CPU devices for every test, compiled for a short compile time; set before jax is
imported. With another JAX_PLATFORMS than cpu the tests run there, as users' programs do."""

import functools
import importlib.metadata
import os
import sys
import tempfile

# Tests run each program a few times: an unoptimised one without fusion compiles three times faster.
FAST_COMPILE = "--xla_backend_optimization_level=0"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FAST_COMPILE += (
        " --xla_cpu_use_fusion_emitters=false"  # later ones end the process at this flag
    )
ON_CPU = os.environ.get("JAX_PLATFORMS", "cpu") == "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers have it from the process of the session
    if ON_CPU:
        flags = f"--xla_force_host_platform_device_count=4 {FAST_COMPILE}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Several tests run the same training: what one of them has compiled, here or in another
    # process, the others load. The folder lasts as long as this process.
    compiled_programs = tempfile.TemporaryDirectory(prefix="c2f-tests-")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled_programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402
from helpers.paths import ROOT  # noqa: E402


def pytest_xdist_auto_num_workers(config):
    """The default tests share the processors; a selection of them, or long tests, run one by
    one."""
    default = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    default = default and "not slow" in config.option.markexpr and not config.option.keyword
    return min(len(os.sched_getaffinity(0)), 4) if default else 0


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """What one file has compiled is not kept for the next, which would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def no_rank_promotion():
    """Broadcasting (n,) against (n, m) raises; for the objectives, where it would hide a wrong
    axis."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory):
    """A TFDS directory that holds spoken_scenes/tiny."""
    from c2f_jax.datasets.registry import load_pairs

    pytest.importorskip("espeakng_loader")
    directory = str(tmp_path_factory.mktemp("tfds"))
    load_pairs("spoken_scenes/tiny", "train", directory)
    return directory


@pytest.fixture(scope="session")
def run_short(tiny_data_dir, tmp_path_factory):
    """A function that runs the short form of a notebook of colab/ in a Jupyter kernel, once, and
    returns it with its outputs and the folder that it ran in."""
    nbformat = pytest.importorskip("nbformat")
    notebooks = pytest.importorskip("notebooks")
    environment = {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": tiny_data_dir}

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        short = notebooks.shorten(nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4))
        nbformat.write(short, folder / f"{name}.ipynb")
        notebooks.execute(sys.executable, folder / f"{name}.ipynb", os.environ | environment)
        return nbformat.read(folder / f"{name}.ipynb", as_version=4), folder

    return run
