"""Joining the processes of a pod, a node group or a loopback test; work that they share."""

import itertools
import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from c2f_jax.errors import UserError

T = TypeVar("T")

# For what one process does alone, such as preparing a data set, or does more slowly than others.
WAIT_SECONDS = 24 * 3600
MOST_BYTES = 64 * 2**20  # exchanged at once by all processes together: they pass through a device

_barriers = itertools.count()


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Start jax's distributed service; call it before anything else touches jax's devices.

    Without arguments jax finds its peers from the environment of a TPU pod, Slurm or Open MPI.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: number of processes.
      process_id: number of this process.

    Raises:
      UserError: only some of the three are given, or no cluster is found.
    """
    given = [coordinator is not None, num_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --num-processes and --process-id go together: give all three, or none "
            "on a pod"
        )

    # On CPUs jax needs a library for collectives.
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")

    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        raise UserError(
            f"no cluster found ({error}): give --coordinator=HOST:PORT --num-processes=N "
            "--process-id=I"
        ) from error


def wait_for_all() -> None:
    """Block until every process gets here, even hours later.

    This is a barrier of jax's distributed service. One made of a collective, such as
    ``multihost_utils.sync_global_devices``, gives up after 30 s where Gloo connects the processes.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        wait = multihost.get_barrier_sync_fn()
        wait(key=f"c2f_jax {next(_barriers)}", timeout_ms=1000 * WAIT_SECONDS)


def share_work(work: Callable[[int, int], T]) -> list[T]:
    """Let every process do its share of some work, and give all results to all processes.

    All processes must get here, with the same work. An error in one of them is raised in all, so
    that none waits for a process that has stopped.

    Args:
      work: function of the number of this process and the number of processes; its result is
        pickled, arrays piece by piece.

    Returns:
      The result of each process, in order.

    Raises:
      UserError: the work failed in another process; or whatever it raised in this one.
    """
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return [work(0, 1)]

    result = line = None
    failure: Exception | None = None
    try:
        result = work(index, count)
    except Exception as error:
        failure, line = error, str(error)
        if not isinstance(error, UserError):
            line = f"process {index} failed ({type(error).__name__}: {line}): see its own output"

    # The error of the lowest process is raised by all, so that they say the same.
    outcomes = _exchange((result, line))
    for process, (_, line) in enumerate(outcomes):
        if line is not None:
            if failure is not None and (process == index or not isinstance(failure, UserError)):
                raise failure
            raise UserError(line)
    return [result for result, _ in outcomes]


def in_first_process(make: Callable[[], T]) -> T:
    """Call a function in process 0 alone, and give its result to all processes; see `share_work`.

    Args:
      make: function without arguments.
    """
    first: Any = share_work(lambda index, _: make() if index == 0 else None)[0]
    return first


def in_every_process(make: Callable[[], T]) -> T:
    """Call a function in every process; an error in one is raised in all, see `share_work`.

    Args:
      make: function without arguments, such as one that opens files.

    Returns:
      Its result in this process.
    """
    made = []
    share_work(lambda *_: made.append(make()))
    return made[0]


def say(text: str) -> None:
    """Print a line, in process 0 alone.

    Args:
      text: the line.
    """
    if jax.process_index() == 0:
        print(text)


def first_process_first(make: Callable[[], T]) -> T:
    """Call a function in process 0, then in the others, which find its files on disk.

    All processes must get here. An error in process 0 does not keep the others waiting: they try
    for themselves.

    Args:
      make: function without arguments.

    Returns:
      Its result.
    """
    if jax.process_count() > 1 and jax.process_index() > 0:
        wait_for_all()
        return make()
    try:
        return make()
    finally:
        wait_for_all()


def _exchange(value: Any) -> list[Any]:
    """Return the values of all processes, in order."""
    # Arrays stay out of the pickle, which would copy them.
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    sizes = [array.size for array in arrays]

    # Processes may get here hours apart, and a collective does not wait so long.
    wait_for_all()
    heads = _gather_bytes(np.frombuffer(pickle.dumps((head, sizes)), np.uint8))
    streams = _gather_bytes(np.concatenate([_aligned(array) for array in arrays] or [_NOTHING]))

    values = []
    for packed, stream in zip(heads, streams, strict=True):
        head, sizes = pickle.loads(packed.data)
        pieces, start = [], 0
        for size in sizes:
            pieces.append(stream[start : start + size])
            start += size + -size % _ALIGNMENT
        values.append(pickle.loads(head, buffers=pieces))
    return values


_ALIGNMENT = 16  # bytes, of an array among others
_NOTHING = np.zeros(0, np.uint8)


def _aligned(data: np.ndarray) -> np.ndarray:
    """Fill up bytes, so that those after them are aligned."""
    return np.pad(data, (0, -data.size % _ALIGNMENT))


def _gather_bytes(data: np.ndarray) -> list[np.ndarray]:
    """Return the bytes, uint8 (n,), of all processes, in order."""
    from jax.experimental.multihost_utils import process_allgather

    # Numbers travel as words of 32 bits, the widest that jax leaves alone.
    own_size = np.array([data.size], np.int64)
    sizes = np.ascontiguousarray(process_allgather(own_size.view(np.uint32))).view(np.int64)[:, 0]
    longest = int(sizes.max())

    # Blocks of few sizes, so that few programs are compiled.
    block = 4096
    while block < longest and 4 * block * len(sizes) <= MOST_BYTES:
        block *= 4

    received = [np.empty(size, np.uint8) for size in sizes]
    for start in range(0, longest, block):
        words = np.zeros(block // 4, np.uint32)
        part = data[start : start + block]
        words.view(np.uint8)[: part.size] = part
        for target, row in zip(received, process_allgather(words), strict=True):
            piece = target[start : start + block]
            piece[:] = row.view(np.uint8)[: piece.size]
    return received
