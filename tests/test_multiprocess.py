"""Two real processes on loopback, two devices each, take the same steps as one process with one device.

Run as a program, this file is one of the two processes.
"""

import functools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import c2f_jax
from c2f_jax.distributed import first_process_first, initialize
from c2f_jax.embedding_queue import create_queue
from c2f_jax.errors import UserError
from c2f_jax.models import create_model
from c2f_jax.parallel import MODES, DataParallel
from c2f_jax.train_state import create_train_state
from c2f_jax.train_step import MethodConfig, train_step

N, STEPS, PROCESSES, DEVICES = 8, 3, 2, 2
TIMEOUT = 600  # seconds; the work is about 70 s of processor time
POOLS = ("global", "queue")


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {
            "waveform": rng.normal(size=(N, 6000)).astype(np.float32),
            "speech_lengths": rng.integers(3000, 6001, N).astype(np.int32),
            "image": rng.integers(0, 256, (N, 16, 16, 3)).astype(np.uint8),
            "image_id": rng.integers(0, 6, N).astype(np.int32),
        }


@functools.cache
def initial():
    """The model, the optimiser and the initial state as numpy arrays; each process makes its own."""
    tower = {"width": 16, "depth": 1, "heads": 2}
    speech = tower | {"name": "log_mel", "mels": 8, "conv_layers": 1}
    model = create_model(speech, tower | {"name": "vit", "patch": 8}, tower, embedding_dim=8)
    optimizer = optax.sgd(0.01, momentum=0.9)
    state = create_train_state(model, optimizer, next(batches()), seed=1, queue_size=13, token_queue_size=11)
    return model, optimizer, jax.tree.map(np.asarray, state)


def run(pool, mode=None, rows=slice(None)):
    """Three steps with this process's rows; the final state and the last metrics, leaf by leaf, as numpy arrays."""
    model, optimizer, state = initial()
    if pool == "global":
        state = state.replace(token_queue=jax.tree.map(np.asarray, create_queue(0, state.token_queue.entries)))
    method = MethodConfig(negatives=pool, alpha_ramp_steps=2)
    step = functools.partial(train_step, model=model, optimizer=optimizer, method=method)
    if mode is None:
        parallel, step = DataParallel("shard_map", jax.devices()[:1]), jax.jit(step)
    else:
        parallel = DataParallel(mode)
        parallel.check_batch_size(N)
        state, step = parallel.place_state(state), parallel.compile_step(step)
    for batch in batches():
        given = jax.tree.leaves(state)
        batch = {name: value[rows] for name, value in batch.items()}
        state, metrics = step(state, batch if mode is None else parallel.place_batch(batch))
    if mode is not None:
        assert all(leaf.is_deleted() for leaf in given), "the given state is donated"
        state = parallel.global_state(state)
    metrics = {name: value.compute() for name, value in parallel.host_copy(metrics).items()}
    leaves = jax.tree_util.tree_leaves_with_path((parallel.host_copy(state), metrics))
    # numpy's files know no bfloat16.
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def worker(port, process, directory):
    """One of the processes: every mode and pool, each result saved to its own file."""
    initialize(f"127.0.0.1:{port}", PROCESSES, process)
    assert jax.device_count() == PROCESSES * DEVICES and jax.local_device_count() == DEVICES
    for name, make in (("made", make_file), ("failed", fail_at_first)):
        Path(directory, f"{name}-{process}").write_text(_told(first_process_first, make, Path(directory), process))
    share = N // PROCESSES
    for mode in MODES:
        for pool in POOLS:
            result = run(pool, mode, slice(process * share, (process + 1) * share))
            np.savez(Path(directory) / f"{mode}-{pool}-{process}.npz", **result)


def make_file(directory, process):
    """A data set made where it is missing; process 0, which takes longer, must make it all the same."""
    path = directory / "data set"
    if not path.exists():
        time.sleep(0 if process else 1)
        path.write_text(f"made by {process}")
    return path.read_text()


def fail_at_first(directory, process):
    if process == 0:
        raise UserError("no room")
    return "went on"


def _told(turn, make, directory, process):
    try:
        return turn(lambda: make(directory, process))
    except UserError as error:
        return str(error)


def start(port, process, directory):
    flags = f"--xla_force_host_platform_device_count={DEVICES} " + " ".join(
        flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag
    )
    path = os.pathsep.join([str(Path(c2f_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with open(directory / f"{process}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(port), str(process), str(directory)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait(processes, seconds):
    """Until all have ended well, or one has not, or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return codes
        time.sleep(0.2)
    return [process.poll() for process in processes]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(mode, pool) -> what each of the processes has saved; and pool -> one process with one device."""
    directory = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    processes = [start(port, process, directory) for process in range(PROCESSES)]
    try:
        expected = {pool: run(pool) for pool in POOLS}
        codes = wait(processes, TIMEOUT - (time.monotonic() - began))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((directory / f"{process}.log").read_text()[-3000:] for process in range(PROCESSES))
    assert codes == [0] * PROCESSES, f"exit codes {codes} (None: stopped after {TIMEOUT} s)\n{logs}"
    found = {
        (mode, pool): [dict(np.load(directory / f"{mode}-{pool}-{process}.npz")) for process in range(PROCESSES)]
        for mode in MODES
        for pool in POOLS
    }
    return found, expected, directory


def test_process_0_makes_what_is_missing_and_the_others_wait(results):
    told = {path.name: path.read_text() for path in results[2].iterdir() if path.name[:-2] in ("made", "failed")}
    assert told == {"made-0": "made by 0", "made-1": "made by 0", "failed-0": "no room", "failed-1": "went on"}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one_device(results, mode, pool):
    found, expected = results[0][mode, pool], results[1][pool]
    assert any("log_tau" in name for name in expected) and any("speech_tokens" in name for name in expected)
    for result in found:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            # Queued tokens are bfloat16, with rounding steps of 2^-8. In a gradient large terms cancel: an entry's
            # rounding error is of their size, that of the leaf's largest entries, and differs between processors.
            atol = max(1e-5, 1e-6 * np.abs(value).max(initial=0.0))
            tolerance = {"rtol": 2**-7, "atol": 1e-3} if "_tokens" in name else {"rtol": 1e-5, "atol": atol}
            np.testing.assert_allclose(result[name], value, **tolerance, err_msg=name)


def test_a_part_of_the_addresses_is_refused():
    with pytest.raises(UserError, match="--coordinator, --num-processes and --process-id go together"):
        initialize("127.0.0.1:1", 2)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
