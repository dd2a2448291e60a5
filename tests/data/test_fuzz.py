"""Damaged files: no crash, no hang, nothing wrong accepted silently, memory bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux"
)
HELPERS = ROOT / "tests" / "helpers"


def run(script, *arguments):
    """In a process of its own, so that a crash or a hang of a C library fails the test rather than
    the session."""
    command = [sys.executable, "-W", "ignore", HELPERS / script, *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT), str(HELPERS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index("{") :])  # libsndfile prints at times


def fuzz(folder, count, seed, *more):
    return run("fuzz_files.py", count, seed, folder, *more)


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


def test_damaged_recordings_against_ffmpeg():
    pytest.importorskip("av", reason="the extra av, the reference, is not installed")
    told = run("fuzz_audio.py", 100, 1)
    assert told["complaints"] == [] and told["files"] == 100
    assert told["outcomes"]["accepted, as ffmpeg"] > 20 and told["outcomes"]["refused"] > 30
    assert told["peak_mib"] < 400 and told["slowest"][0] < 10, told


@pytest.mark.slow
def test_five_thousand_damaged_recordings_against_ffmpeg():
    pytest.importorskip("av", reason="the extra av, the reference, is not installed")
    told = run("fuzz_audio.py", 5000, 7)
    assert told["complaints"] == [] and told["files"] == 5000
    assert told["peak_mib"] < 400 and told["slowest"][0] < 20, told
