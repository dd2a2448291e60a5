"""Evaluation, indexes and feature caches by several real processes on loopback: the same as by one.

Run as a program, this file is one of the processes.
"""

import contextlib
import io
import json
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from helpers.paths import CONFIGS
from helpers.processes import run_together
from helpers.tiny_whisper import WHISPER, whisper_tensors
from PIL import Image
from safetensors.numpy import save_file

from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config, save_config
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.errors import UserError
from c2f_jax.main import main
from c2f_jax.pretrained import extract_features as extraction
from c2f_jax.training import distributed
from c2f_jax.training.checkpoints import Checkpoints
from c2f_jax.training.distributed import in_every_process, in_first_process, share_work
from c2f_jax.training.optimizer import create_optimizer
from c2f_jax.training.train_state import create_train_state

SHARD = 4  # items, so that there are shards for two processes
SECONDS = 120  # that all may take; the work is about 20 s of processor time
OPTIONS = [
    "--config.batch_size=4",
    "--config.data.max_bad_share=0.2",
    "--config.data.max_seconds=1.0",
    "--config.data.bucket_seconds=(0.8,)",
    "--config.eval.batch_size=4",
    "--config.eval.pair_batch_size=8",
    "--config.eval.k=3",
    "--config.eval.resamples=20",
    "--config.method.warm_up_steps=0",
]
for part in ("speech", "image", "multimodal"):
    OPTIONS += [f"--config.model.{part}.width=16", f"--config.model.{part}.depth=1"]


def commands(folder):
    """What is run by one process and by two: name -> words after ``c2f``."""
    run, data = f"--workdir={folder}/run", folder / "data"
    index = ["index", run, f"--gallery={data}"]
    return {
        "evaluate": ["evaluate", run],
        "by_voice": ["evaluate", run, "--by-voice"],
        "images": [*index, f"--output={folder}/images.index"],
        "speech": [*index, "--kind=speech", f"--output={folder}/speech.index"],
        "features": [
            "features",
            f"--weights={folder}/whisper",
            f"--data={data}/manifest.jsonl",
            f"--output={folder}/features",
            "--max-seconds=1.0",
            "--splits=train",
        ],
        "too many": ["evaluate", run, "--split=validation"],
        "no room": [*index, f"--output={data}"],
    }


def outcome(words):
    """Run a command; its exit status, what it printed, and its seconds."""
    out, err, start = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    # What follows the progress bar.
    return [code, out.getvalue(), err.getvalue().rpartition("\r")[2], time.monotonic() - start]


def cache_test_split(folder):
    """Make a feature cache of the split with unreadable items; what was left out."""
    source = load_pairs(f"{folder}/data/manifest.jsonl", "test", max_bad_share=0.2)
    options = extraction.FeatureOptions(max_seconds=1.0)
    extraction.extract_features(folder / "whisper", [source], folder / "features", options)
    return source.bad_items.reasons


def read_files(folder):
    """The files that the commands write, timings and names of their folder left out."""
    results = {}
    for path in sorted((folder / "run" / "eval").glob("*.json")):
        results[path.name] = without_timings(json.loads(path.read_text()))
    for path in sorted((folder / "features").glob("*")):
        results[path.name] = path.read_bytes()
    for name in ("images.index", "speech.index"):
        results[name] = index_files(folder / name)
    return results


