"""Devices: the only file that uses pmap, shard_map or a mesh."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from c2f_jax.errors import UserError

AXIS = "devices"
MODES = ("pmap", "shard_map")


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Put a tree of host or single-device arrays on each device.

    Args:
      tree: pytree of arrays.
      devices: the devices; None for all of this process.

    Returns:
      The replicated tree.
    """
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, P()))


def split_rows(params: Any, rows: Any) -> Any:
    """Split rows over the devices that parameters are replicated on.

    A function of both, under jit, then computes a share of the rows on each device.

    Args:
      params: replicated parameters.
      rows: pytree of arrays (b, ...), b a multiple of the number of devices.

    Returns:
      The same arrays, split.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    return jax.device_put(convert_for_cpu(rows), NamedSharding(sharding.mesh, P(AXIS)))


def convert_for_cpu(rows: Any) -> Any:
    """Make float32 of float16 tokens on a CPU; other devices get half the bytes and convert.

    XLA has no such conversion for processors without an instruction for it.

    Args:
      rows: pytree of host arrays.

    Returns:
      The same tree.
    """
    if jax.default_backend() != "cpu":
        return rows
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float16 else x, rows)


def round_up_rows(params: Any, count: int) -> int:
    """Return the smallest number of rows, at least ``count``, that ``split_rows`` can split.

    Args:
      params: replicated parameters.
      count: number of rows.

    Returns:
      ``count`` or the next multiple of the number of devices.
    """
    devices = len(jax.tree.leaves(params)[0].sharding.device_set)
    return -(-count // devices) * devices


class DataParallel:
    """One step over all devices of all processes: the state replicated, the batch split by rows.

    Both modes run the same function: "pmap" maps it over local devices with an unstacked state,
    "shard_map" runs it under jit over one mesh of all devices.

    Attributes:
      mode: "pmap" or "shard_map".
      devices: all devices of all processes, or those given, in order.
      local_devices: those of this process.
      mesh: one axis over ``devices``.
    """

    def __init__(self, mode: str = "pmap", devices: Sequence[jax.Device] | None = None) -> None:
        if mode not in MODES:
            raise UserError(f"parallel={mode!r}: choose one of {', '.join(MODES)}")
        self.mode = mode
        self.devices = list(devices or jax.devices())
        process = jax.process_index()
        self.local_devices = [device for device in self.devices if device.process_index == process]
        self.mesh = Mesh(np.array(self.devices), (AXIS,))

    def check_batch_size(self, batch_size: int) -> None:
        """Check that the global batch divides over the devices.

        Args:
          batch_size: rows of the global batch.

        Raises:
          UserError: it does not.
        """
        if batch_size < 1 or batch_size % len(self.devices):
            raise UserError(
                f"batch_size={batch_size} does not divide over {len(self.devices)} devices: "
                f"use a positive multiple of {len(self.devices)}"
            )

    def compile_step(self, step: Callable) -> Callable:
        """Compile a step over all devices. The state that it is given is donated.

        Args:
          step: function (state, batch, *, axis_name) -> (state, metrics).

        Returns:
          Function (state, batch) -> (state, metrics) of a placed state and batch.
        """
        step = partial(step, axis_name=AXIS)

        # The state has no device axis: one copy in, one out. Donation saves the memory of a second.
        if self.mode == "pmap":
            return jax.pmap(
                step,
                AXIS,
                in_axes=(None, 0),
                out_axes=(None, None),
                devices=self.local_devices if jax.process_count() == 1 else None,
                donate_argnums=0,
            )

        # check_vma=False: the step averages its gradients itself, once, in both modes.
        mapped = jax.shard_map(
            step, mesh=self.mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=0)

    def place_state(self, state: Any) -> Any:
        """Put a host or single-device state, replicated, on the devices.

        Without this, two processes with a donated, unstacked state die with "Array has been
        deleted".

        Args:
          state: pytree of arrays.

        Returns:
          The placed state.
        """
        if self.mode == "pmap":
            return replicate(state, self.local_devices)

        # Each process has the whole state; together they make one global array.
        host = jax.tree.map(np.asarray, state)
        return multihost_utils.host_local_array_to_global_array(host, self.mesh, P())

    def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Put this process's rows of the global batch on its devices.

        Args:
          batch: name -> (n, ...), n a multiple of the number of local devices.

        Returns:
          The placed batch by name.
        """
        batch = convert_for_cpu(dict(batch))

        # pmap wants a leading axis of devices.
        if self.mode == "pmap":
            local = len(self.local_devices)
            split = {}
            for name, rows in batch.items():
                split[name] = rows.reshape(local, rows.shape[0] // local, *rows.shape[1:])
            mesh = Mesh(np.array(self.local_devices), (AXIS,))
            return jax.device_put(split, NamedSharding(mesh, P(AXIS)))

        # shard_map wants global arrays, of which each process gives its rows.
        sharding = NamedSharding(self.mesh, P(AXIS))
        placed = {}
        for name, rows in batch.items():
            placed[name] = jax.make_array_from_process_local_data(sharding, rows)
        return placed

    def global_state(self, state: Any) -> Any:
        """Return the state as global arrays, which Orbax saves from and restores to all processes.

        Args:
          state: placed state.

        Returns:
          The same values; the state itself if it is global already.
        """
        if jax.process_count() == 1 or self.mode == "shard_map":
            return state

        # pmap's arrays belong to one process, and Orbax refuses those.
        host = jax.tree.map(np.asarray, state)
        return multihost_utils.host_local_array_to_global_array(host, self.mesh, P())

    def host_copy(self, tree: Any) -> Any:
        """Return a replicated tree as numpy arrays."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)

    def local_copy(self, tree: Any) -> Any:
        """Return a replicated tree on this process's devices alone; see ``split_rows``."""
        return replicate(jax.tree.map(lambda x: x.addressable_data(0), tree), self.local_devices)
