"""Momentum parameters: an exponential moving average of the online ones (momentum distillation, MoCo)."""

import jax


def update_momentum(momentum_params, params, momentum):
    """One step of the moving average: theta' <- m theta' + (1 - m) theta.

    After k steps towards a constant theta, theta' = theta + m^k (theta'_0 - theta).

    Args:
      momentum_params: pytree theta', float32.
      params: pytree theta of the same structure.
      momentum: scalar m in [0, 1].

    Returns:
      The updated theta', each leaf in the type it had.

    Source: He et al. 2020 (MoCo), equation 2; Li et al. 2021 (ALBEF), section 3.2.

    >>> import jax.numpy as jnp
    >>> update_momentum({"w": jnp.array(1.0)}, {"w": jnp.array(0.0)}, 0.75)["w"].item()
    0.75
    """
    return jax.tree.map(
        lambda m, p: (momentum * m + (1.0 - momentum) * p).astype(m.dtype), momentum_params, params
    )
