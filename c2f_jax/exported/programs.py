"""Programs and how they are written: with ``jax.export``, as StableHLO, or as ONNX."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from c2f_jax.exported.header import Array

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM_SUFFIX, PARAMETERS_SUFFIX = ".jax_export", ".npz"


@dataclass(frozen=True)
class Program:
    """A function of a model, with the parameters that it reads.

    Attributes:
      name: such as "encode_speech".
      function: (params, *inputs) -> tuple of outputs, each with one row for each row of the inputs.
      params: name -> array.
      inputs: what it takes, after the parameters.
      outputs: what it returns.
    """

    name: str
    function: Callable[..., tuple[jax.Array, ...]]
    params: Mapping[str, np.ndarray]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    def input_specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return the shapes and types of the inputs, with a symbolic number of rows."""
        (rows,) = jax.export.symbolic_shape("batch")
        specs = []
        for array in self.inputs:
            shape = tuple(rows if size == "batch" else size for size in array.shape)
            specs.append(jax.ShapeDtypeStruct(shape, np.dtype(array.dtype)))
        return tuple(specs)

    def random_inputs(self, rows: int, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Draw inputs within their ranges, to compare a written program with this one.

        Args:
          rows: number of rows.
          seed: seed of the draws.
        """
        rng, drawn = np.random.default_rng(seed), []
        for array in self.inputs:
            shape: Any = (rows, *array.shape[1:])
            if np.issubdtype(array.dtype, np.integer):
                assert array.range is not None, f"{array.name}: integers need a range"
                least, most = map(int, array.range)
                drawn.append(rng.integers(least, most, shape, array.dtype, endpoint=True))
            else:
                drawn.append(0.1 * rng.standard_normal(shape, np.float32).astype(array.dtype))
        return tuple(drawn)


def write_stablehlo(program: Program, folder: Path) -> None:
    """Write a program for any number of rows, lowered for CPU, CUDA and TPU, and its parameters.

    The parameters are in an .npz file beside the program, not constants in it. Both take the same
    space, but a serialized program is limited to 2 GiB, constants are copied and folded each time a
    shape is compiled, and numpy still reads the parameters when jax no longer reads the program.

    Args:
      program: the program.
      folder: gets <name>.jax_export and <name>.npz.
    """
    params: dict[str, Any] = dict(program.params)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    exported = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)(
        shapes, *program.input_specs()
    )
    (folder / f"{program.name}{PROGRAM_SUFFIX}").write_bytes(exported.serialize())
    np.savez(folder / f"{program.name}{PARAMETERS_SUFFIX}", **params)
