"""Nested dicts of parameters: split, merged, the part with a momentum copy."""

import jax.numpy as jnp

WITHOUT_MOMENTUM = ("multimodal_encoder", "temperature")


def clip_temperature(params, minimum, maximum):
    """Parameters with tau kept in [minimum, maximum]."""
    log_tau = jnp.clip(params["temperature"]["log_tau"], jnp.log(minimum), jnp.log(maximum))
    return {**params, "temperature": {"log_tau": log_tau}}


def momentum_subset(params):
    """The part of the parameters that has a momentum copy: both encoders and both projections, not tau, not SIM."""
    return {name: value for name, value in params.items() if name not in WITHOUT_MOMENTUM}


def split_params(params, paths):
    """Nested dicts of parameters as (those below none of the paths, those below one).

    >>> split_params({"a": {"b": 1, "c": 2}, "d": 3}, [("a", "b")])
    ({'a': {'c': 2}, 'd': 3}, {'a': {'b': 1}})
    """
    rest, taken = {}, {}
    for name, value in params.items():
        below = [path[1:] for path in paths if path[0] == name]
        if () in below:
            taken[name] = value
        elif below:
            kept, found = split_params(value, below)
            rest |= {name: kept} if kept else {}
            taken |= {name: found} if found else {}
        else:
            rest[name] = value
    return rest, taken


def merge_params(params, others):
    """Nested dicts of parameters in one, as before ``split_params``; ``others`` counts where both have a leaf.

    >>> merge_params({"a": {"c": 2}, "d": 3}, {"a": {"b": 1}})
    {'a': {'c': 2, 'b': 1}, 'd': 3}
    """
    merged = dict(params)
    for name, value in others.items():
        merged[name] = (
            merge_params(params[name], value)
            if name in params and isinstance(value, dict)
            else value
        )
    return merged
