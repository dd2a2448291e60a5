"""Chips and slices, as their compilers and the makers' published figures describe them."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from c2f_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes:
      name: as in the name of a slice.
      memory: bytes of HBM.
      flops: products and sums of bfloat16 per second, the peak.
      memory_bandwidth: bytes per second between the chip and its HBM.
      interconnect: bytes per second that a chip sends to its neighbors, over all links; as many
        arrive.
      pod: chips of the largest slice.
      devices: jax devices per chip.
      between_hosts: bytes per second that a chip sends to another host, where that is slower.

    Reference:
      Google Cloud's pages of v4, v5e, v5p, v6e and TPU7x (docs.cloud.google.com/tpu/docs/v4,
      .../v5e, .../v5p, .../v6e, .../tpu7x), November 2026; they give the interconnect in both
      directions together. That of v4: "How to Scale Your Model" (jax-ml.github.io/scaling-book),
      six links of 45 GB/s. NVIDIA's data sheet of the H100 SXM; between hosts, the 400 Gb/s adapter
      that each has in a DGX H100 (its user guide).
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    interconnect: float
    pod: int
    devices: int = 1
    between_hosts: float | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1200e9, 270e9, 4096),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, 256),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 8960),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, 256),
        Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 600e9, 9216, devices=2),
        Chip("h100", 80e9, 989e12, 3350e9, 450e9, 4096, between_hosts=50e9),
    )
}
# Two cores of a v4 chip act as one device, as they do on Cloud TPU.
ONE_DEVICE = {"v4": {"chip_config_name": "megacore"}}

# What the CUDA compiler must know of an H100 SXM that is not here: what CUDA reports of one.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
}
"""

# The TPU compiler alone is used: it need not look for a description of this machine, complain that
# there is none, or keep the TPU of this machine from other processes.
COMPILER_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that programs can be compiled for without having them.

    Attributes:
      name: such as "v5e:16x16", or "h100:4x8" for four hosts of eight.
      chip: its chip.
      devices: what to compile for.
      interconnect: bytes per second that a chip sends to others.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    interconnect: float

    @property
    def chips(self) -> int:
        """The number of chips."""
        return len(self.devices) // self.chip.devices


def open_slice(name: str) -> Slice:
    """Return a slice by its name.

    Args:
      name: chip and shape, such as "v5e:2x4" or "v5p:4x4x8"; of GPUs, their number on a host, or
        hosts and GPUs of each, such as "h100:4x8".

    Raises:
      UserError: there is no such chip or shape, or the CUDA compiler is not installed.
      ModuleNotFoundError: the TPU compiler is not installed.
    """
    kind, colon, shape = name.partition(":")
    if kind not in CHIPS or not colon:
        raise UserError(
            f"--topology={name}: give a chip and a shape, such as v5e:2x4; the chips are "
            f"{', '.join(CHIPS)}"
        )
    if kind == "h100":
        return _open_gpus(name, shape)
    if not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise UserError(f"--topology={name}: the shape must be like 2x4 or 2x2x1")

    for variable, value in COMPILER_ALONE.items():
        os.environ.setdefault(variable, value)
    import libtpu  # noqa: F401 - the compiler; without it jax would say that there is no TPU
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **_options(kind, shape)
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={name}: the TPU compiler knows no such slice ({reason})"
        ) from error

    chip = CHIPS[kind]
    found = Slice(name, chip, list(topology.devices), chip.interconnect)
    if found.chips > chip.pod:
        raise UserError(
            f"--topology={name} has {found.chips} chips, but a pod of {chip.name} has {chip.pod}: "
            "give a smaller shape or another chip"
        )
    return found


def _open_gpus(name: str, shape: str) -> Slice:
    """Return some hosts of H100 GPUs."""
    match = re.fullmatch(r"(?:(\d+)x)?([1-8])", shape)
    if match is None:
        raise UserError(f"--topology={name}: give GPUs of a host, or hosts x GPUs, such as 4x8")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            f"--topology={name} needs the CUDA compiler, not a GPU: pip install 'jax[cuda12]'"
        )
    from jax.experimental import topologies

    hosts, chip = int(match[1] or 1), CHIPS["h100"]
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=f"1x{hosts}x{match[2]}", target_config=H100
    )
    speed = chip.between_hosts if hosts > 1 else chip.interconnect
    assert speed is not None
    return Slice(name, chip, list(topology.devices), speed)


def _options(kind: str, shape: str) -> dict[str, Any]:
    """Return what the TPU compiler needs to know beside the name."""
    options: dict[str, Any] = dict(ONE_DEVICE.get(kind, {}))
    # A host has a square of four chips; a smaller slice is a part of one host.
    sides = [int(side) for side in shape.split("x")]
    sides += [1] * (3 - len(sides))
    if sides[0] * sides[1] * sides[2] < 4:
        options["chips_per_host_bounds"] = tuple(sides)
    return options
