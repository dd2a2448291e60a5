"""Runs in a bucket: Orbax by the client of TensorStore, all other files by gcsfs.

TensorFlow's own client, which takes the place of gcsfs where it is installed, goes to Google's
address alone."""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from helpers.paths import ROOT
from helpers.storage import environment, serve
from helpers.tiny_whisper import WHISPER, whisper_tensors
from PIL import Image
from safetensors.numpy import save_file

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

CACHED = """
from ml_collections import ConfigDict
from c2f_jax.config import default_config

def get_config():
    config = default_config()
    config.data.name, config.data.speech_features = "{data}", "{cache}"
    config.data.bucket_seconds, config.data.max_seconds = (0.8,), 1.0
    config.data.image_size, config.steps, config.batch_size = 32, 2, 4
    config.eval.batch_size, config.eval.k, config.eval.resamples = 4, 2, 20
    small = dict(width=16, depth=1, heads=2)
    config.model.speech = ConfigDict(small | dict(name="tokens"))
    config.model.image = ConfigDict(small | dict(name="vit", patch=8))
    config.model.multimodal = ConfigDict(small)
    return config
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
    """Run a command to its end; what it printed. Any status but 2 will do for None."""
    process = bucket[1](*words)
    out, errors = process.communicate(timeout=400)
    expected = process.returncode != 2 if status is None else process.returncode == status
    assert expected, errors[-3000:]
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
    run(bucket, "index", "--workdir=gs://bucket/run", "--output=gs://bucket/gallery.index")
    told = run(
        bucket, "search", "--workdir=gs://bucket/run", "--index=gs://bucket/gallery.index",
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


def pairs(images=6, recordings=2):
    """A manifest of noise: its lines and files, name -> content."""
    rng, rows, files = np.random.default_rng(0), [], {}
    for number in range(images):
        split = "validation" if number == 0 else "test" if number == 1 else "train"
        picture, content = f"images/{number}.png", io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "PNG")
        files[picture] = content.getvalue()
        for take in range(recordings):
            sound, content = f"audio/{number}-{take}.wav", io.BytesIO()
            soundfile.write(content, 0.1 * rng.normal(size=12_000), 16_000, format="WAV")
            files[sound] = content.getvalue()
            rows.append(json.dumps({"image": picture, "audio": sound, "split": split}) + "\n")
    return files | {"manifest.jsonl": "".join(rows).encode()}


def test_a_manifest_and_a_feature_cache_in_a_bucket_equal_those_on_a_disk(bucket, tmp_path):
    weights = tmp_path / "whisper"
    weights.mkdir()
    save_file(whisper_tensors(), weights / "model.safetensors")
    (weights / "config.json").write_text(json.dumps(WHISPER))
    for name, content in pairs().items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
        bucket[0].storage.write("bucket", f"data/{name}", content)

    results = {}
    for place in (tmp_path, "gs://bucket"):
        data, cache = f"{place}/data/manifest.jsonl", f"{place}/features"
        assert "train                  4" in run(bucket, "data", "check", data, status=None)
        run(
            bucket, "features", f"--weights={weights}", f"--data={data}", f"--output={cache}",
            "--splits=train,validation,test", "--max-seconds=1.0",
        )  # fmt: skip
        config = tmp_path / "config.py"
        config.write_text(CACHED.format(data=data, cache=cache))
        told = run(bucket, "train", f"--config={config}", f"--workdir={place}/cached")
        name = next(line.rpartition("/")[2] for line in told.splitlines() if "results page" in line)
        name = f"cached/eval/{name.replace('.html', '.json')}"
        read = contents(bucket, name) if place != tmp_path else (tmp_path / name).read_bytes()
        results[place] = json.loads(read)
        for entry in ("seconds", "data_set", "trained_on", "data"):
            results[place].pop(entry)
    here, there = results.values()
    assert {name for name in here if here[name] != there[name]} == set()
    stored = {name for _, name in bucket[0].storage.objects if name.startswith("features/")}
    assert stored == {f"features/{path.name}" for path in (tmp_path / "features").iterdir()}

    # A file that is gone is named.
    del bucket[0].storage.objects["bucket", "data/audio/3-1.wav"]
    told = run(bucket, "data", "check", "gs://bucket/data/manifest.jsonl", status=3)
    assert "gs://bucket/data/audio/3-1.wav" in told
