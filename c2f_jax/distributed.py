"""Joining the processes of a pod, a node group or a loopback test."""

import os

import jax

from c2f_jax.errors import UserError


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
        raise UserError("--coordinator, --num-processes and --process-id go together: give all three, or none on a pod")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        raise UserError(
            f"no cluster found ({error}): give --coordinator=HOST:PORT --num-processes=N --process-id=I"
        ) from error
