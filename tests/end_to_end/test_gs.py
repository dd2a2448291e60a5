"""Runs in a bucket: Orbax by the client of TensorStore, all other files by gcsfs.

TensorFlow's own client, which takes the place of gcsfs where it is installed, goes to Google's
address alone."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.storage import environment, serve

from c2f_jax.datasets.registry import load_pairs
from c2f_jax.errors import UserError

pytestmark = pytest.mark.slow
WITHOUT_TENSORFLOW = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tensorboard"):
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if x is importlib.machinery.PathFinder else x for x in sys.meta_path]
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The storage server, and a function that starts a command beside it."""
    pytest.importorskip("gcsfs")
    server, folder = serve(), tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(WITHOUT_TENSORFLOW)
    variables = os.environ | environment(server)
    variables |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "c2f_jax.main", *map(str, words)],
            env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return server, start


def run(bucket, *words, status=0):
    """Run a command to its end; what it printed."""
    process = bucket[1](*words)
    out, errors = process.communicate(timeout=400)
    assert process.returncode == status, errors[-3000:]
    return out + errors


def contents(bucket, name):
    return bucket[0].storage.objects["bucket", name][0]


def train(tiny_data_dir, workdir, steps):
    return [
        "train", "--config=spoken_scenes:runlocal", f"--workdir={workdir}",
        f"--config.data.data_dir={tiny_data_dir}", f"--config.steps={steps}",
    ]  # fmt: skip


def test_a_run_in_a_bucket_equals_one_on_a_disk(bucket, tiny_data_dir, tmp_path):
    run(bucket, *train(tiny_data_dir, "gs://bucket/run", 2))
    told = run(bucket, *train(tiny_data_dir, "gs://bucket/run", 4))
    assert "resuming at step 2 of 4" in told and "gs://bucket/run/eval/" in told
    run(bucket, *train(tiny_data_dir, tmp_path / "run", 2))
    run(bucket, *train(tiny_data_dir, tmp_path / "run", 4))

    name = "eval/spoken_scenes-tiny-test.json"
    here = json.loads((tmp_path / "run" / name).read_text())
    there = json.loads(contents(bucket, f"run/{name}"))
    assert here.pop("seconds") and there.pop("seconds")
    assert here == there

    # A checkpoint counts when it is complete.
    assert ("bucket", "run/checkpoints/4/commit_success.txt") in bucket[0].storage.objects
    told = run(bucket, "evaluate", "--workdir=gs://bucket/run", "--split=validation")
    assert "results page: gs://bucket/run/eval/spoken_scenes-tiny-validation.html" in told
    run(bucket, "index", "--workdir=gs://bucket/run", "--output=gs://bucket/gallery.npz")
    told = run(
        bucket, "search", "--workdir=gs://bucket/run", "--index=gs://bucket/gallery.npz",
        "--say", "a red circle", "--output=gs://bucket/answers.html",
    )  # fmt: skip
    assert "  5. test-" in told
    assert contents(bucket, "answers.html").startswith(b"<!doctype html>")


def test_a_stopped_run_and_a_damaged_checkpoint(bucket, tiny_data_dir):
    command = train(tiny_data_dir, "gs://bucket/stopped", 4000)
    process = bucket[1](*command, "--config.log_every=1")
    for line in process.stderr:
        if line.startswith("step 6/"):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 42, errors[-3000:]

    storage = bucket[0].storage
    checkpoints = {
        int(name.split("/")[2]) for _, name in storage.objects if name.startswith("stopped/check")
    }
    latest = max(checkpoints)
    with storage.lock:
        for _, name in list(storage.objects):
            if name.startswith(f"stopped/checkpoints/{latest}/state/d/"):
                storage.write("bucket", name, b"damaged")
    process = bucket[1](*command, "--config.log_every=1")
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("resuming at step"):
            break
    process.kill()
    told = "".join(lines)
    assert f"checkpoint {latest} in gs://bucket/stopped/checkpoints is damaged" in told
    assert f"resuming at step {max(checkpoints - {latest})} of" in told
    assert any(name.startswith(f"stopped/set_aside/{latest}/") for _, name in storage.objects)


def test_the_later_run_has_a_bucket_workdir(bucket, tiny_data_dir):
    command = train(tiny_data_dir, "gs://bucket/shared", 4000)
    first = bucket[1](*command, "--config.log_every=1")
    for line in first.stderr:
        if line.startswith("step 2/"):
            break
    mark = json.loads(contents(bucket, "shared/run.json"))
    bucket[0].storage.write(
        "bucket", "shared/run.json", json.dumps(mark | {"id": "other", "process": 7}).encode()
    )
    _, errors = first.communicate(timeout=200)
    assert first.returncode == 2, errors[-3000:]
    assert "process 7 on" in errors and "leaves the workdir to it" in errors


def test_prepared_data_are_not_read_from_a_bucket():
    with pytest.raises(UserError, match="are read from a disk, not from a bucket"):
        load_pairs("spoken_scenes/tiny", "train", "gs://bucket/data")
