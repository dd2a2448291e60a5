"""Devices: the only file that says pmap, shard_map or mesh."""

from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from c2f_jax.errors import UserError

AXIS = "devices"
MODES = ("pmap", "shard_map")


def replicate(tree, devices=None):
    """A tree of host or single-device arrays on each of the devices; None for all of this process."""
    return jax.device_put(
        tree, NamedSharding(Mesh(np.array(devices or jax.local_devices()), (AXIS,)), P())
    )


def split_rows(params, rows):
    """Arrays (b, ...) with rows split over the devices that ``params`` are replicated on; b a multiple of their number.

    A jitted function of both then does a share of the rows on each device.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    return jax.device_put(rows, NamedSharding(sharding.mesh, P(AXIS)))


def round_up_rows(params, count):
    """The rows of a batch that `split_rows` can split: ``count`` or the next multiple of the number of devices."""
    devices = len(jax.tree.leaves(params)[0].sharding.device_set)
    return -(-count // devices) * devices


class DataParallel:
    """One step body over all devices of all processes, the state replicated and the batch split by rows.

    Both modes run the same function; "pmap" maps it over local devices with an unstacked state, "shard_map" under jit
    over one mesh of all devices.

    Attributes:
      mode: "pmap" or "shard_map".
      devices: the devices of all processes (pmap) or those given, in order.
    """

    def __init__(self, mode="pmap", devices=None):
        if mode not in MODES:
            raise UserError(f"parallel={mode!r}: choose one of {', '.join(MODES)}")
        self.mode = mode
        self.devices = list(devices or jax.devices())
        self.local_devices = [d for d in self.devices if d.process_index == jax.process_index()]
        self.mesh = Mesh(np.array(self.devices), (AXIS,))

    def check_batch_size(self, batch_size):
        """Raise UserError unless the global batch divides over the devices."""
        if batch_size < 1 or batch_size % len(self.devices):
            raise UserError(
                f"batch_size={batch_size} does not divide over {len(self.devices)} devices: "
                f"use a positive multiple of {len(self.devices)}"
            )

    def compile_step(self, step):
        """Compile ``step(state, batch, axis_name=...) -> (state, metrics)``; the given state is donated."""
        step = partial(step, axis_name=AXIS)
        if self.mode == "pmap":
            return jax.pmap(
                step,
                AXIS,
                in_axes=(None, 0),
                out_axes=(None, None),
                devices=self.local_devices if jax.process_count() == 1 else None,
                donate_argnums=0,
            )
        # check_vma=False: what all_gather returns is equal on all devices, which the checker cannot see.
        mapped = jax.shard_map(
            step, mesh=self.mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=0)

    def place_state(self, state):
        """Put a host or single-device state, replicated, on the devices.

        Without it two processes with a donated, unstacked state die with "Array has been deleted".
        """
        if self.mode == "pmap":
            return jax.device_put(
                state, NamedSharding(Mesh(np.array(self.local_devices), (AXIS,)), P())
            )
        return multihost_utils.host_local_array_to_global_array(
            jax.tree.map(np.asarray, state), self.mesh, P()
        )

    def place_batch(self, batch):
        """Put this process's rows (n, ...) of the global batch on its devices."""
        if self.mode == "pmap":
            local = len(self.local_devices)
            batch = {
                k: v.reshape(local, v.shape[0] // local, *v.shape[1:]) for k, v in batch.items()
            }
            return jax.device_put(
                batch, NamedSharding(Mesh(np.array(self.local_devices), (AXIS,)), P(AXIS))
            )
        sharding = NamedSharding(self.mesh, P(AXIS))
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

    def global_state(self, state):
        """The state as global arrays, which Orbax saves from and restores to all processes."""
        if jax.process_count() == 1 or self.mode == "shard_map":
            return state
        return jax.tree.map(
            lambda x: multihost_utils.host_local_array_to_global_array(
                np.asarray(x), self.mesh, P()
            ),
            state,
        )

    def host_copy(self, tree):
        """A replicated tree as numpy arrays."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)

    def local_copy(self, tree):
        """A replicated tree on this process's devices, for work that the processes do not share; see `split_rows`."""
        return replicate(jax.tree.map(lambda x: x.addressable_data(0), tree), self.local_devices)
