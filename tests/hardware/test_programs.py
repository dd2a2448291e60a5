"""Operations counted by hand and by XLA; exchanges of real compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from c2f_jax.hardware.programs import (
    Collective,
    bytes_accessed,
    count_moved,
    count_operations,
    find_collectives,
)

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
PRODUCT = 2 * 3 * 5 * 7


def operations(function, *arguments):
    return count_operations(jax.make_jaxpr(function)(*arguments))


def convolve(x, kernel, **options):
    """x (n, H, W, C), kernel (h, w, C / groups, D)."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(0, 0)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


@pytest.mark.parametrize(
    "function, arguments, expected",
    [
        (jnp.matmul, (A, B), PRODUCT),
        (jax.jit(jnp.matmul), (A, B), PRODUCT),
        (jnp.matmul, (jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7))), 4 * PRODUCT),
        (jax.grad(lambda a, b: jnp.sum(a @ b)), (A, B), 2 * PRODUCT),  # a b, and b by the slope
        (jax.checkpoint(jnp.matmul), (A, B), PRODUCT),
        (lambda a, b: jax.lax.map(lambda _: a @ b, jnp.arange(6)), (A, B), 6 * PRODUCT),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: 2 * (a @ b)[:, :7]), (A, B),
         PRODUCT),
        (convolve, (jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 8))), 2 * 2 * 4 * 4 * 8 * 27),
        (functools.partial(convolve, feature_group_count=2),
         (jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 2, 8))), 2 * 2 * 4 * 4 * 8 * 18),
        # Every second input is a zero that dilation put there, in both directions.
        (functools.partial(convolve, lhs_dilation=(2, 2)),
         (jnp.ones((1, 5, 5, 1)), jnp.ones((2, 2, 1, 1))), 2 * 8 * 8 * 4 // 4),
    ],
)  # fmt: skip
def test_products_and_convolutions(function, arguments, expected):
    assert operations(function, *arguments).flops == expected


def test_equal_work_counts_once_and_recomputation_again():
    assert operations(lambda a, b: a @ b + jax.jit(jnp.matmul)(a, b), A, B).flops == PRODUCT
    assert operations(lambda a, b: a @ b + (2 * a) @ b, A, B).flops == 2 * PRODUCT
    grad = jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b)), argnums=(0, 1))
    assert operations(grad, A, B).flops == 3 * PRODUCT

    # The backward pass of a checkpoint takes the product again.
    layer = lambda a, b: jnp.sum(jnp.sin(jnp.sin(a) @ b) ** 2)  # noqa: E731
    plain = operations(jax.grad(layer, argnums=(0, 1)), A, B).flops
    again = operations(jax.grad(jax.checkpoint(layer), argnums=(0, 1)), A, B).flops
    assert (plain, again) == (3 * PRODUCT, 4 * PRODUCT)
    # Without a backward pass a checkpoint is what it wraps.
    twice = operations(lambda a, b: layer(a, b) + jax.checkpoint(layer)(a, b), A, B).flops
    assert twice == PRODUCT

    # A scan multiplies a slice of its input, which is not its input.
    def scanned(a, b):
        return jax.lax.scan(lambda c, x: (c + x @ b, x @ b), jnp.zeros((3, 7)), a)[1]

    assert operations(scanned, jnp.ones((4, 3, 5)), B).flops == 4 * PRODUCT


def test_passes_of_a_tpu():
    count = lambda **options: operations(functools.partial(jnp.matmul, **options), A, B)  # noqa: E731
    assert count().bfloat16_flops == PRODUCT
    assert count(precision="high").bfloat16_flops == 3 * PRODUCT
    assert count(precision="highest").bfloat16_flops == 6 * PRODUCT
    with jax.default_matmul_precision("highest"):
        assert count().bfloat16_flops == 6 * PRODUCT
    both = [x.astype("bfloat16") for x in (A, B)]
    assert operations(functools.partial(jnp.matmul, precision="highest"), *both).bfloat16_flops == (
        PRODUCT
    )


