"""Nested dicts of parameters: split, merged, the part with a momentum copy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

WITHOUT_MOMENTUM = ("multimodal_encoder", "temperature")


def clip_temperature(params: Mapping[str, Any], minimum: float, maximum: float) -> dict[str, Any]:
    """Return the parameters with tau kept in [minimum, maximum]."""
    log_tau = jnp.clip(params["temperature"]["log_tau"], jnp.log(minimum), jnp.log(maximum))
    return {**params, "temperature": {"log_tau": log_tau}}


def momentum_subset(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with a momentum copy: both encoders and projections, not tau or SIM."""
    return {name: value for name, value in params.items() if name not in WITHOUT_MOMENTUM}


def split_params(
    params: Mapping[str, Any], paths: Sequence[tuple[str, ...]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split nested dicts of parameters.

    Args:
      params: nested dict.
      paths: paths of parameters or of whole parts.

    Returns:
      The parameters below none of the paths, and those below one.

    >>> split_params({"a": {"b": 1, "c": 2}, "d": 3}, [("a", "b")])
    ({'a': {'c': 2}, 'd': 3}, {'a': {'b': 1}})
    """
    rest: dict[str, Any] = {}
    taken: dict[str, Any] = {}
    for name, value in params.items():
        below = [path[1:] for path in paths if path[0] == name]
        if () in below:
            taken[name] = value
        elif below:
            kept, found = split_params(value, below)
            # Optax and Orbax would take an empty dict for a part of the tree.
            if kept:
                rest[name] = kept
            if found:
                taken[name] = found
        else:
            rest[name] = value
    return rest, taken


def merge_params(params: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested dicts of parameters, as before ``split_params``.

    Args:
      params: nested dict.
      others: nested dict; counts where both have a leaf.

    >>> merge_params({"a": {"c": 2}, "d": 3}, {"a": {"b": 1}})
    {'a': {'c': 2, 'b': 1}, 'd': 3}
    """
    merged = dict(params)
    for name, value in others.items():
        if name in params and isinstance(value, dict):
            merged[name] = merge_params(params[name], value)
        else:
            merged[name] = value
    return merged
