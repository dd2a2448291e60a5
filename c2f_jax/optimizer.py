"""AdamW with warm-up and cosine decay; no weight decay on biases, norms, [CLS], positions and tau."""

from dataclasses import dataclass

import jax
import optax


@dataclass(frozen=True)
class OptimizerConfig:
    """Knobs of the optimiser.

    Attributes:
      learning_rate: peak value.
      warmup_steps: linear warm-up from 0.
      steps: total steps; the cosine ends there at ``final_fraction`` of the peak.
      final_fraction: last learning rate over the peak.
      weight_decay: decoupled, on matrices only.
      b2: second-moment decay of Adam.
      clip_norm: global gradient norm bound.
    """

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
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) == "kernel", params)


def create_optimizer(config):
    """The gradient transformation for ``C2FTrainState``."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate_schedule(config), b2=config.b2, weight_decay=config.weight_decay, mask=decayed),
    )
