"""What the documents promise: commands that parse, links that lead somewhere, a notebook that runs."""

import json
import re
import subprocess

import pytest
from helpers.paths import ROOT

from c2f_jax.main import main

README = (ROOT / "README.md").read_text()


def test_first_two_bash_blocks_are_the_job_and_the_tests():
    job, tests = re.findall(r"```bash\n(.*?)```", README, re.S)[:2]
    assert "c2f train" in job and "c2f search" in job and "pytest" in tests
    for block in (job, tests):
        assert "venv" in block and "pip install" in block


def test_links_and_pictures_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "evaluate",
        "index",
        "search",
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
    for line in re.findall(rf"c2f {command} (.*)", README):
        for flag in re.findall(r"--[a-z-]+(?![.\w])", line):
            assert flag in shown, f"README uses c2f {command} {flag}"


@pytest.mark.parametrize(
    "script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name
)
def test_launch_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_notebook_runs(tmp_path, monkeypatch, tiny_data_dir):
    cells = json.loads((ROOT / "colab" / "quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    shown = []
    monkeypatch.chdir(tmp_path)
    overrides = [f"--config.data.data_dir={tiny_data_dir}"]
    scope = {"display": lambda *items: shown.extend(items), "OVERRIDES": overrides}
    for cell in code:
        if cell.startswith("%pip"):
            continue
        cell = cell.replace(
            '"configs/spoken_scenes.py"', f'"{ROOT}/configs/spoken_scenes.py:runlocal"'
        )
        cell = cell.replace(
            "from IPython.display import HTML, Image, display", "HTML = Image = str"
        )
        cell = cell.replace("load_config(CONFIG)", "load_config(CONFIG, OVERRIDES)")
        exec(cell, scope)  # noqa: S102
    assert len(shown) == 4 and all(
        (tmp_path / item).exists() for item in shown if item.endswith(".png")
    )
