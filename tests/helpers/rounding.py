"""Rounding, measured on the machine that the tests run on: how far apart two float32 runs of one
computation may be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = np.finfo(np.float32).eps
RUNS, FACTOR = 4, 16


def rounding_ratios(compute, inputs, found):
    """How far each array of ``found`` is from ``compute(*inputs)``, in units of what rounding
    explains; 1 is the limit.

    A float32 computation gives the exact result of inputs that differ from the given ones in their
    last bits, whatever the processor and the order of its sums. So rounding moves an array about as
    far as redrawing the last bit of every input does. The limit is FACTOR times the largest such
    change in RUNS draws, plus FACTOR last bits of the array's largest entry.

    Integers must be equal. bfloat16 arrays were rounded from float32: neighboring bfloat16 values
    count as equal.

    Args:
      compute: a function of ``inputs`` whose result is a tree of arrays.
      inputs: trees of arrays.
      found: a tree like the result.

    Returns:
      path in the tree -> ratio; infinite where nothing may differ and something does.
    """
    expected = _by_path(compute(*inputs))
    found = _by_path(found)
    assert found.keys() == expected.keys()

    spread = dict.fromkeys(expected, 0.0)
    for run in range(RUNS):
        generator = np.random.default_rng(run)
        redrawn = jax.tree.map(functools.partial(_redraw_last_bits, generator), inputs)
        for name, value in _by_path(compute(*redrawn)).items():
            spread[name] = np.maximum(spread[name], _distance(value, expected[name]))

    ratios = {}
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        distance = _distance(found[name], value)
        limit = 0.0
        if jnp.issubdtype(value.dtype, jnp.floating):
            largest = np.abs(value.astype(np.float64)).max(initial=0.0)
            limit = FACTOR * (spread[name] + EPSILON * largest)
        ratios[name] = 0.0 if distance == 0 else np.divide(distance, limit) if limit else np.inf
    return ratios


def assert_equal_but_for_rounding(compute, inputs, found):
    """Assert that ``found`` is ``compute(*inputs)``, perhaps summed in another order."""
    ratios = rounding_ratios(compute, inputs, found)
    outside = {
        name: ratio for name, ratio in ratios.items() if not ratio <= 1
    }  # also where it is not a number
    assert not outside, f"differences in units of the largest that rounding explains: {outside}"


def _by_path(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _redraw_last_bits(generator, x):
    """The array times 1 + u eps, u uniform in [-1, 1]; arrays of other types than float32 as they
    are."""
    x = np.asarray(x)
    if x.dtype != np.float32:
        return x
    return (x * (1 + EPSILON * generator.uniform(-1, 1, x.shape))).astype(np.float32)


def _distance(a, b):
    """The largest difference of two arrays, in float64; of bfloat16, what it exceeds a step to the
    next value by."""
    one_step = 2.0**-7 if a.dtype == jnp.bfloat16 else 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    difference = np.maximum(np.abs(a - b) - one_step * np.maximum(np.abs(a), np.abs(b)), 0.0)
    return difference.max(initial=0.0)