def index_files(folder):
    """Content of the files of an index, but for the lock."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: content for name, content in files.items() if not name.endswith(".lock")}


def without_timings(value):
    if not isinstance(value, dict):
        return value
    return {name: without_timings(part) for name, part in value.items() if name != "seconds"}


def make_data(folder):
    """Recordings of noise of many lengths, two of each image; one recording and one image of the
    test split cannot be read, and of the validation split five of twelve recordings."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for split, count in (("train", 16), ("validation", 12), ("test", 26)):
        for k in range(count):
            audio, image = folder / f"{split}{k:02d}.wav", folder / f"{split}{k // 2:02d}.png"
            size = int(rng.integers(2000, 20_000))
            soundfile.write(audio, 0.1 * rng.normal(size=size), 16_000)
            pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(image)
            if (split, k) == ("test", 9) or (split == "validation" and k >= 7):
                audio.write_bytes(b"not audio")
            if (split, k) == ("test", 5):
                image.write_bytes(b"not an image")
            row = {"image": image.name, "audio": audio.name, "split": split}
            row |= {"speaker": f"speaker {k % 3 if split == 'test' else 0}"}
            rows.append(row | {"seconds": size / 16_000})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, data):
    """A run of no steps: its configuration and a checkpoint of the initial state."""
    config = load_config(f"{CONFIGS / 'manifest.py'}:{data}/manifest.jsonl", OPTIONS)
    experiment = create_experiment(config)
    folder.mkdir()
    save_config(config, folder)
    state = create_train_state(
        experiment.model,
        create_optimizer(experiment.optimizer, experiment.steps),
        example_batch(experiment.data),
        seed=0,
        queue_size=8,
        token_queue_size=0,
    )
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {"history": {}}, 1.0)
    checkpoints.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    make_data(folder / "data")
    make_run(folder / "run", folder / "data")
    (folder / "whisper").mkdir()
    save_file(whisper_tensors(), folder / "whisper" / "model.safetensors")
    (folder / "whisper" / "config.json").write_text(json.dumps(WHISPER))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Outcomes and files of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "SHARD", SHARD)
        outcomes = {name: outcome(words) for name, words in commands(folder).items()}
        outcomes["left out"] = cache_test_split(folder)
    files = read_files(folder)
    for name in files:  # so that the processes have to make them again
        for place in (folder, folder / "features", folder / "run" / "eval"):
            if (place / name).is_dir():
                shutil.rmtree(place / name)
            (place / name).unlink(missing_ok=True)
    return outcomes, files


@pytest.fixture(scope="module")
def together(folder, alone, tmp_path_factory):
    """Outcomes of two processes, the files they made, and what they told of each other."""
    directory = tmp_path_factory.mktemp("processes")
    ended = run_together([__file__, folder, directory], 2, directory, SECONDS)
    assert [one.code for one in ended] == [0, 0], "\n".join(one.err[-3000:] for one in ended)
    told = [json.loads((directory / f"{process}.json").read_text()) for process in range(2)]
    return told, read_files(folder)


def worker(folder, directory, *join):
    """One of the processes."""
    extraction.SHARD = SHARD
    outcomes = {}
    for name, words in commands(folder).items():
        # The first command connects the processes.
        outcomes[name] = outcome([*words, *(() if outcomes else join)])
    process = jax.process_index()
    outcomes["left out"] = cache_test_split(folder)
    outcomes["exchanged"] = exchange()
    outcomes["raised"] = {name: raised(work) for name, work in FAILURES.items()}
    (directory / f"{process}.json").write_text(json.dumps(outcomes))


def value_of(process):
    """What a process gives to the others: arrays of many types and sizes, more than one block."""
    rng = np.random.default_rng(process)
    rows = 3 + 40 * process
    return {
        "tokens": rng.normal(size=(rows, 7, 50)).astype(np.float32),
        "half": rng.normal(size=(rows, 3)).astype(np.float16),
        "bfloat": np.asarray(jax.numpy.arange(3.0 + process, dtype="bfloat16")),
        "wide": rng.integers(-(2**62), 2**62, rows),
        "flags": rng.random(5 + process) < 0.5,
        "every second": np.arange(20)[::2],
        "columns": np.asfortranarray(rng.normal(size=(4, 5))),
        "none": np.zeros((0, 3), np.int32),
        "text": {"a": "b" * process},
        "nothing": None,
    }


def exchange():
    """Whether all processes have the values of both; one of them comes a second late."""
    distributed.MOST_BYTES = 2 * 4096  # many blocks

    def make(process, processes):
        time.sleep(process)
        assert processes == 2
        return value_of(process)

    same = []
    for process, found in enumerate(share_work(make)):
        expected = value_of(process)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, np.ndarray):
                assert found[name].dtype == value.dtype
                np.testing.assert_array_equal(found[name], value)
            else:
                assert found[name] == value
        same.append(process)
    return same


def fail(*failures):
    """Work that raises the failure of this process, if it has one."""

    def work(process, processes):
        if failures[process] is not None:
            raise failures[process]
        return process

    return work


FAILURES = {
    "one": fail(None, UserError("the disk of 1 is full")),
    "both": fail(UserError("first"), UserError("second")),
    "defect": fail(None, MemoryError("no room")),
    "none": fail(None, None),
}


def raised(work):
    try:
        return share_work(work)
    except (UserError, MemoryError) as error:
        return [type(error).__name__, str(error)]


def test_two_processes_evaluate_and_index_as_one(alone, together):
    (outcomes, files), (told, shared) = alone, together
    assert shared.keys() == files.keys() and len(files) > 8
    for name, value in files.items():
        assert shared[name] == value, name
    for name in ("evaluate", "by_voice", "images", "speech", "features"):
        assert [process[name][0] for process in told] == [0, 0] == [outcomes[name][0]] * 2
        # The first process alone prints.
        assert told[1][name][1] == ""
    for name in ("images", "speech", "features"):
        assert told[0][name][1] == outcomes[name][1]
    assert "R@1" in told[0]["evaluate"][1]


