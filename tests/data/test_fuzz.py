"""Damaged files: no crash, no hang, nothing wrong accepted silently, memory bounded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux"
)
SCRIPT = ROOT / "tests" / "helpers" / "fuzz_files.py"


def fuzz(folder, count, seed, *more):
    """In a process of its own, so that a crash or a hang of a C library fails the test rather than
    the session."""
    command = [sys.executable, "-W", "ignore", SCRIPT, str(count), str(seed), str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_damaged_files(tmp_path):
    told = fuzz(tmp_path, 240, 1)
    assert told["complaints"] == [] and told["files"] == 240
    assert len(told["kinds"]) > 30 and sum(told["accepted"].values()) > 40
    assert told["peak_mib"] < 600


@pytest.mark.slow
def test_two_thousand_damaged_files_and_bombs(tmp_path):
    told = fuzz(tmp_path, 2000, 2, "bombs")
    assert told["complaints"] == [] and told["files"] == 2000
    assert told["peak_mib"] < 1500 and told["slowest"][0] < 120, told
