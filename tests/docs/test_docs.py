"""What the documentation promises: code that runs, commands that parse, files and options that
exist."""

import importlib
import re
import subprocess
import sys

import pytest
from helpers.pages import PAGES, python_blocks
from helpers.paths import ROOT

from c2f_jax.config import default_config
from c2f_jax.config.options import sections
from c2f_jax.main import main

# Run before a block: importing anything but jax, what jax needs, and this package is an error.
JAX_ALONE = """
import sys

for name in "flax optax clu orbax absl etils ml_collections librosa tensorflow".split():
    sys.modules[name] = None
"""


def numbered_blocks():
    """Each Python block of each page, named after both."""
    blocks = []
    for page in PAGES:
        # These need a trained model: see test_notebooks.py, test_export.py, test_export_formats.py
        # and test_index.py.
        if page.name in ("python.md", "export.md", "search.md"):
            continue
        for number, code in enumerate(python_blocks(page), 1):
            blocks.append(pytest.param(code, id=f"{page.stem}-{number}"))
    return blocks


@pytest.mark.parametrize("code", numbered_blocks())
def test_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "block"})  # noqa: S102


@pytest.mark.parametrize("name", ["README.md", "docs/losses.md"])
def test_losses_need_jax_alone(name):
    code = python_blocks(ROOT / name)[0]
    done = subprocess.run([sys.executable, "-c", JAX_ALONE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 10


def test_microbatches_save_memory_and_change_nothing(capsys):
    exec(python_blocks(ROOT / "docs/losses.md")[1], {"__name__": "block"})  # noqa: S102
    whole, parts, difference = (
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()
    )
    assert parts < whole / 2 and difference < 1e-5


def test_named_files_exist():
    """A path in backticks, such as `configs/manifest.py`, is that of a file or folder."""
    folders = "c2f_jax|configs|tests|benchmarks|launch|docs|" + "|".join(
        path.name for path in (ROOT / "c2f_jax").iterdir() if path.is_dir()
    )
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for path in re.findall(rf"`((?:{folders})/[\w/.]*)`", page.read_text()):
            found = (ROOT / path).exists() or (ROOT / "c2f_jax" / path).exists()
            assert found, f"{page.name} names {path}"


def test_named_options_exist():
    """An option in backticks, such as `method.alpha`, or set by `--config.`, is one of the default
    configuration's or of published encoders."""
    published = sections({"speech": "published", "image": "published"})
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r"`((?:data|method|optimizer|eval)\.[a-z_.]+[a-z])[`=]", text)
        named += re.findall(r"--config\.([a-z_.]+)=", text)
        for name in named:
            where, _, option = name.rpartition(".")
            if option in published.get(where, {}):
                continue
            section = default_config()
            for part in name.split("."):
                assert part in section, f"{page.name} names the option {name}"
                section = section[part]


@pytest.mark.parametrize(
    "encoders",
    [{"speech": "log_mel", "image": "vit"}, {"speech": "published", "image": "published"}],
)
def test_every_option_is_listed(encoders):
    """The classes that the page of options shows name every option in their docstrings."""
    listed = set()
    for path in re.findall(r"^::: ([\w.]+)\.(\w+)$", (ROOT / "docs/options.md").read_text(), re.M):
        docstring = getattr(importlib.import_module(path[0]), path[1]).__doc__
        for names in re.findall(r"^ +([\w, ]+): ", docstring, re.M):
            listed.update(names.split(", "))
    for section, options in sections(encoders).items():
        assert options.keys() - listed == set(), section


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "evaluate",
        "index",
        "search",
        "export",
        "compile",
        "ablate",
        "convert",
        "features",
        "data check",
        "data prepare",
    ],
)
def test_help_and_documented_flags(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*command.split(), "--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(rf"c2f {command} (.*)", text):
            for flag in re.findall(r"--[a-z-]+(?![.\w])", line):
                assert flag in shown, f"{page.name} uses c2f {command} {flag}"


@pytest.mark.parametrize(
    "script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name
)
def test_launch_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
