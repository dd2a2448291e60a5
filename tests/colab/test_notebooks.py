"""The notebooks: badge and install cell, saved outputs, and runs in a real Jupyter kernel."""

import base64
import io
import json
import os
import re
import resource
import subprocess
import sys

import nbformat
import notebooks
import numpy as np
import pytest
import tensorflow_datasets
from helpers.pages import python_blocks
from helpers.paths import ROOT
from PIL import Image

NAMES = sorted(path.stem for path in (ROOT / "colab").glob("*.ipynb"))
LONGEST = ("losses_in_your_project", "published_encoders", "search_your_photos")
MOST_BYTES = {"image/png": 300_000, "image/jpeg": 300_000, "file": 3_000_000}
OF_A_MACHINE = re.compile(
    r"(?<![\w.:/])/(home|root|tmp|usr|opt|work|workspace|content|Users)/|site-packages"
)


def read(name):
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def shown(notebook):
    """Each output of a notebook with its text: what streams print, results and errors."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), *output.get("traceback", [])]
            texts += [
                str(value) for kind, value in output.get("data", {}).items() if kind[:5] != "image"
            ]
            yield output, "\n".join(texts)


@pytest.mark.parametrize("name", NAMES)
def test_badge_and_install_cell_are_those_of_all_notebooks(name):
    notebook = read(name)
    written = json.dumps(notebook)
    notebooks.refresh(notebook, name)
    assert json.dumps(notebook) == written, f"run python colab/notebooks.py {name}"
    assert notebook.cells[0].source.startswith(
        "[![Open in Colab](https://colab.research.google.com/"
    )
    addresses = re.findall(r"colab.research.google.com/github/([\w-]+/[\w-]+)", written)
    assert set(addresses) == {notebooks.REPOSITORY}
    assert any("short" in cell.metadata for cell in notebook.cells), "a cell has the short form"


@pytest.mark.parametrize("name", NAMES)
def test_saved_outputs(name):
    """Each notebook is saved as one run left it: complete, in order, without errors or traces of
    the machine."""
    path, notebook = ROOT / "colab" / f"{name}.ipynb", read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert path.stat().st_size < MOST_BYTES["file"]
    for output, text in shown(notebook):
        assert output.output_type != "error"
        assert not OF_A_MACHINE.search(text) and "\r" not in text and "it/s" not in text, text
        for kind, content in output.get("data", {}).items():
            assert len(content) * 3 / 4 < MOST_BYTES.get(kind, MOST_BYTES["file"]), kind


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONGEST else ()) for name in NAMES],
)
def test_short_form_runs(name, run_short):
    notebook, folder = run_short(name)
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert not [output for output, _ in shown(notebook) if output.output_type == "error"]


def test_page_of_python_runs(run_short, tiny_data_dir, monkeypatch):
    """The blocks of docs/python.md go on from each other; the run that they train is the
    quickstart's, which is finished."""
    _, folder = run_short("quickstart")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tensorflow_datasets.core.constants, "DATA_DIR", tiny_data_dir)
    scope = {}
    for code in python_blocks(ROOT / "docs/python.md"):
        code = code.replace("runs/spoken_scenes", "runs/quickstart")
        code = code.replace('load_config("spoken_scenes"', 'load_config("spoken_scenes:runlocal"')
        exec(code, scope)  # noqa: S102
    assert scope["page"].exists() and scope["speech"].embedding.shape[0] == 1


def test_the_page_of_notebooks_lists_each():
    page = (ROOT / "docs" / "notebooks.md").read_text()
    for name in NAMES:
        assert f"{notebooks.BADGE.format(name=name)} `colab/{name}.ipynb` |" in page
    assert page.count("| [![Open in Colab]") == len(NAMES)


def test_tidy_leaves_out_bars_and_widgets():
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    bar = {"text/plain": "matching:  0%|   | 0/128 [00:00<?, ?pair/s]"} | widget
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="\x1b[1mone\x1b[0m\n10%|"),
        nbformat.v4.new_output("stream", name="stdout", text="\r20%|\r\r"),
        nbformat.v4.new_output("display_data", data=bar),
        nbformat.v4.new_output("stream", name="stderr", text="\r50%\r"),
        nbformat.v4.new_output("display_data", data={"text/plain": "a recorder"} | widget),
    ]
    cell = nbformat.v4.new_code_cell("1", outputs=outputs, metadata={"execution": {"at": "noon"}})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}})
    notebooks.tidy(notebook)
    assert [text for _, text in shown(notebook)] == ["one\n", "\na recorder"]
    assert "widget" not in json.dumps(notebook) and "noon" not in json.dumps(notebook)


def test_tidy_makes_large_images_smaller():
    noise = np.random.default_rng(0).integers(0, 255, (300, 1500, 3), np.uint8)
    png = base64.b64encode(image_png(noise)).decode()
    output = nbformat.v4.new_output("display_data", data={"image/png": png})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    notebooks.tidy(notebook)
    (data,) = (output.data for output, _ in shown(notebook))
    assert list(data) == ["image/jpeg"] and len(data["image/jpeg"]) < len(png) / 3
    assert Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"]))).size == (1200, 240)


