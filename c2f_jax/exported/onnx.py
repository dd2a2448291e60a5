"""Programs as ONNX, by jax2onnx."""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from c2f_jax.errors import UserError
from c2f_jax.exported.programs import Program

OPSET = 21  # older runtimes, in browsers too, read it as well
LARGEST_ERROR = 1e-4  # over the largest output, or over 1


def write_onnx(program: Program, folder: Path) -> None:
    """Write a program for any number of rows, with its parameters.

    jax2onnx converts by replacing functions of jax.numpy and Flax while it traces, and some of
    these replacements know no symbolic number of rows. So the program is traced before, and
    jax2onnx sees its primitives alone. What it has made is compared with the program.

    Args:
      program: the program.
      folder: gets <name>.onnx, and <name>.onnx.data with what takes more than 1 MB.

    Raises:
      UserError: onnxruntime computes something else.
    """
    from jax2onnx import to_onnx

    path = folder / f"{program.name}.onnx"
    specs = program.input_specs()
    traced = jax.make_jaxpr(functools.partial(program.function, dict(program.params)))(*specs)
    to_onnx(
        lambda *inputs: tuple(evaluate(traced.jaxpr, traced.consts, inputs)),
        specs,
        model_name=program.name,
        opset=OPSET,
        return_mode="file",
        output_path=str(path),
        input_names=[array.name for array in program.inputs],
        output_names=[array.name for array in program.outputs],
    )
    data = path.with_name(f"{path.name}.data")
    if data.exists():
        shutil.copymode(path, data)  # onnx lets nobody else read it
    _compare(program, path)


def _compare(program: Program, path: Path) -> None:
    """Compare an ONNX file with its program, on three rows.

    Raises:
      UserError: they differ by more than rounding.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = program.random_inputs(rows=3)
    names = [array.name for array in program.inputs]
    found = session.run(None, dict(zip(names, inputs, strict=True)))
    expected = jax.jit(program.function)(dict(program.params), *inputs)
    for array, ours, theirs in zip(program.outputs, expected, found, strict=True):
        ours = np.asarray(ours, np.float64)
        error = np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max())
        if not error <= LARGEST_ERROR:
            raise UserError(
                f"{path}: {array.name} differs from the model's by {error:.1g} in onnxruntime "
                f"{onnxruntime.__version__}: use --format=stablehlo, and report the encoders and "
                "the version of jax2onnx"
            )


def evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Evaluate a traced program, with what jax2onnx cannot convert in another form.

    Args:
      jaxpr: the program.
      consts: its constants.
      inputs: its inputs, also traced ones.

    Returns:
      Its outputs.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":  # of a choice by platform, which is made below
            values[equation.outvars[0]] = None
            continue
        given = [read(atom) for atom in equation.invars]
        inner = None
        if params.get("branches_platforms"):
            inner, given = _branch_of_tpu(params), given[1:]
        elif name in ("jit", "custom_jvp_call"):
            inner = params["jaxpr" if name == "jit" else "call_jaxpr"]

        if inner is not None:
            results = evaluate(inner.jaxpr, inner.consts, given)
        else:
            results = _apply(equation, given)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _branch_of_tpu(params: dict[str, Any]) -> core.ClosedJaxpr:
    """Return the branch of ``jax.lax.platform_dependent`` that is for a TPU.

    It has products of matrices where others have Fourier transforms, which few ONNX runtimes have.
    """
    for platforms, branch in zip(params["branches_platforms"], params["branches"], strict=True):
        if platforms is None or "tpu" in platforms:
            return branch
    raise NotImplementedError("a choice by platform without one for TPU")


def _apply(equation: core.JaxprEqn, given: Sequence[Any]) -> list[Any]:
    """Apply a primitive, or what is equal to it where jax2onnx 0.17.1 is in error."""
    name, params = equation.primitive.name, equation.params
    aval: Any = equation.outvars[0].aval
    is_integer = jnp.issubdtype(aval.dtype, jnp.integer)
    if name == "div" and is_integer:
        return [_divide(*given)]
    if name == "rem" and is_integer:
        return [_remainder(*given)]
    widths = params.get("padding_config", ())
    if name == "pad" and all(low >= 0 <= high and not gap for low, high, gap in widths):
        return [_pad(given[0], given[1], widths)]
    results = equation.primitive.bind(*given, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _divide(x: Any, y: Any) -> Any:
    # jax2onnx makes Mean of (a + b) / 2, which ONNX does not have for integers. Both forms round
    # toward zero.
    return jax.lax.neg(jax.lax.div(jax.lax.neg(x), y))


def _remainder(x: Any, y: Any) -> Any:
    # jax2onnx has no remainder for a symbolic number of rows.
    return jax.lax.sub(x, jax.lax.mul(_divide(x, y), y))


def _pad(x: Any, value: Any, widths: Sequence[tuple[int, int, int]]) -> Any:
    # Nor has it padding for one.
    for axis, (low, high, _) in enumerate(widths):

        def filled(size: int, x: Any = x, axis: int = axis) -> Any:
            return jax.lax.broadcast(value, (*x.shape[:axis], size, *x.shape[axis + 1 :]))

        if low or high:
            x = jax.lax.concatenate([filled(low), x, filled(high)], axis)
    return x