def test_the_count_is_xlas():
    def loss(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return jnp.sum(x**2)

    weights, x = [jnp.ones((64, 64))] * 3, jnp.ones((256, 64))
    counted = operations(jax.grad(loss), weights, x).flops
    compiled = jax.jit(jax.grad(loss)).lower(weights, x).compile()
    # XLA counts additions and tanh too.
    assert counted == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


def exchanges(function, shape, out, names=("a", "b"), sides=(2, 2)):
    """The exchanges of a function under shard_map on four devices, as XLA compiles it."""
    mesh = jax.make_mesh(sides, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sides))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(names), out_specs=out, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones(shape)).compile().as_text()
    return find_collectives(text, 4)


BOTH = ("a", "b")


@pytest.mark.parametrize(
    "function, out, kind, size, group",
    [
        (lambda x: jax.lax.psum(x, BOTH), P(), "all-reduce", 2 * 6 * 4, 4),
        (lambda x: jax.lax.psum(x, "b"), P(), "all-reduce", 2 * 6 * 4, 2),
        (lambda x: jax.lax.all_gather(x, BOTH), P(), "all-gather", 8 * 6 * 4, 4),
        (lambda x: jax.lax.all_gather(x, "a"), P(), "all-gather", 4 * 6 * 4, 2),
        (lambda x: jax.lax.psum_scatter(x.T, "a", tiled=True), P("a"), "reduce-scatter", 2 * 6 * 4,
         2),
        (lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), P(BOTH), "collective-permute",
         2 * 6 * 4, 4),
    ],
)  # fmt: skip
def test_exchanges_of_compiled_programs(function, out, kind, size, group):
    (found,) = exchanges(function, (8, 6), out)
    assert (found.kind, found.size, found.count) == (kind, size, 1)
    if kind != "collective-permute":
        assert found.group == group


def test_a_program_without_exchanges_has_none():
    assert exchanges(lambda x: 2 * x, (8, 6), P(BOTH)) == []


def test_exchanges_and_bytes_of_a_loop_count_as_often_as_it_runs():
    def loop(x, weights):
        return jax.lax.scan(lambda x, w: (jax.lax.psum(jnp.tanh(x @ w), BOTH), None), x, weights)[0]

    def flat(x, weights):
        for w in weights:
            x = jax.lax.psum(jnp.tanh(x @ w), BOTH)
        return x

    mesh = jax.make_mesh((2, 2), BOTH, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    moved = []
    for function in (loop, flat):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False
        )
        compiled = jax.jit(mapped).lower(jnp.ones((64, 128)), jnp.ones((8, 128, 128))).compile()
        (found,) = find_collectives(compiled.as_text(), 4)
        assert (found.kind, found.size, found.count) == ("all-reduce", 64 * 128 * 4, 8)
        moved.append(count_moved(compiled.as_text(), bytes_accessed(compiled)))
    assert moved[0] == pytest.approx(moved[1], rel=0.5)


def test_the_parts_of_an_asynchronous_exchange_are_one():
    line = (
        "  %all-gather.{n} = f32[64,256]{{1,0:T(8,128)S(1)}} all-gather(%param_0.{n}), "
        "replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}, "
        'frontend_attributes={{chain_id="{c}"}}'
    )
    text = "\n".join(line.format(n=n, c=c) for n, c in enumerate((0, 0, 0, 1)))
    assert find_collectives(text, 8) == [Collective("all-gather", 64 * 256 * 4, 8, count=2)]
    iota = "%ar = (f32[8]{0}, bf16[4]{0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8]"
    assert find_collectives(iota, 8) == [Collective("all-reduce", 40, 4)]
    start = "%ag = (f32[8]{0}, f32[32]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}"
    assert find_collectives(start, 4) == [Collective("all-gather", 128, 4)]


def test_bytes_sent_on_a_ring():
    assert Collective("all-gather", 400, 4).sent == 300  # three of the four parts pass through
    assert Collective("reduce-scatter", 400, 4).sent == 300
    assert Collective("all-reduce", 400, 4, count=2).sent == 1200
    assert Collective("collective-permute", 400, 4).sent == 400
    np.testing.assert_allclose(Collective("all-reduce", 1e9, 256).sent, 2e9 * 255 / 256)
