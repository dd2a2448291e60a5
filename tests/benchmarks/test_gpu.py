"""benchmarks/gpu.sh and the programs that it runs, at small sizes on a CPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from argparse import Namespace

import pytest
from helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


def load(name, monkeypatch):
    """A program of benchmarks/ as a module, which may import its neighbors."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def gpu_sh(folder, *parts, python=sys.executable):
    environment = os.environ | {"PYTHON": str(python)}
    words = [BENCHMARKS / "gpu.sh", "--tiny", folder, *parts]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def check_rows(rows):
    for row in rows:
        assert all(0 < seconds < 600 for seconds in row["turns"]), row
        assert all(0 < loss < 50 for loss in row["losses"]), row
        assert 0 < float(row["GiB"]) < 20 and row["tflop"] > 0 and row["peak"] > 0, row


def test_steps_and_search_without_a_gpu(tmp_path):
    """Also: a part that needs what is not here, and a part that fails, cost the others nothing."""
    python = tmp_path / "python"  # as ours, without PyTorch, and search.py ends with an error
    python.write_text(
        f"#!{sys.executable}\n"
        "import sys, os\n"
        "if sys.argv[1:2] == ['benchmarks/search.py']:\n"
        "    sys.exit('planted error')\n"
        "if sys.argv[1] == '-c' and 'torch' in sys.argv:\n"
        "    sys.exit(1)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    python.chmod(0o755)
    done = gpu_sh(tmp_path / "out", "search", "light16", python=python)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "search: FAILED with status 1" in done.stdout and "planted error" in done.stdout
    assert "light16: ok" in done.stdout
    rows = rows_of(tmp_path / "out")
    assert [row["variant"] for row in rows] == ["ours"]
    check_rows(rows)
    report = (tmp_path / "out" / "report.txt").read_text()
    assert "light16: ok" in report and f" {rows[0]['ms']} " in report


def test_gpu_sh_names_an_unknown_part(tmp_path):
    done = gpu_sh(tmp_path, "ligth")
    assert done.returncode == 2 and "ligth is no part; parts: tests" in done.stdout


def test_search_finds_what_float64_finds(monkeypatch, capsys, tmp_path):
    search = load("search", monkeypatch)
    libraries = ["ours", "ours-index", "numpy"]
    args = Namespace(dim=32, k=10, queries=[1, 16], rounds=1, libraries=libraries)
    status, milliseconds = search.measure(args, 5000, tmp_path / "first")
    assert status == 0 and len(milliseconds) == 6
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1:3] for row in rows] == [[a, q] for q in ("1", "16") for a in libraries]
    assert all(float(row[-2].rstrip("%")) > 99 for row in rows)
    search.plot({5000: milliseconds}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000

    # A search that misses the best row is an error.
    first = search.exact_top_k
    monkeypatch.setattr(
        search, "exact_top_k", lambda q, g, k: (first(q, g, k)[0] + 1e-3, first(q, g, k)[1])
    )
    assert search.measure(args, 5000, tmp_path / "second")[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["light", "base", "large"])
def test_twin_in_pytorch_does_the_same_work(setting, monkeypatch):
    """As many FLOPs as our step, and as many parameters but for the masks that are off."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    program = load("train_step", monkeypatch)
    names = {"bfloat16": False, "parity": False, "remat": False, "cpu": True, "batch": None}
    args = Namespace(setting=setting, tiny=True, **names)
    numbers = program.settings_of(args)
    batch = program.make_batches(numbers, 1)[0]
    ours, twin = program.Ours(args, numbers, "ours"), program.Torch(args, numbers, "torch")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = twin.losses(twin.step(twin.place(batch)))
    assert math.isclose(counter.get_total_flops() / 1e12, ours.tflop(batch), rel_tol=0.02)
    assert abs(twin.parameters - ours.parameters) <= 128
    # Random embeddings: SIC is near ln(rows and queue) but for the temperature; SIM is positive.
    assert all(0 < loss < 20 for loss in losses)
    assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.slow
def test_all_parts_without_a_gpu(tmp_path):
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    done = gpu_sh(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    check_rows(rows)
    variants = {(row["setting"], row["type"], row["variant"]) for row in rows}
    assert {
        (s, t, v)
        for s in ("light", "base", "large")
        for t in ("bfloat16",)
        for v in ("ours", "torch")
    } <= variants
    for line in ("tests: ok", "parity: ok", "parity_b: ok", "search: ok"):
        assert line in (tmp_path / "report.txt").read_text()
