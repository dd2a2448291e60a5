"""Joining the processes of a pod, a node group or a loopback test."""

import itertools
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from c2f_jax.errors import UserError

T = TypeVar("T")

# For what one process does alone: preparing a data set, the final evaluation.
WAIT_SECONDS = 24 * 3600

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


def all_rows(rows: np.ndarray) -> np.ndarray:
    """Return the rows of all processes, in order; all must call this.

    Args:
      rows: (n, ...) of this process.
    """
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def wait_for_all() -> None:
    """Block until every process gets here, even hours later.

    This is a barrier of jax's distributed service. One made of a collective, such as
    ``multihost_utils.sync_global_devices``, gives up after 30 s where Gloo connects the processes.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        wait = multihost.get_barrier_sync_fn()
        wait(key=f"c2f_jax {next(_barriers)}", timeout_ms=1000 * WAIT_SECONDS)


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
