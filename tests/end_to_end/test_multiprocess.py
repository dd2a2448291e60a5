"""Two real processes on loopback, two devices each, take the same steps as one process with one
device.

Run as a program, this file is one of the two processes.
"""

import functools
import itertools
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.faults import plant
from helpers.rounding import assert_equal_but_for_rounding, rounding_ratios

import c2f_jax
from c2f_jax.errors import UserError
from c2f_jax.models.factory import create_model
from c2f_jax.objectives import sample_hard_negatives
from c2f_jax.objectives.collectives import axis_index, pmean
from c2f_jax.objectives.embedding_queue import create_queue, enqueue
from c2f_jax.training.distributed import first_process_first, initialize
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.parallel import MODES, DataParallel
from c2f_jax.training.train_state import create_train_state
from c2f_jax.training.train_step import train_step

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
    """The model, the optimiser and the initial state as numpy arrays; each process makes its
    own."""
    tower = {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 4.0}
    speech = tower | {"name": "log_mel", "mels": 8, "hop": 160, "conv_layers": 1}
    image = tower | {"name": "vit", "patch": 8, "conv_stem": False, "token_pool": 1}
    model = create_model(speech, image, tower, embedding_dim=8)
    optimizer = optax.sgd(0.01, momentum=0.9)
    state = create_train_state(
        model, optimizer, next(batches()), seed=1, queue_size=13, token_queue_size=11
    )
    return model, optimizer, jax.tree.map(np.asarray, state)


def make_step(pool, mode=None):
    """Initial state, DataParallel and compiled step; mode None is one device without a device
    axis."""
    model, optimizer, state = initial()
    if pool == "global":
        state = state.replace(
            token_queue=jax.tree.map(np.asarray, create_queue(0, state.token_queue.entries))
        )
    method = MethodConfig(negatives=pool, alpha_ramp_steps=2)
    step = functools.partial(train_step, model=model, optimizer=optimizer, method=method)
    parallel = DataParallel(mode or "shard_map", None if mode else jax.devices()[:1])
    return state, parallel, parallel.compile_step(step) if mode else jax.jit(step)


def run(pool, mode, rows=slice(None), steps=STEPS):
    """Steps with this process's rows: the state and the metrics after each of them, as numpy
    arrays."""
    state, parallel, step = make_step(pool, mode)
    parallel.check_batch_size(N)
    state, after = parallel.place_state(state), []
    for batch in itertools.islice(batches(), steps):
        given = jax.tree.leaves(state)
        state, metrics = step(
            state, parallel.place_batch({name: value[rows] for name, value in batch.items()})
        )
        # Copies: an array that numpy still looks at is not given away.
        after.append(
            jax.tree.map(np.copy, (parallel.host_copy(state), means(parallel.host_copy(metrics))))
        )
    assert all(leaf.is_deleted() for leaf in given), "the given state is donated"
    parallel.host_copy(parallel.global_state(state))  # as checkpoints take it
    return after


@functools.cache
def one_device(pool):
    """The initial state, and a step of one process with one device: (state, batch) -> (next state,
    metrics)."""
    state, _, step = make_step(pool)

    def take(state, batch):
        state, metrics = jax.device_get(step(state, batch))
        return state, means(metrics)

    return state, take


def means(metrics):
    return {name: np.float32(value.compute()) for name, value in metrics.items()}


def worker(port, process, directory):
    """One of the processes: every mode and pool, each result saved to its own file."""
    initialize(f"127.0.0.1:{port}", PROCESSES, process)
    assert jax.device_count() == PROCESSES * DEVICES and jax.local_device_count() == DEVICES
    for name, make in (("made", make_file), ("failed", fail_at_first)):
        Path(directory, f"{name}-{process}").write_text(
            _told(first_process_first, make, Path(directory), process)
        )
    share = N // PROCESSES
    for mode in MODES:
        for pool in POOLS:
            after = run(pool, mode, slice(process * share, (process + 1) * share))
            Path(directory, f"{mode}-{pool}-{process}.pickle").write_bytes(pickle.dumps(after))


