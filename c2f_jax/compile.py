"""Compile a training run for a slice of accelerators that is not here, and say what it costs."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from c2f_jax.config.experiment import Experiment, create_experiment, example_batch
from c2f_jax.errors import UserError
from c2f_jax.hardware.chips import Slice, open_slice
from c2f_jax.hardware.programs import (
    Collective,
    Operations,
    bytes_accessed,
    count_moved,
    count_operations,
    find_collectives,
)
from c2f_jax.models.encoder import NetworkOutput
from c2f_jax.pretrained.stand_ins import stand_in_card
from c2f_jax.pretrained.weights import open_card
from c2f_jax.training.optimizer import create_optimizer
from c2f_jax.training.parallel import AXIS, DataParallel
from c2f_jax.training.train_state import C2FTrainState, create_train_state
from c2f_jax.training.train_step import train_step

EFFICIENCY = 0.5
# How the TPU compiler says what a program would take that it refuses; that of GPUs refuses none.
_OUT_OF_MEMORY = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Plan:
    """What a training step takes on a slice.

    All bytes, operations and seconds are those of one chip.

    Attributes:
      topology: name of the slice.
      chips: its chips.
      batch_size: rows of the global batch.
      steps: steps of the run.
      memory: what fills the memory, bytes by name. Layouts of the compiler add padding to them.
      used: bytes in use at the peak, as the compiler counts them.
      capacity: bytes of the chip.
      operations: products and convolutions of a step.
      moved: bytes to and from the chip's memory in a step, as the compiler counts them.
      sent: bytes that the chip sends to others in a step.
      collectives: what travels between chips in a step.
      compute_seconds: operations at the chip's peak.
      memory_seconds: bytes moved at its full bandwidth.
      network_seconds: bytes sent at the full bandwidth of its links.
      compile_seconds: how long the compiler took here.
    """

    topology: str
    chips: int
    batch_size: int
    steps: int
    memory: dict[str, float]
    used: float
    capacity: float
    operations: Operations
    moved: float
    sent: float
    collectives: Sequence[Collective]
    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    compile_seconds: float

    @property
    def is_compiled(self) -> bool:
        """Whether the compiler took the program; else it counted nothing but memory."""
        return self.moved > 0

    @property
    def fits(self) -> bool:
        """Whether the chip's memory is large enough."""
        return self.used <= self.capacity

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: the longer of compute and memory, then the network, at EFFICIENCY.

        Nothing overlaps with the network here, though much of it does on a TPU.
        """
        bound = max(self.compute_seconds, self.memory_seconds) + self.network_seconds
        return bound / EFFICIENCY

    def to_json(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        values = dataclasses.asdict(self) | {"fits": self.fits}
        if self.is_compiled:
            values["step_seconds"] = self.step_seconds
            values["pairs_per_second"] = self.batch_size / self.step_seconds
            values["hours"] = self.steps * self.step_seconds / 3600
        return values


def compile_for(config: ConfigDict, topology: str) -> Plan:
    """Compile the training step of a configuration for a slice; neither data nor weights are read.

    The step is that of the whole method in the longest bucket. It is compiled as ``shard_map``;
    ``pmap`` gives the TPU compiler the same program.

    Args:
      config: configuration; see ``load_config``. Published weights and caches that are not here
        are replaced by shapes alone, if the shipped configurations name them.
      topology: name of the slice, such as "v5e:16x16".

    Returns:
      The plan. If the compiler refuses the program for its memory, that is all that it counted.

    Raises:
      UserError: there is no such slice, the batch does not divide over it, or weights are missing
        whose shapes are not known.
    """
    target = open_slice(topology)
    experiment = create_experiment(config, card_of=_card_of)
    parallel = DataParallel("shard_map", target.devices)
    parallel.check_batch_size(experiment.batch_size)

    # Shapes alone: nothing is computed, and no parameter exists.
    optimizer = create_optimizer(experiment.optimizer, experiment.steps)
    row = _example_row(experiment)
    state = jax.eval_shape(
        lambda: create_train_state(
            experiment.model,
            optimizer,
            row,
            seed=0,
            queue_size=experiment.queue_size,
            token_queue_size=experiment.token_queue_size,
            momentum_model=experiment.method.momentum is not None,
        )
    )
    batch = {
        name: jax.ShapeDtypeStruct((experiment.batch_size, *value.shape[1:]), value.dtype)
        for name, value in row.items()
    }
    batch["image_id"] = jax.ShapeDtypeStruct((experiment.batch_size,), jnp.int32)
    method = experiment.method
    if method.alpha_ramp_steps is None:  # an epoch, of data that need not be here
        method = dataclasses.replace(method, alpha_ramp_steps=1)
    step = functools.partial(train_step, model=experiment.model, optimizer=optimizer, method=method)
    compiled_step: Any = parallel.compile_step(step)
    traced = compiled_step.trace(
        _placed(state, NamedSharding(parallel.mesh, P())),
        _placed(batch, NamedSharding(parallel.mesh, P(AXIS))),
    )
    return _measure(experiment, target, state, batch, traced)


def advice(config: ConfigDict, plan: Plan) -> list[str]:
    """Return what to change in a run that does not fit.

    Args:
      config: configuration.
      plan: the plan of that configuration.

    Returns:
      The changes, each of which saves memory.
    """
    changes = []
    if plan.memory["queues"] > plan.capacity / 4:
        changes.append("a smaller --config.queue_size or --config.token_queue_size")
    if config.batch_size > plan.chips:
        changes.append("a slice of more chips")
    rows = config.batch_size // plan.chips
    if rows > 1:
        changes.append(f"--config.batch_size={rows // 2 * plan.chips}")
    if not config.model.remat:
        changes.append("--config.model.remat=true, which recomputes activations")
    if config.model.dtype != "bfloat16":
        changes.append("--config.model.dtype=bfloat16")
    if config.method.sim_weight and config.method.negatives != "batch":
        if (config.method.mining_rows or config.batch_size) > rows:
            changes.append(f"--config.method.mining_rows={rows}, which gathers no tokens")
    return changes


def _card_of(weights: str) -> dict[str, Any]:
    """Return the card of weights, or of a network of that name if there are none."""
    card = None if Path(weights).exists() else stand_in_card(weights)
    return open_card(weights) if card is None else card


def _example_row(experiment: Experiment) -> dict[str, np.ndarray]:
    """Return one row of zeros in the longest training shape; no cache needs to be there."""
    data, model = experiment.data, experiment.model
    paths = {"speech": data.speech_features, "image": data.image_features}
    missing = [part for part, path in paths.items() if path and not Path(path).exists()]
    row = dict(example_batch(data, raw=missing))
    for part in missing:
        encoder = getattr(model, f"{part}_encoder")
        if encoder.tower is None:
            raise UserError(f"data.{part}_features={paths[part]}: there are no features")
        names = ("waveform", "speech_lengths") if part == "speech" else ("image",)
        tokens = _tokens(encoder, [row.pop(name) for name in names])
        row[f"{part}_tokens"] = np.zeros(tokens.shape, np.float16)
        if part == "speech":
            row["speech_lengths"] = np.full((1,), tokens.shape[1], np.int32)
    return row


def _tokens(encoder: Any, inputs: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """Return the shape of a network's tokens of one row."""

    def run(key: jax.Array) -> jax.Array:
        output = NetworkOutput(*encoder.tower.init_with_output(key, *inputs)[0])
        if encoder.layer == "weighted_sum":
            return jnp.stack(output.hidden, axis=2)
        return output.tokens

    return jax.eval_shape(run, jax.random.key(0))


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _measure(
    experiment: Experiment, target: Slice, state: C2FTrainState, batch: dict, traced: Any
) -> Plan:
    """Compile, and read the figures off the compiled program."""
    began = time.perf_counter()
    moved, collectives = 0.0, list[Collective]()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = _refused_bytes(str(error))
        if used is None:
            raise
        temporaries = None
    else:
        stats = compiled.memory_analysis()
        # The peak counts what is live at one moment; sums of all buffers refuse what compiles.
        used = stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
        kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        temporaries = used - kept
        text = compiled.as_text()
        moved = count_moved(text, bytes_accessed(compiled))
        collectives = find_collectives(text, len(target.devices))
    seconds = time.perf_counter() - began

    # What the state and the batch take as they are written; a chip has one copy of the state for
    # each of its devices, and its share of the batch.
    chip = target.chip
    memory = {
        "parameters": _bytes((state.params, state.frozen)),
        "momentum": _bytes(state.momentum_params),
        "optimizer": _bytes(state.opt_state),
        "queues": _bytes((state.queue, state.token_queue)),
        "batch": _bytes(batch) / len(target.devices),
    }
    if temporaries is not None:
        memory["temporaries"] = temporaries
    operations = count_operations(traced.jaxpr).times(chip.devices)
    sent = chip.devices * sum(collective.sent for collective in collectives)
    return Plan(
        topology=target.name,
        chips=target.chips,
        batch_size=experiment.batch_size,
        steps=experiment.steps,
        memory={name: chip.devices * size for name, size in memory.items()},
        used=chip.devices * used,
        capacity=chip.memory,
        operations=operations,
        moved=chip.devices * moved,
        sent=sent,
        collectives=collectives,
        compute_seconds=operations.bfloat16_flops / chip.flops,
        memory_seconds=chip.devices * moved / chip.memory_bandwidth,
        network_seconds=sent / target.interconnect,
        compile_seconds=seconds,
    )


def _refused_bytes(message: str) -> float | None:
    """Return the bytes that a program would take, if the TPU compiler refused it for them."""
    match = _OUT_OF_MEMORY.search(message)
    if match is None or not message.startswith("RESOURCE_EXHAUSTED"):
        return None
    return float(match[1]) * _UNITS[match[2].upper()]


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
