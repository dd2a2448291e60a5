"""Kill a training run again and again, let the supervisor restart it, and compare what comes out
with an undisturbed run.

    python tests/helpers/chaos.py --kills=50 --folder=/tmp/chaos
    python tests/helpers/chaos.py --kills=12 --folder=/tmp/chaos --processes=2

Prints a table of the moments and signals. The exit status is 1 if anything differs.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
MOMENTS = ("start", "data", "training", "save", "evaluation")
HOWS = ("SIGKILL", "SIGTERM", "SIGSTOP, SIGKILL")
PATIENCE = 300  # seconds to wait for a moment, or for the end of a process that was told to stop
OPTIONS = [
    "--config=spoken_scenes:runlocal",
    "--config.log_every=4",
    "--config.eval_every=8",
    "--config.checkpoint_every=4",
    "--config.method.negatives=queue",
    "--config.token_queue_size=24",
]


@dataclasses.dataclass
class Run:
    """A run in a folder of its own, with its own data set unless one is given."""

    folder: Path
    steps: int
    processes: int = 1
    data_dir: Path | str | None = None

    @property
    def workdir(self):
        return self.folder / "run"

    def command(self):
        """The words that start it."""
        options = [*OPTIONS, f"--config.steps={self.steps}", f"--workdir={self.workdir}"]
        options.append(f"--config.data.data_dir={self.data_dir or self.folder / 'data'}")
        if self.processes == 1:
            return [sys.executable, "-m", "c2f_jax.main", "train", *options]
        program = self.folder / "c2f"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m c2f_jax.main "$@"\n')
        program.chmod(0o755)
        script = str(ROOT / "launch" / "local_processes.sh")
        return ["env", f"C2F={program}", script, str(self.processes), *options]

    def start(self, log, supervised):
        """Start it; what it prints goes to a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        words = self.command()
        if supervised:
            words = [str(ROOT / "launch" / "supervise.sh"), *words]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # One device: tests force four.
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("count=4", "count=1"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "MAX_FAILURES": "1000",
            "PAUSE": "0",
            "KILL_AFTER": "5",
        }
        with open(log, "ab") as file:
            return subprocess.Popen(
                words, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def outcome(self):
        """Everything that the run leaves, but for times and paths."""
        import jax
        import orbax.checkpoint as ocp
        from etils import epath

        from c2f_jax.training.checkpoints import Checkpoints

        checkpoints = Checkpoints(self.workdir, read_only=True)
        step = checkpoints.latest_step
        folder = epath.Path(self.workdir) / "checkpoints" / str(step)
        arrays = {}
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        for item in ("params", "state"):
            reader = ocp.StandardCheckpointer()
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                reader.metadata(folder / item).item_metadata.tree,
            )
            tree = reader.restore(folder / item, target)
            for path, value in jax.tree_util.tree_leaves_with_path(tree):
                arrays[f"{item}{jax.tree_util.keystr(path)}"] = np.asarray(value)
        progress = json.loads((folder / "progress" / "metadata").read_text())
        content = json.loads(progress["content"])["progress"]
        evaluation = json.loads(next((self.workdir / "eval").glob("*-test.json")).read_text())
        evaluation.pop("seconds", None)
        return step, arrays, content["history"], evaluation