def make_file(directory, process):
    """A data set made where it is missing; process 0, which takes longer, must make it all the
    same."""
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
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        # A program of several processes is each one's own; nothing compiled is shared.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # For the package and for tests/helpers.
        "PYTHONPATH": os.pathsep.join(
            [
                str(Path(c2f_jax.__file__).parents[1]),
                str(Path(__file__).parents[1]),
                os.environ.get("PYTHONPATH", ""),
            ]
        ),
    }
    with open(directory / f"{process}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(port), str(process), str(directory)],
            env=environment,
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
    """(mode, pool) -> the results of ``run`` in each of the processes; and their directory."""
    directory = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(port, process, directory) for process in range(PROCESSES)]
    try:
        codes = wait(processes, TIMEOUT)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join(
        (directory / f"{process}.log").read_text()[-3000:] for process in range(PROCESSES)
    )
    assert codes == [0] * PROCESSES, f"exit codes {codes} (None: stopped after {TIMEOUT} s)\n{logs}"
    found = {
        (mode, pool): [
            pickle.loads((directory / f"{mode}-{pool}-{process}.pickle").read_bytes())
            for process in range(PROCESSES)
        ]
        for mode in MODES
        for pool in POOLS
    }
    return found, directory


def test_process_0_makes_what_is_missing_and_the_others_wait(results):
    told = {
        path.name: path.read_text()
        for path in results[1].iterdir()
        if path.name[:-2] in ("made", "failed")
    }
    assert told == {
        "made-0": "made by 0",
        "made-1": "made by 0",
        "failed-0": "no room",
        "failed-1": "went on",
    }


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one_device(results, mode, pool):
    """Every step of the processes is one device's step from the same state, so that no rounding
    adds up over steps.

    How much rounding may move a result is measured on the machine at hand: see ``rounding_ratios``.
    """
    for after in results[0][mode, pool]:
        before, step = one_device(pool)
        for batch, (state, metrics) in zip(batches(), after, strict=True):
            assert "log_tau" in state.params["temperature"]
            assert ("speech_tokens" in state.token_queue.entries) == (pool == "queue")
            assert_equal_but_for_rounding(step, (before, batch), (state, metrics))
            before = state


def gradients_of_one_device(tree, axis_name=None):
    """``pmean`` that leaves trees alone, the gradients, and still averages arrays, such as the
    loss."""
    return pmean(tree, axis_name) if isinstance(tree, jax.Array) else tree


def other_order(queue, rows, valid):
    """``enqueue`` that begins with the rows of the second device."""
    return enqueue(
        queue, *jax.tree.map(lambda x: jnp.roll(x, N // jax.device_count(), axis=0), (rows, valid))
    )


def negatives_of_the_next_row(*arguments):
    mined = sample_hard_negatives(*arguments)
    return mined._replace(columns=jnp.roll(mined.columns, 1))


def row_numbers_of_the_first_device(axis_name=None):
    """``axis_index`` that counts the rows of each device from 0: draws and positive pairs are those
    of other rows."""
    return jnp.zeros((), jnp.int32)


@pytest.mark.parametrize(
    "original, fault",
    [
        (pmean, gradients_of_one_device),
        (enqueue, other_order),
        (sample_hard_negatives, negatives_of_the_next_row),
        (axis_index, row_numbers_of_the_first_device),
    ],
)
def test_a_wrong_collective_is_far_beyond_rounding(monkeypatch, original, fault):
    """Planted faults fail the comparison of ``test_two_processes_equal_one_device`` by far."""
    before, step = one_device("queue")
    inputs = before, next(batches())
    step(*inputs)  # compiled before the fault is planted
    plant(monkeypatch, original, fault)
    ((state, metrics),) = run("queue", "shard_map", steps=1)
    assert max(rounding_ratios(step, inputs, (state, metrics)).values()) > 1000


def test_a_part_of_the_addresses_is_refused():
    with pytest.raises(
        UserError, match="--coordinator, --num-processes and --process-id go together"
    ):
        initialize("127.0.0.1:1", 2)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
