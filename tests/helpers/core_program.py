"""What the light core must be able to do: run by test_package.py in an environment without
extras."""

import doctest
import importlib
import importlib.util
import pkgutil

import jax
import jax.numpy as jnp
import optax

import c2f_jax
from c2f_jax import MethodConfig, create_model, create_train_state, objectives
from c2f_jax.training.train_step import train_step

EXTRAS = ("clu", "grain", "librosa", "matplotlib", "ml_collections", "tensorflow")


def run_doctests():
    """Run the doctests of all objectives; return how many there were."""
    tried = 0
    for module in pkgutil.iter_modules(objectives.__path__, "c2f_jax.objectives."):
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        tried += result.attempted
    return tried


def take_steps():
    """Take two training steps of a tiny model; return the losses."""
    tiny = {"width": 8, "depth": 1, "heads": 2}
    model = create_model(
        {"name": "tokens"} | tiny, {"name": "tokens"} | tiny, tiny, embedding_dim=4
    )
    optimizer = optax.adam(1e-3)
    batch = {
        "speech_tokens": jax.random.normal(jax.random.key(0), (4, 5, 3)),
        "speech_lengths": jnp.array([5, 4, 3, 2]),
        "image_tokens": jax.random.normal(jax.random.key(1), (4, 2, 3)),
        "image_id": jnp.arange(4),
    }
    state = create_train_state(model, optimizer, batch, seed=0, queue_size=4, token_queue_size=0)
    method = MethodConfig(alpha_ramp_steps=0)
    step = jax.jit(lambda s, b: train_step(s, b, model=model, optimizer=optimizer, method=method))
    first = jax.tree.leaves(state.params)[0]
    for _ in range(2):
        state, metrics = step(state, batch)
    assert int(state.step) == 2 and not jnp.array_equal(first, jax.tree.leaves(state.params)[0])
    return sorted(metrics)


def lacks_an_extra():
    """Return what the package says about a public name that needs an extra."""
    try:
        return c2f_jax.train_and_evaluate
    except ModuleNotFoundError as error:
        return str(error)


if __name__ == "__main__":
    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not present, f"not the light core: {present}"
    assert run_doctests() >= 15
    assert {"sic_loss", "sim_loss"} <= set(take_steps())
    print(lacks_an_extra())
