"""Real processes over loopback that work together."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import c2f_jax


@dataclass
class Ended:
    """How a process ended: its exit status, None if it was stopped, and what it printed."""

    code: int | None
    out: str
    err: str


def run_together(words, count, directory, seconds):
    """Run ``python WORDS`` as several processes, each in its own folder and with the arguments that
    connect it to the others, until all have ended or the time is over; return how each ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [Path(c2f_jax.__file__).parents[1], Path(__file__).parents[1]]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # A program of several processes is each one's own; nothing compiled is shared.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
    }
    folders = [Path(directory, f"process-{process}") for process in range(count)]
    processes = []
    for process, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        join = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num-processes={count}",
            f"--process-id={process}",
        ]
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            started = subprocess.Popen(
                [sys.executable, *map(str, words), *join],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=err,
            )
        processes.append(started)

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    return [
        Ended(code, (folder / "out").read_text(), (folder / "err").read_text())
        for code, folder in zip(codes, folders, strict=True)
    ]
