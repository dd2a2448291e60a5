"""AdamW or Muon with warm-up and cosine decay; no weight decay on biases, norms, [CLS], positions and tau."""

from dataclasses import dataclass

import jax
import optax

from c2f_jax.errors import UserError

OPTIMIZERS = ("adamw", "muon")


# Muon's update has the root mean square of a typical AdamW update, so that both take the same learning rates
# (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
_MUON_RMS = 0.2


@dataclass(frozen=True)
class OptimizerConfig:
    """Knobs of the optimiser.

    Attributes:
      name: "adamw"; or "muon" (Jordan et al. 2024), which orthogonalises the updates of kernels and leaves all else to
        Adam, both with Nesterov momentum: encoders that start from nothing need far fewer steps with it.
      learning_rate: peak value.
      warmup_steps: linear warm-up from 0.
      steps: total steps; the cosine ends there at ``final_fraction`` of the peak.
      final_fraction: last learning rate over the peak.
      weight_decay: decoupled, on kernels only.
      b2: second-moment decay of Adam.
      clip_norm: global gradient norm bound.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 1000
    steps: int = 50_000
    final_fraction: float = 0.0
    weight_decay: float = 1e-6
    b2: float = 0.999
    clip_norm: float = 1.0


def learning_rate_schedule(config):
    """step -> learning rate."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        config.warmup_steps,
        max(config.steps, config.warmup_steps + 1),
        config.learning_rate * config.final_fraction,
    )


def decayed(params):
    """Pytree of bool: True for the kernels of dense, attention and convolution layers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] == "kernel", params)


def muon_dimensions(params):
    """Pytree that tells Muon how each kernel is a matrix, input axes by output axes; None leaves a value to Adam.

    Attention's query, key and value kernels are (W, heads, W / heads), its output kernel (heads, W / heads, W),
    convolutions (..., inputs, outputs).
    """

    def dimensions(path, value):
        *_, module, name = "", *_names(path)
        if name != "kernel":
            return None
        first_output = 1 if module in ("query", "key", "value") else value.ndim - 1
        axes = tuple(range(value.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:first_output], axes[first_output:])

    return jax.tree_util.tree_map_with_path(dimensions, params)


def create_optimizer(config):
    """The gradient transformation for ``C2FTrainState``.

    Raises:
      UserError: an unknown name.
    """
    schedule = learning_rate_schedule(config)
    if config.name == "adamw":
        update = optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay, mask=decayed)
    elif config.name == "muon":
        update = optax.contrib.muon(
            schedule,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=_MUON_RMS,
        )
    else:
        raise UserError(f"optimizer.name={config.name!r}: choose one of {', '.join(OPTIMIZERS)}")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _names(path):
    return [getattr(key, "key", None) for key in path]
