"""Averages are sums and counts: merged, they equal the average of all values."""

import jax
import jax.numpy as jnp
import numpy as np

from c2f_jax.objectives.average import Average


def test_merged_averages_equal_the_average_of_all_valid_values():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=size).astype(np.float32) for size in (1, 5, 8)]
    valid = [rng.random(size) < 0.6 for size in (1, 5, 8)]
    merged = Average.of(values[0], valid[0])
    for value, ok in zip(values[1:], valid[1:], strict=True):
        merged = merged.merge(Average.of(value, ok))
    kept = np.concatenate(values)[np.concatenate(valid)]
    assert int(merged.count) == len(kept)
    np.testing.assert_allclose(merged.compute(), kept.mean(), rtol=1e-6)


def test_invalid_values_count_nothing_even_when_they_are_nan():
    average = Average.of(jnp.array([2.0, jnp.nan]), jnp.array([True, False]))
    assert float(average.compute()) == 2.0
    assert np.isnan(Average.of(jnp.array([2.0]), jnp.array([False])).compute())


def test_averages_are_summed_over_devices_leaf_by_leaf():
    values = jnp.arange(6.0).reshape(2, 3)
    summed = jax.vmap(lambda x: jax.lax.psum(Average.of(x), "d"), axis_name="d")(values)
    assert summed.total.tolist() == [15.0, 15.0] and summed.count.tolist() == [6, 6]


def test_a_scalar_counts_once():
    assert int(Average.of(jnp.float32(3.0)).count) == 1
