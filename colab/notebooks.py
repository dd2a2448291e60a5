"""Run notebooks of this folder from beginning to end and save them with their outputs.

    python colab/notebooks.py quickstart search_your_photos

Each runs in a Jupyter kernel of a virtual environment of its own, which the notebook's install cell
fills from a copy of this clone. The badge and the install cell are written here, for all notebooks.
"""

import argparse
import base64
import copy
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLAB = Path(__file__).resolve().parent
ROOT = COLAB.parent
REPOSITORY = "c2f-jax/c2f_jax"  # on GitHub
FLOOR = "0.7.2"  # of jax, as in setup.py
KERNEL = ("nbclient", "ipykernel")  # what runs a notebook, in any environment

ANSI = re.compile(r"\x1b\[[\d;]*m")  # colors
BAR = re.compile(
    r"\[\d\d:\d\d[<,]|^Shuffling "
)  # the clock of a progress bar, or none if it is cut

LARGE = 100_000  # bytes of an image

BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    f"(https://colab.research.google.com/github/{REPOSITORY}/blob/main/colab/{{name}}.ipynb)"
)

# The line ``packages = [...]``, which each notebook has for itself, stands between these.
INSTALL_TITLE = "# @title Install c2f_jax"  # Colab shows the title instead of the code
INSTALL = f'''
# jax, numpy and the accelerator's plugin stay as this runtime has them. From a clone, that clone is
# installed; elsewhere, as in Colab, the repository.
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

kept = re.compile("jax|jaxlib|jax[-_].*(plugin|pjrt)|libtpu|numpy")
names = {{str(d.name).lower() for d in importlib.metadata.distributions()}}
pins = {{name: importlib.metadata.version(name) for name in names if kept.fullmatch(name)}}
jax_version = re.findall("[0-9]+", pins.get("jax", "{FLOOR}"))[:3]
if tuple(map(int, jax_version)) < {tuple(map(int, FLOOR.split(".")))}:
    extra = "[cuda12]" if any("cuda12" in name for name in pins) else ""
    extra = "[tpu]" if "libtpu" in pins else extra
    sys.exit(
        f"c2f_jax needs jax {FLOOR} or newer, and this runtime has {{pins['jax']}}: run "
        f'`%pip install -U "jax{{extra}}"`, restart the runtime, and run this cell again'
    )
folders = [Path.cwd(), *Path.cwd().parents]
clones = [folder.as_uri() for folder in folders if (folder / "c2f_jax/objectives").is_dir()]
source = clones[0] if clones else "git+https://github.com/{REPOSITORY}"
packages = [f"{{p}} @ {{source}}" if p.startswith("c2f_jax") else p for p in packages]
with tempfile.TemporaryDirectory() as folder:
    pinned = [f"{{name}}=={{version}}\\n" for name, version in pins.items()]
    Path(folder, "pins.txt").write_text("".join(pinned))
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", f"{{folder}}/pins.txt", *packages]
    done = subprocess.run(pip, capture_output=True, text=True)
if done.returncode:
    sys.exit(done.stderr)

import jax

print(f"jax {{jax.__version__}} on {{jax.device_count()}} x {{jax.devices()[0].device_kind}}")
'''


def refresh(notebook: Any, name: str) -> None:
    """Write the badge and the install cell of a notebook.

    Args:
      notebook: the notebook, with ``packages = [...]`` as a line of its second cell.
      name: name of its file, without suffix.
    """
    title, install = notebook.cells[:2]
    lines = [line for line in title.source.splitlines() if not line.startswith("[![Open in Colab]")]
    title.source = "\n".join([BADGE.format(name=name), *lines])
    packages = next(line for line in install.source.splitlines() if line.startswith("packages = "))
    install.source = f"{INSTALL_TITLE}\n{packages}{INSTALL}".rstrip("\n")
    install.metadata = {"cellView": "form"}


def shorten(notebook: Any) -> Any:
    """Return the short form of a notebook, which tests run without installing anything.

    A code cell with ``short`` in its metadata is followed by that text: other values for the names
    that it sets.
    """
    short = copy.deepcopy(notebook)
    short.cells[1].metadata.tags = ["skip-execution"]
    for cell in short.cells:
        if "short" in cell.metadata:
            cell.source += "\n" + cell.metadata.short
    return short


def execute(python: str | Path, file: Path, environment: Mapping[str, str]) -> None:
    """Run the notebook in ``file`` in a kernel of ``python``, in its folder, and save its outputs.

    Raises:
      RuntimeError: with the traceback of the cell that failed.
    """
    main = "from nbclient.cli import main; main()"
    arguments = ["--timeout=-1", "--startup_timeout=300", "--inplace", str(file)]
    done = subprocess.run(
        [python, "-c", main, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{file.name}: {ANSI.sub('', done.stderr)[-4000:]}")


def tidy(notebook: Any) -> None:
    """Leave out of an executed notebook what changes from run to run or needs a live kernel."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _tidy_outputs(cell.outputs)


def _tidy_outputs(outputs: Sequence[Any]) -> list[Any]:
    """Join the pieces of a stream; leave out widgets and progress bars."""
    joined: list[Any] = []
    for output in outputs:
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        if joined and "name" in output and output.name == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    kept = []
    for output in joined:
        if "text" in output:
            # A carriage return writes over what stands before it in the line.
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", ANSI.sub("", output.text))
        _shrink_image(output)
        if output.get("text", "-") and not BAR.search(output.get("data", {}).get("text/plain", "")):
            kept.append(output)
    return kept


def _shrink_image(output: Any) -> None:
    """Save a large PNG as JPEG, no wider than a page."""
    from PIL import Image

    png = base64.b64decode(output.get("data", {}).get("image/png", ""))
    if len(png) > LARGE:
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image.thumbnail((1200, 10_000))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85)
        del output.data["image/png"]
        output.data["image/jpeg"] = base64.b64encode(jpeg.getvalue()).decode()


def copy_clone(folder: Path) -> Path:
    """Copy the files of this clone that git does not ignore to ``folder/c2f_jax``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    clone = folder / "c2f_jax"
    for path in listed.stdout.split("\0"):
        if path and (ROOT / path).is_file():
            (clone / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, clone / path)
    return clone


def make_environment(folder: Path, packages: Sequence[str] = ()) -> Path:
    """Make a virtual environment with a Jupyter kernel and these packages; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *KERNEL, *packages], check=True)
    return python


def run_alone(name: str, folder: Path) -> Any:
    """Run a notebook in an environment of its own.

    Args:
      name: name of the notebook.
      folder: an empty folder, which gets a copy of this clone, the environment and all files that
        the notebook writes.

    Returns:
      The notebook with its outputs, tidy.
    """
    import nbformat

    clone = copy_clone(folder)
    python = make_environment(folder)
    # Nothing that would change what a user gets.
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("JAX_", "XLA_", "PYTHON"))
    }
    environment |= {"TFDS_DATA_DIR": "tfds"}

    file = clone / "colab" / f"{name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    refresh(notebook, name)
    nbformat.write(notebook, file)
    execute(python, file, environment)
    notebook = nbformat.read(file, as_version=4)
    tidy(notebook)
    return notebook


def main() -> None:
    """Run and save the notebooks named on the command line."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="+", choices=sorted(path.stem for path in COLAB.glob("*.ipynb"))
    )
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(run_alone(name, Path(folder)), COLAB / f"{name}.ipynb")
        print(f"{name}: saved")


if __name__ == "__main__":
    main()
