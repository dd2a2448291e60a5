"""The Python blocks of README and of the documentation run as they are written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run before a block: importing anything but jax, what jax needs, and this package is an error.
JAX_ALONE = """
import sys

for name in ("flax", "optax", "clu", "orbax", "absl", "etils", "ml_collections", "librosa", "tensorflow"):
    sys.modules[name] = None
"""


def python_blocks(page):
    """The code of the page's Python blocks, in order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def numbered_blocks():
    """Each block of each page as (name, code)."""
    blocks = []
    for page in PAGES:
        for number, code in enumerate(python_blocks(page), 1):
            blocks.append(pytest.param(code, id=f"{page.stem}-{number}"))
    return blocks


@pytest.mark.parametrize("code", numbered_blocks())
def test_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "block"})  # noqa: S102


@pytest.mark.parametrize("name", ["README.md", "docs/method.md"])
def test_losses_need_jax_alone(name):
    (code,) = python_blocks(ROOT / name)
    done = subprocess.run([sys.executable, "-c", JAX_ALONE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 10


def test_the_losses_of_readme_are_twelve_lines():
    (code,) = python_blocks(ROOT / "README.md")
    loss = code[code.index("def loss") : code.index("\n\n", code.index("def loss"))]
    assert len(loss.splitlines()) <= 12


def test_readme_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 1000 and len(text.encode()) < 6500


def test_named_files_exist():
    """A path of the repository in a page, such as `configs/manifest.py`, is that of a file."""
    folders = "c2f_jax|configs|tests|benchmarks|launch|docs|objectives|models|training|retrieval|pretrained"
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for path in re.findall(rf"`((?:{folders})/[\w/.]*\.(?:py|sh|md|png)|(?:{folders})/)`", page.read_text()):
            assert (ROOT / path).exists() or (ROOT / "c2f_jax" / path).exists(), f"{page.name} names {path}"
