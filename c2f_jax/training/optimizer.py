"""AdamW or Muon with warm-up and cosine decay.

Weight decay leaves out biases, norms, [CLS], positions and tau.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from c2f_jax.errors import UserError

OPTIMIZERS = ("adamw", "muon")

# Gives Muon's updates the root mean square of AdamW's, so that both take the same learning rates
# (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
_MUON_RMS = 0.2


@dataclass(frozen=True)
class OptimizerConfig:
    """Options of the optimizer.

    Attributes:
      name: "adamw", or "muon" (Jordan et al. 2024). Muon orthogonalizes the updates of kernels and
        leaves all other parameters to Adam, both with Nesterov momentum. Encoders trained from
        scratch need far fewer steps with it.
      learning_rate: peak value.
      warmup_steps: steps over which the learning rate grows from 0 to its peak.
      final_fraction: last learning rate as a fraction of the peak; the cosine ends there.
      weight_decay: decoupled, on kernels only.
      b2: decay of Adam's second moment.
      clip_norm: bound on the norm of the whole gradient.
    """

    name: str = field(default="adamw", metadata={"choices": OPTIMIZERS})
    learning_rate: float = field(default=1e-3, metadata={"above": 0.0})
    warmup_steps: int = field(default=100, metadata={"min": 0})
    final_fraction: float = field(default=0.02, metadata={"min": 0.0, "max": 1.0})
    weight_decay: float = field(default=0.05, metadata={"min": 0.0})
    b2: float = field(default=0.98, metadata={"min": 0.0, "below": 1.0})
    clip_norm: float = field(default=1.0, metadata={"above": 0.0})


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Make the learning rate of each step: linear warm-up, then half a cosine.

    Args:
      config: OptimizerConfig.
      steps: steps of the whole run.

    Returns:
      A function step -> learning rate.
    """
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        config.warmup_steps,
        max(steps, config.warmup_steps + 1),
        config.learning_rate * config.final_fraction,
    )


def decayed(params: Any) -> Any:
    """Mark what weight decay acts on: the kernels of dense, attention and convolution layers.

    Args:
      params: pytree of parameters.

    Returns:
      Pytree of bool, True for kernels.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] == "kernel", params)


def muon_dimensions(params: Any) -> Any:
    """Describe each kernel as a matrix of input axes by output axes; None leaves a value to Adam.

    Args:
      params: pytree of parameters. Attention's query, key and value kernels are
        (W, heads, W / heads), its output kernel (heads, W / heads, W), convolutions
        (..., inputs, outputs).

    Returns:
      Pytree of optax's MuonDimensionNumbers or None.
    """

    def dimensions(path: tuple, value: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        # Muon is for matrices; Adam keeps biases, norms, tokens and tau.
        *_, module, name = "", *_names(path)
        if name != "kernel":
            return None

        # Axes before this one are inputs. Attention splits its outputs into (heads, width).
        first_output = 1 if module in ("query", "key", "value") else value.ndim - 1
        axes = tuple(range(value.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:first_output], axes[first_output:])

    return jax.tree_util.tree_map_with_path(dimensions, params)


def create_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Make the gradient transformation of a run.

    Args:
      config: OptimizerConfig.
      steps: steps of the whole run, at which the cosine ends.

    Returns:
      An optax transformation.

    Raises:
      UserError: unknown name.
    """
    schedule = learning_rate_schedule(config, steps)

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

    # The gradient is clipped before the optimizer sees it.
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _names(path: tuple) -> list[str | None]:
    """Return the dictionary keys of a path in a pytree."""
    return [getattr(key, "key", None) for key in path]
