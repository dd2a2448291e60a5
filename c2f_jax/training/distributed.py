"""Joining the processes of a pod, a node group or a loopback test."""

import itertools
import os

import jax

from c2f_jax.errors import UserError

WAIT_SECONDS = 24 * 3600  # for what one process does alone: making a data set, the final evaluation
_barriers = itertools.count()


def initialize(coordinator=None, num_processes=None, process_id=None):
    """Start jax's distributed service; must run before anything else touches jax's devices.

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
            "--coordinator, --num-processes and --process-id go together: give all three, or none on a pod"
        )
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        raise UserError(
            f"no cluster found ({error}): give --coordinator=HOST:PORT --num-processes=N --process-id=I"
        ) from error


def wait_for_all():
    """Return when all processes have come here, be it hours later.

    A barrier of jax's distributed service: one made of a collective, as ``multihost_utils.sync_global_devices``, gives
    up after 30 s where Gloo connects the processes.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        wait = multihost.get_barrier_sync_fn()
        wait(key=f"c2f_jax {next(_barriers)}", timeout_ms=1000 * WAIT_SECONDS)


def first_process_first(make):
    """The result of make(), called by process 0 first and then by the others, which find on disk what it has made.

    All processes must come here. What process 0 raises does not keep the others waiting: they try for themselves.
    """
    if jax.process_count() > 1 and jax.process_index() > 0:
        wait_for_all()
        return make()
    try:
        return make()
    finally:
        wait_for_all()
