"""Runs that diverge, that go on with other data, that are killed again and again."""

import json

import numpy as np
import pytest
import soundfile
from helpers.chaos import Run, chaos
from PIL import Image

from c2f_jax.main import main
from c2f_jax.training.checkpoints import Checkpoints
from c2f_jax.training.workdir import Claim

TINY = "--config=spoken_scenes:runlocal"


# Twice: the second call is not stuck with what the first left.
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_diverges_says_so_and_sets_its_checkpoint_aside(
    tiny_data_dir, tmp_path, capsys, times
):
    workdir = tmp_path / "run"
    command = [
        "train", TINY, f"--workdir={workdir}", f"--config.data.data_dir={tiny_data_dir}",
        "--config.optimizer.learning_rate=1e18", "--config.optimizer.warmup_steps=0",
        "--config.checkpoint_every=1", "--config.eval_every=8", "--config.log_every=4",
        "--config.steps=20", "--config.max_skipped_steps=3", "--config.method.warm_up_steps=0",
    ]  # fmt: skip
    for time in range(times):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "in steps 2 to 4. Not finite at step 2: encoded" in told
        assert "Checkpoint 1 gives that" in told and "Traceback" not in told
        assert len(list((workdir / "set_aside").iterdir())) == time + 1
        assert not Checkpoints(workdir, read_only=True).steps
    report = json.loads((workdir / "not_finite.json").read_text())
    assert "sic_loss" in report["not_finite"]
    assert [step["step"] for step in report["steps"]] == [2, 3, 4]
    assert all(len(step["image_ids"]) == 16 for step in report["steps"])


def write_manifest(folder, images, recordings=2):
    """Noise and colors, in three splits."""
    rng, lines = np.random.default_rng(0), []
    for number in range(images):
        picture = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(picture)
        split = "validation" if number == 0 else "test" if number == 1 else "train"
        for take in range(recordings):
            sound = folder / f"{number}-{take}.wav"
            soundfile.write(sound, 0.1 * rng.normal(size=16_000), 16_000)
            lines.append({"image": picture.name, "audio": sound.name, "split": split})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "manifest.jsonl"


def test_a_run_does_not_go_on_with_other_data_or_beside_another_run(tmp_path, capsys):
    manifest, workdir = write_manifest(tmp_path, images=6), tmp_path / "run"
    command = [
        "train", TINY, f"--workdir={workdir}", f"--config.data.name={manifest}",
        "--config.batch_size=4", "--config.queue_size=0", "--config.method.warm_up_steps=0",
        "--config.method.sim_weight=0.0",
    ]  # fmt: skip
    assert main([*command, "--config.steps=1"]) == 0
    saved = sorted(path.name for path in (workdir / "checkpoints").iterdir())

    with Claim(workdir):
        assert main([*command, "--config.steps=2"]) == 2
    assert "is training here: wait for its end" in capsys.readouterr().err

    write_manifest(tmp_path, images=7)
    assert main([*command, "--config.steps=2"]) == 2
    told = capsys.readouterr().err
    assert "8 recordings of 4 images then, 10 recordings of 5 images now" in told
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == saved

    write_manifest(tmp_path, images=6)
    assert main([*command, "--config.steps=2"]) == 0
    assert "resuming at step 1 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "plan, processes, steps",
    [
        ([("save", "SIGSTOP, SIGKILL")], 1, 8),  # a SIGTERM: test_train.py
        pytest.param(
            [("data", "SIGKILL"), ("training", "SIGTERM"), ("save", "SIGSTOP, SIGKILL")],
            1,
            40,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [("save", "SIGKILL"), ("evaluation", "SIGTERM"), ("training", "SIGKILL")],
            2,
            40,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_is_killed_and_restarted_equals_an_undisturbed_one(
    tiny_data_dir, tmp_path, plan, processes, steps
):
    data_dir = None if ("data", "SIGKILL") in plan else tiny_data_dir
    done, differ = chaos(tmp_path, plan, steps=steps, processes=processes, data_dir=data_dir)
    assert sum(done.values()) == len(plan), done
    assert not differ
    # Nothing half-written is left where checkpoints are.
    left = [
        path.name for path in (Run(tmp_path / "killed", steps).workdir / "checkpoints").iterdir()
    ]
    assert all(name.isdigit() for name in left), left