def image_png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def test_a_failing_cell_is_named(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)\n1 / 0")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(RuntimeError, match="(?s)broken.ipynb.*1 / 0.*ZeroDivisionError"):
        notebooks.execute(sys.executable, tmp_path / "broken.ipynb", os.environ)


class TestInstallCell:
    """What the install cell asks of pip."""

    @pytest.fixture
    def install(self, monkeypatch):
        """Run the cell's code with these distributions installed; return the words for pip and the
        constraints."""

        def run(versions, packages="c2f_jax[train]"):
            calls = []

            def pip(command, **_):
                pins = command[command.index("-c") + 1]
                with open(pins) as file:
                    calls.append((command[1:], sorted(file.read().split())))
                return subprocess.CompletedProcess(command, 0)

            with monkeypatch.context() as patch:
                names = [type("Distribution", (), {"name": name}) for name in versions]
                patch.setattr("importlib.metadata.distributions", lambda: names)
                patch.setattr("importlib.metadata.version", versions.get)
                patch.setattr("subprocess.run", pip)
                exec(f"packages = [{packages!r}]\n{notebooks.INSTALL}", {})  # noqa: S102
            return calls[0]

        return run

    def test_from_a_clone_or_the_repository(self, install, monkeypatch, tmp_path, capsys):
        monkeypatch.chdir(ROOT / "colab")
        assert install({})[0][-1] == f"c2f_jax[train] @ {ROOT.as_uri()}"
        monkeypatch.chdir(tmp_path)
        repository = f"https://github.com/{notebooks.REPOSITORY}"
        assert install({})[0][-1] == f"c2f_jax[train] @ git+{repository}"
        assert install({}, "equinox")[0][-1] == "equinox"
        assert re.match(r"jax [\d.]+ on 4 x cpu\n", capsys.readouterr().out)

    def test_what_the_runtime_has_is_kept(self, install):
        plugin = {"jax-cuda12-plugin": "0.10.0", "jax_cuda12_pjrt": "0.10.0", "libtpu": "0.0.21"}
        core = {"jax": "0.10.0", "jaxlib": "0.10.0", "numpy": "2.1.3"}
        _, pins = install(core | plugin | {"flax": "0.1", "jaxtyping": "0.3", "pandas": "2.2"})
        assert pins == sorted(f"{name}=={version}" for name, version in (core | plugin).items())

    @pytest.mark.parametrize(
        ("others", "extra"),
        [({}, ""), ({"jax-cuda12-plugin": "0.7.2"}, "[cuda12]"), ({"libtpu": "0.0.21"}, "[tpu]")],
    )
    def test_an_old_jax_is_one_line(self, install, others, extra):
        with pytest.raises(SystemExit) as stopped:
            install({"jax": "0.6.2"} | others)
        assert str(stopped.value) == (
            "c2f_jax needs jax 0.7.2 or newer, and this runtime has 0.6.2: run "
            f'`%pip install -U "jax{extra}"`, restart the runtime, and run this cell again'
        )

    def test_the_floor_is_that_of_setup_py(self):
        assert f'"jax>={notebooks.FLOOR}"' in (ROOT / "setup.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_whole_notebook_in_its_own_environment(name, tmp_path):
    """Install cell, training and all, as it is saved: at most 12 minutes of two processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = notebooks.run_alone(name, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert sum(after[:2]) - sum(before[:2]) < 2 * 12 * 60  # seconds, user and system
    assert not [output for output, _ in shown(notebook) if output.output_type == "error"]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_runtime_keeps_its_versions(tmp_path):
    """jax, numpy and an accelerator's plugin as a Colab runtime pins them, after the install cell.

    These are Colab's of August 2026.
    """
    pinned = "jax==0.7.2 jaxlib==0.7.2 numpy==2.1.3 jax-cuda12-plugin==0.7.2".split()
    clone = notebooks.copy_clone(tmp_path)
    python = notebooks.make_environment(tmp_path, pinned)
    notebook = read("quickstart")
    notebook.cells = notebook.cells[1:2]
    nbformat.write(notebook, clone / "colab" / "install.ipynb")
    environment = {
        key: value for key, value in os.environ.items() if key[:4] not in ("JAX_", "XLA_")
    }
    environment["JAX_PLATFORMS"] = "cpu"
    notebooks.execute(python, clone / "colab" / "install.ipynb", environment)

    pip = [python, "-m", "pip"]
    frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    installed = {line.lower().replace("_", "-") for line in frozen.split("\n")}
    assert set(pinned) < installed and any("c2f-jax @" in line for line in installed)
    checked = subprocess.run([*pip, "check"], capture_output=True, text=True)
    assert "c2f" not in checked.stdout, checked.stdout