def descendants(pid):
    """All processes below one, those of the training program alone."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended
            words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
            if words[0] == sys.executable.encode() and b"c2f_jax.main" in words:
                found.append(parent)
            for task in Path(f"/proc/{parent}/task").iterdir():
                with contextlib.suppress(OSError):  # a thread has
                    waiting += [int(word) for word in (task / "children").read_text().split()]
    return sorted(found)


class Killer:
    """Sends signals to a supervised run at chosen moments."""

    def __init__(self, run, seed):
        self.run, self.random = run, random.Random(seed)
        self.log = run.folder / "log"
        run.folder.mkdir(parents=True)
        self.log.touch()
        self.supervisor = run.start(self.log, supervised=True)
        self.killed = set()
        self.done = collections.Counter()

    def is_over(self):
        return self.supervisor.poll() is not None

    def wait_until(self, condition):
        """Whether it came true before the run ended or the patience did."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not self.is_over():
            if condition():
                return True
            time.sleep(0.001)
        return False

    def kill(self, moment, how):
        """One kill; whether it was one."""
        living = lambda: [p for p in descendants(self.supervisor.pid) if p not in self.killed]  # noqa: E731
        gone = lambda: self.killed.isdisjoint(descendants(self.supervisor.pid))  # noqa: E731
        if not self.wait_until(gone) and not self.is_over():
            raise AssertionError("a process goes on after SIGTERM")
        if not self.wait_until(lambda: len(living()) >= self.run.processes):
            return False
        pid = self.random.choice(living() or [0])  # none: it has just ended
        since = self.log.stat().st_size

        def printed(*texts):
            with open(self.log, "rb") as file:
                file.seek(since)
                found = file.read().decode(errors="replace")
            return any(text in found for text in texts)

        steps = ("resuming at step", f"/{self.run.steps}  loss")
        # Killed processes leave unfinished folders, of which some have the names of those to come.
        unfinished = {"data": "data/**/incomplete*", "save": "run/checkpoints/*-checkpoint-tmp*"}
        pattern = unfinished.get(moment, "none")
        left = _folders(self.run.folder, pattern)
        conditions = {
            "start": lambda: True,
            "data": lambda: _folders(self.run.folder, pattern) - left,
            "training": lambda: printed(*steps),
            "save": lambda: _folders(self.run.folder, pattern) - left,
            # Every second line of the log comes just before an evaluation.
            "evaluation": lambda: printed(*steps) and _last_step(self.log, since) % 8 == 0,
        }
        longest = {"start": 5.0, "data": 0.3, "training": 1.0, "save": 0.05, "evaluation": 0.3}
        has_ended = lambda: not Path(f"/proc/{pid}").exists()  # noqa: E731 - faster than living()
        if not self.wait_until(lambda: conditions[moment]() or has_ended()):
            return False
        time.sleep(self.random.uniform(0, longest[moment]))
        if pid not in living():
            return False
        self.killed.update(living())  # the others end with it
        with contextlib.suppress(ProcessLookupError):
            if how == "SIGTERM":
                os.kill(pid, signal.SIGTERM)
            else:
                if how != "SIGKILL":
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
        self.done[moment, how] += 1
        return True


def _folders(folder, pattern):
    found = set()
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # it has been renamed
            found.add((path, path.stat().st_ctime_ns))
    return found


def _last_step(log, since):
    with open(log, "rb") as file:
        file.seek(since)
        lines = [line for line in file.read().splitlines() if line.startswith(b"step ")]
    words = lines[-1].split()[1].split(b"/") if lines else [b"1"]
    return int(words[0]) if len(words) == 2 and words[0].isdigit() else 1


def differences(found, expected):
    """What is not the same, bit for bit."""
    step, arrays, history, evaluation = found
    names = [name for name, x in expected[1].items() if not np.array_equal(x, arrays.get(name))]
    if step != expected[0]:
        names.append(f"step {step} for {expected[0]}")
    if arrays.keys() != expected[1].keys():
        names.append("names of arrays")
    names += [name for name in expected[2] if history.get(name) != expected[2][name]]
    if evaluation != expected[3]:
        names.append("the evaluation of the test split")
    return names


def chaos(folder, plan, *, seed=0, **options):
    """Run undisturbed and with kills: the kills by moment and signal, and the differences.

    ``options`` are those of ``Run``.
    """
    undisturbed = Run(folder / "undisturbed", **options)
    undisturbed.folder.mkdir(parents=True)
    log = undisturbed.folder / "log"
    status = undisturbed.start(log, supervised=False).wait()
    assert status == 0, log.read_text()[-3000:]

    killer = Killer(Run(folder / "killed", **options), seed)
    try:
        for moment, how in tqdm(plan, unit="kill", disable=None):
            while not killer.kill(moment, how) and not killer.is_over():
                pass
        status = killer.supervisor.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(killer.supervisor.pid, signal.SIGKILL)
    assert status == 0, f"status {status}\n{killer.log.read_text()[-3000:]}"
    return killer.done, differences(killer.run.outcome(), undisturbed.outcome())


def main():
    """Make the plan, kill, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="is made anew")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)

    # Data are made first; a kill there is only possible until they are complete.
    every = list(itertools.product(MOMENTS, HOWS))
    plan = [every[i % len(every)] for i in range(args.kills)]
    plan.sort(key=lambda kill: kill[0] != "data")
    rest = plan[sum(kill[0] == "data" for kill in plan) :]
    random.Random(args.seed).shuffle(rest)
    plan[len(plan) - len(rest) :] = rest
    done, differ = chaos(
        args.folder, plan, seed=args.seed, steps=args.steps, processes=args.processes
    )

    print("| moment | " + " | ".join(HOWS) + " |\n|---" + "|---" * len(HOWS) + "|")
    for moment in MOMENTS:
        print(f"| {moment} | " + " | ".join(str(done[moment, how]) for how in HOWS) + " |")
    print(f"{sum(done.values())} kills; not equal to the undisturbed run: {differ or 'nothing'}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
