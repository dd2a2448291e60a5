"""Checkpoints that are damaged, disks that are full or closed, workdirs that another run has."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from c2f_jax.errors import UserError
from c2f_jax.objectives.embedding_queue import create_queue
from c2f_jax.training.checkpoints import Checkpoints, abstract
from c2f_jax.training.train_state import C2FTrainState
from c2f_jax.training.workdir import Claim

# Orbax leaves the other reads of a damaged checkpoint unfinished.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_at(step):
    rng = np.random.default_rng(step)
    row = {"speech": jax.ShapeDtypeStruct((1, 4), jnp.float32)}
    params = {"a": {"kernel": rng.normal(size=(64, 32)).astype(np.float32)}, "b": np.float32(step)}
    return jax.tree.map(
        jnp.asarray,
        C2FTrainState(
            step=np.int32(step),
            params=params,
            frozen={},
            momentum_params=jax.tree.map(np.copy, params),
            opt_state=(np.int32(step), jax.tree.map(np.copy, params)),
            queue=create_queue(8, row),
            token_queue=create_queue(0, row),
            rng=np.zeros(2, np.uint32),
        ),
    )


TARGET = abstract(state_at(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 1 (best), 2 and 3."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir)
    for step, score in ((1, 50.0), (2, 30.0), (3, 40.0)):
        checkpoints.save(step, state_at(step), {"history": {"loss": [[step, 0.5]]}}, score)
    checkpoints.close()
    return workdir


def files_of(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_every_damaged_file_is_found_or_does_not_matter(saved, tmp_path, how, caplog):
    """Each file of the latest checkpoint in turn: the one before is used and the damaged one is set
    aside, or the values are those that were saved."""
    outcomes = {"said": 0, "harmless": 0}
    for number, name in enumerate(files_of(saved, 3)):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        damage(workdir / "checkpoints" / "3" / name, how)
        caplog.clear()
        checkpoints = Checkpoints(workdir)
        step, state, progress = checkpoints.restore_latest(TARGET)
        checkpoints.close()
        jax.tree.map(np.testing.assert_array_equal, state, state_at(step))
        assert progress == {"history": {"loss": [[step, 0.5]]}}
        if step == 2:
            assert "checkpoint 3" in caplog.text and "set_aside" in caplog.text, name
            left = {str(path) for path in files_of(saved, 3)}
            aside = workdir / "set_aside" / "3"
            found = {str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file()}
            assert found == left - ({str(name)} if how == "deleted" else set()), "nothing is lost"
            outcomes["said"] += 1
        else:
            assert step == 3 and not (workdir / "set_aside").exists(), name
            outcomes["harmless"] += 1
    assert outcomes["said"] >= 5, outcomes


def test_the_best_checkpoint_is_replaced_by_the_next_best(saved, tmp_path, caplog):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_best_params(TARGET.params)[0] == checkpoints.best_step == 1
    for path in (tmp_path / "checkpoints" / "1" / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            damage(path, "flipped")
    with pytest.raises(UserError, match="checkpoint 1 in .* is damaged"):
        checkpoints.restore_params(1, TARGET.params)
    step, params = checkpoints.restore_best_params(TARGET.params)
    assert step == 3 and "checkpoint 1" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, params, state_at(3).params)
    checkpoints.close()


def test_checkpoints_that_are_all_damaged_stay_where_they_are(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in (1, 2, 3):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "state")
    with pytest.raises(UserError, match="checkpoint 3 in .* is damaged"):
        Checkpoints(tmp_path).restore_latest(TARGET)
    assert not (tmp_path / "set_aside").exists()


def test_what_a_killed_save_left_is_no_checkpoint(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    unfinished = folder / "4.orbax-checkpoint-tmp"
    shutil.copytree(folder / "3", unfinished)
    (unfinished / "metrics" / "metrics").write_text("{")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(TARGET)[0] == 3
    checkpoints.close()
    assert not (tmp_path / "set_aside").exists()


def test_the_latest_two_and_the_best_are_kept(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 5):
        checkpoints.save(step, state_at(step), {}, score=10.0)
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps == [1, 4, 5]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_takes_no_checkpoint_is_named_and_the_last_one_stays(small_disk, how):
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, state_at(1), {}, wait=True)
    ballast = small_disk / "ballast"
    if how == "full":
        with pytest.raises(OSError), open(ballast, "wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
    else:
        remount(small_disk, "ro")
    reason = "No space left on device" if how == "full" else "Read-only file system"
    with pytest.raises(UserError, match=f"{reason}.*: mend that .* it resumes from step 1"):
        checkpoints.save(2, state_at(2), {}, wait=True)

    ballast.unlink(missing_ok=True) if how == "full" else remount(small_disk, "rw")
    checkpoints = Checkpoints(small_disk)
    step, state, _ = checkpoints.restore_latest(TARGET)
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, state, state_at(1))
    checkpoints.save(2, state_at(2), {}, wait=True)
    assert checkpoints.steps == [1, 2]
    checkpoints.close()
    leftovers = [path.name for path in (small_disk / "checkpoints").iterdir()]
    assert sorted(leftovers) == ["1", "2"]


def test_a_second_run_in_a_workdir_is_refused_until_the_first_ends_or_dies(tmp_path):
    program = (
        "import sys, time; from c2f_jax.training.workdir import Claim; claim = Claim(sys.argv[1]);"
        "print('mine', flush=True); time.sleep(600)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=rf"process {first.pid} on .* is training here"):
            Claim(tmp_path)
    finally:
        first.kill()
        first.wait()
    with Claim(tmp_path) as claim:
        claim.check()


def test_a_run_whose_workdir_another_took_or_that_vanished_stops(tmp_path):
    workdir = tmp_path / "run"
    with Claim(workdir) as claim:
        mark = json.loads((workdir / "run.json").read_text())
        (workdir / "run.json").write_text(json.dumps(mark | {"id": "another", "process": 77}))
        with pytest.raises(UserError, match="process 77 on .* leaves the workdir to it"):
            claim.check()
        shutil.rmtree(workdir)
        with pytest.raises(UserError, match="is no longer there"):
            claim.check()
    assert not Path(workdir).exists()