def test_what_cannot_be_read_is_counted_by_all(alone, together):
    result = together[1]["data-test.json"]
    assert {Path(name).name for name in result["bad_items"]} == {"test09.wav", "test02.png"}
    assert (
        result["queries"]["gallery_recordings"] == 25 and result["queries"]["gallery_images"] == 12
    )
    left_out = alone[0]["left out"]
    assert [Path(name).name for name in left_out] == ["test09.wav"]
    assert [process["left out"] for process in together[0]] == [left_out] * 2
    line = "left out: test02.png: not a readable image"
    assert line in together[0][0]["images"][1]


def test_an_error_of_one_process_is_raised_by_all(alone, together):
    told = together[0]
    for name, words in (("too many", "items cannot be used"), ("no room", "holds something else")):
        assert alone[0][name][0] == 2 and words in alone[0][name][2]
        codes, _, errors, seconds = zip(*(process[name] for process in told), strict=True)
        assert codes == (2, 2) and errors[0] == errors[1] and words in errors[0]
        assert max(seconds) < 30
    line = "process 1 failed (MemoryError: no room): see its own output"
    assert [process["raised"] for process in told] == [
        {
            "one": ["UserError", "the disk of 1 is full"],
            "both": ["UserError", "first"],
            "defect": ["UserError", line] if process == 0 else ["MemoryError", "no room"],
            "none": [0, 1],
        }
        for process in range(2)
    ]


def test_values_of_any_size_are_exchanged(together):
    assert [process["exchanged"] for process in together[0]] == [[0, 1]] * 2


def test_one_process_exchanges_nothing():
    assert share_work(lambda process, processes: (process, processes)) == [(0, 1)]
    assert in_first_process(lambda: 3) == in_every_process(lambda: 3) == 3
    with pytest.raises(KeyError):
        share_work(lambda *_: {}["x"])


@pytest.mark.slow  # about 90 s
@pytest.mark.parametrize("count", [2, 4])
def test_programs_of_several_processes(folder, alone, tmp_path, count):
    """Commands as they are started, each process by itself: training with all evaluations after
    it, indexing, and errors of one process."""
    data, run = folder / "data" / "manifest.jsonl", tmp_path / "run"
    program = ["-m", "c2f_jax.main"]
    train = [f"--config={CONFIGS / 'manifest.py'}:{data}", f"--workdir={run}", *OPTIONS]
    train += ["--config.batch_size=16", "--config.steps=2", "--config.eval_every=1"]
    train += ["--config.data.validation_split=test", "--config.method.alpha_ramp_steps=1"]
    ended = run_together(
        [*program, "train", *train, "--by-voice", "--zero-shot", data], count, tmp_path, 300
    )
    assert [one.code for one in ended] == [0] * count, ended[-1].err[-3000:]
    assert ended[0].out.count("mean R@K") == 4 and "mean R@K" not in ended[1].out
    trained = {path.name: read_json(path) for path in (run / "eval").glob("*.json")}
    assert trained.keys() == {"data-test.json", "data-test-voices.json"}

    for name, words in (("data-test", []), ("data-test-voices", ["--by-voice"])):
        assert main(["evaluate", f"--workdir={run}", *words]) == 0
        assert read_json(run / "eval" / f"{name}.json") == trained[f"{name}.json"]

    words, output = commands(folder)["speech"][:-1], tmp_path / "speech.index"
    ended = run_together([*program, *words, f"--output={output}"], count, tmp_path, 120)
    assert [one.code for one in ended] == [0] * count, ended[-1].err[-3000:]
    assert index_files(output) == alone[1]["speech.index"]

    # What one process alone finds ends all of them: a run that the last does not see, and
    # recordings that it cannot read.
    for process in range(count - 1):
        (tmp_path / f"process-{process}" / "run").symlink_to(folder / "run")
    for run, expected in (("run", "run holds no training run"), (folder / "run", "cannot be used")):
        start = time.monotonic()
        words = [*program, "evaluate", f"--workdir={run}", "--split=validation"]
        ended = run_together(words, count, tmp_path, 120)
        assert [one.code for one in ended] == [2] * count and time.monotonic() - start < 60
        (line,) = {one.err.partition("c2f evaluate: ")[2] for one in ended}
        assert expected in line


def read_json(path):
    return without_timings(json.loads(path.read_text()))


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
