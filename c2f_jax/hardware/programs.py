"""What is in a compiled program: operations, bytes and what travels between devices."""

import collections
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.lax import Precision

# bfloat16 passes of a TPU's matrix units for a float32 product.
PASSES = {Precision.DEFAULT: 1, Precision.HIGH: 3, Precision.HIGHEST: 6}

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
    rf"%?(?P<name>\S+) = (?P<shape>.+?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\])")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_BITS = re.compile(r"\d+")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>\S+) \(.*\{$")
_VALUE = re.compile(r"%?(?P<name>\S+) = (?P<shape>.+?) (?P<kind>[\w-]+)\((?P<operands>[^)]*)\)")
_CALLED = re.compile(r"(?P<how>body|to_apply|calls)=%?(?P<name>[\w.-]+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
# What moves no bytes by itself.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of the products and convolutions of a program.

    Attributes:
      flops: additions and multiplications.
      bfloat16_flops: what a TPU's matrix units do for them, in passes of bfloat16.
    """

    flops: float
    bfloat16_flops: float

    def times(self, count: int) -> "Operations":
        """Return the operations of as many runs."""
        return Operations(count * self.flops, count * self.bfloat16_flops)

    def plus(self, other: "Operations") -> "Operations":
        """Return the operations of both."""
        return Operations(self.flops + other.flops, self.bfloat16_flops + other.bfloat16_flops)


def count_operations(jaxpr: Any) -> Operations:
    """Count the products and convolutions of a jaxpr, those of its parts included.

    2 m n k for a product; for a convolution 2 x outputs x inputs of each, without the zeros of a
    dilated input. A scan counts as often as it runs, a branch as its costliest side; a while loop
    counts once. What is written twice with the same inputs, such as a frozen network in the online
    and in the momentum pass, counts once, as XLA computes it; recomputation in the backward pass
    counts. Under ``shard_map`` and ``pmap`` it is the work of one device.

    Args:
      jaxpr: of ``jax.make_jaxpr``.

    Returns:
      The operations.
    """
    counter = _Counter()
    inner, constants = counter.open(jaxpr)
    return counter.run(inner, constants, counter.fresh(len(inner.invars)))[1]


class _Counter:
    """Numbers values: equal operations on equal inputs have equal numbers, and count once."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._fresh = 0

    def _number(self, *key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def fresh(self, count: int) -> list[int]:
        """Return numbers that equal no other."""
        self._fresh += 1
        return [self._number("fresh", self._fresh, i) for i in range(count)]

    def open(self, jaxpr: Any) -> tuple[Any, list[int]]:
        """Return a jaxpr without its constants, and their numbers."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        constants = [self._number("constant", id(x)) for x in getattr(jaxpr, "consts", ())]
        return inner, constants or self.fresh(len(inner.constvars))

    def run(
        self, jaxpr: Any, constants: Sequence[int], inputs: Sequence[int]
    ) -> tuple[list[int], Operations]:
        """Return the numbers of a jaxpr's outputs, and its operations that were not yet counted."""
        names = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

        def read(atom: Any) -> int:
            if hasattr(atom, "val"):
                return self._number("literal", str(atom.val), str(atom.aval))
            return names[atom]

        total = Operations(0.0, 0.0)
        for equation in jaxpr.eqns:
            outputs, operations = self._equation(equation, [read(x) for x in equation.invars])
            total = total.plus(operations)
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars], total

    def _equation(self, equation: Any, inputs: list[int]) -> tuple[list[int], Operations]:
        name, params = equation.primitive.name, equation.params
        parts = [self.open(part) for part in _inner(params)]
        if not parts:
            key = (name, str(params), *inputs)
            is_known = key in self._numbers
            self._number(*key)
            outputs = [self._number(key, i) for i in range(len(equation.outvars))]
            return outputs, Operations(0.0, 0.0) if is_known else _operations(equation)

        # A call, whose values are those of its inputs.
        (inner, constants), *others = parts
        is_recomputation = params.get("prevent_cse") and params.get("differentiated")
        is_call = not others and len(inner.invars) == len(inputs) and name not in ("scan", "while")
        if is_call and not is_recomputation:
            return self.run(inner, constants, inputs)

        # A loop, a choice or a recomputation.
        counted = [self.run(x, c, self.fresh(len(x.invars)))[1] for x, c in parts]
        if name == "cond":
            counted = [max(counted, key=lambda part: part.bfloat16_flops)]
        total = functools.reduce(Operations.plus, counted)
        return self.fresh(len(equation.outvars)), total.times(params.get("length", 1))


def _inner(params: dict) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield part


def _operations(equation: Any) -> Operations:
    """Return the operations of an equation without parts."""
    count = {"dot_general": _dot_flops, "conv_general_dilated": _conv_flops}
    if equation.primitive.name not in count:
        return Operations(0.0, 0.0)
    flops = float(count[equation.primitive.name](equation))
    return Operations(flops, flops * _passes(equation))


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    sides = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(sides[i] for i in contracted)


def _conv_flops(equation: Any) -> int:
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    taps = math.prod(kernel[i] for i in numbers.rhs_spec[1:])  # inputs of a group, and space
    outputs = math.prod(equation.outvars[0].aval.shape)
    return 2 * outputs * taps // math.prod(equation.params["lhs_dilation"])


def _passes(equation: Any) -> int:
    if all(np.dtype(variable.aval.dtype).itemsize < 4 for variable in equation.invars):
        return 1
    precision = equation.params["precision"]
    first = precision[0] if isinstance(precision, tuple) else precision
    return PASSES.get(first, 1)


@dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: such as "all-gather".
      size: bytes of its result on a device; of a reduce-scatter, of what it reduces.
      group: devices that take part together.
      count: how many equal ones there are.
    """

    kind: str
    size: int
    group: int
    count: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends on a ring of the group, all equal ones together.

        (g - 1) / g of the whole for a gather or a scatter, twice that for an all-reduce, which is
        one after the other.
        """
        if self.kind == "collective-permute":
            return self.count * self.size
        times = 2 if self.kind == "all-reduce" else 1
        return self.count * self.size * times * (self.group - 1) / self.group


def find_collectives(text: str, devices: int) -> list[Collective]:
    """Return the exchanges of a compiled program, the largest first.

    The TPU compiler spreads an asynchronous exchange over several fusions, which share its
    chain_id; each is counted once.

    Args:
      text: optimized HLO.
      devices: number of devices that the program runs on.
    """
    found = {}
    computations = _computations(text)
    times = _times(computations)
    for computation, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.search(line)
            if match is None:
                continue
            chain = _CHAIN.search(line)
            key = (match["kind"], "chain", chain[1]) if chain else ("", "name", match["name"])
            group = _group_size(line, devices)
            count = times.get(computation, 1)  # 1 in what an asynchronous exchange calls
            found[key] = Collective(match["kind"], _result_bytes(match, group), group), count
    counts: collections.Counter = collections.Counter()
    for collective, count in found.values():
        counts[collective] += count
    merged = [Collective(c.kind, c.size, c.group, count) for c, count in counts.items()]
    return sorted(merged, key=lambda c: -c.sent)


def bytes_accessed(compiled: Any) -> float:
    """Return the bytes to and from memory of a compiled program, loops counted once.

    Args:
      compiled: what ``lower().compile()`` returns.
    """
    costs = compiled.cost_analysis()
    if costs is None:  # for a GPU that is not here; XLA's own analysis needs any client
        from jaxlib import _jax

        (module,) = compiled.runtime_executable().hlo_modules()
        costs = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    return costs["bytes accessed"]


def count_moved(text: str, once: float) -> float:
    """Return the bytes to and from memory, loops included.

    Compilers count what is in a loop once. Their figure is scaled by the operands and results of
    all instructions, counted as often as they run and once.

    Args:
      text: optimized HLO.
      once: "bytes accessed" of the cost analysis.
    """
    computations = _computations(text)
    all_runs = one_run = 0
    for name, times in _times(computations).items():
        size = _operand_bytes(computations[name], times)
        all_runs += times * size
        one_run += size
    return once * all_runs / one_run if one_run else once


def _computations(text: str) -> dict[str, list[str]]:
    """Return the instructions of each computation, the entry first."""
    entry, lines = "", list[str]()
    found = {entry: lines}
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match is not None:
            lines = found.setdefault(match["name"], [])
            entry = match["name"] if match["entry"] else entry
        elif " = " in line:
            lines.append(line)
    return {entry: found[entry], **found}


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """Return how often each computation runs that the entry or a loop calls; fusions excepted."""
    times: collections.Counter = collections.Counter({next(iter(computations)): 1})
    waiting = list(times)
    while waiting:
        name = waiting.pop()
        for line in computations[name]:
            value = _VALUE.search(line)
            if value is None or value["kind"] not in ("while", "call"):
                continue
            trips = _trips(line, computations) if value["kind"] == "while" else 1
            for called in _CALLED.finditer(line):
                if called["name"] in computations:
                    times[called["name"]] += trips * times[name]
                    waiting.append(called["name"])
    return dict(times)


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Return how often a loop runs: the number that its condition compares the counter with."""
    known = _TRIPS.search(line)
    if known is not None:
        return int(known[1])
    condition = _CONDITION.search(line)
    limits = [1]
    for instruction in computations.get(condition[1], ()) if condition else ():
        limits += [int(limit) for limit in _CONSTANT.findall(instruction)]
    return max(limits)


def _operand_bytes(lines: Sequence[str], times: int) -> int:
    """Return the bytes of all operands and results of a computation's instructions.

    A loop reads and writes one part of what is stacked for all its runs.
    """
    values = [match for match in map(_VALUE.search, lines) if match is not None]
    sizes = {}
    for value in values:
        sizes[value["name"]] = 0
        for dtype, sides in _ARRAY.findall(value["shape"]):
            parts = times if sides.partition(",")[0] == str(times) else 1
            sizes[value["name"]] += _array_bytes(dtype, sides) // parts
    total = 0
    for value in values:
        if value["kind"] not in _FREE:
            operands = (word.strip().lstrip("%") for word in value["operands"].split(","))
            total += sizes[value["name"]] + sum(sizes.get(name, 0) for name in operands)
    return total


def _result_bytes(match: re.Match, group: int) -> int:
    arrays = [_array_bytes(*array) for array in _ARRAY.findall(match["shape"])]
    if match["start"] and match["kind"] != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # the operands come before the results
    return sum(arrays) * (group if match["kind"] == "reduce-scatter" else 1)


def _array_bytes(dtype: str, sides: str) -> int:
    bits = _BITS.search(dtype)
    size = max(int(bits[0]) // 8, 1) if bits else 1  # pred
    return size * math.prod(int(side) for side in sides.split(",") if side)


def _group_size(line: str, devices: int) -> int:
    match = _GROUPS.search(line)
    if match is None:
        return devices
    return int(match[3]) if match[3] else len(match[1].split(","))
