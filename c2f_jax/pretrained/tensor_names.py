"""Where each parameter of a network is in a published file, and the conversion of its tensors."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from c2f_jax.errors import UserError

# Paths of our transformer blocks; the number of the block is the first group.
BLOCK = r"transformer/block_(\d+)"
SHOWN_PROBLEMS = 40
# Weight normalization in two versions of PyTorch: names of the length g and of the direction v.
WEIGHT_NORM_NAMES = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)

Rules = tuple[tuple[str, str], ...]
Attributes = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """What the files of one published model hold.

    Attributes:
      tensors: name -> array, as published.
      prefix: what comes before the layout's names in these files.
      config: config.json; {} if the publisher has none (fairseq, LAVIS).
      processor: preprocessor_config.json; {} if there is none.
      settings: what a fairseq checkpoint says about its training, else {}.
      normalize: what the user says about waveform normalization, if the files do not.
    """

    tensors: Mapping[str, np.ndarray]
    prefix: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    normalize: bool | None = None


@dataclass(frozen=True)
class Layout:
    r"""How one publisher stores the networks of one family.

    Attributes:
      name: what the card calls it.
      anchor: a tensor that every such file holds; what comes before it in its name is the prefix
        of all names.
      rules: (regular expression over a parameter's path, replacement) in order. The first match
        whose tensor is in the file counts, because names have changed between versions. In a
        replacement, ``\LEAF`` becomes "weight" or "bias", an ending "#0", "#1" or "#2" takes that
        third of the first axis, and an ending "?" gives zeros if the tensor is missing.
      describe: Published -> (attributes for ``create_tower``, preprocessing for the card).
      unused: regular expressions of tensors in the same files that the network does not need.
      required: regular expression that some name must match, "" for none.
      excluded: regular expression that no name may match, "" for none.
      needs_config: whether ``describe`` reads config.json.
      takes_normalize: whether its networks may normalize waveforms.
    """

    name: str
    anchor: str
    rules: Rules
    describe: Callable[[Published], tuple[Attributes, Attributes]]
    unused: tuple[str, ...] = ()
    required: str = ""
    excluded: str = ""
    needs_config: bool = True
    takes_normalize: bool = False

    def prefix(self, names: Collection[str]) -> str | None:
        """Return the prefix of this layout's names, or None if ``names`` are of another."""
        if self.required and not _any_matches(self.required, names):
            return None
        if self.excluded and _any_matches(self.excluded, names):
            return None

        # The shortest prefix: a model may contain several networks with such a tensor.
        found = [n for n in names if n == self.anchor or n.endswith(f".{self.anchor}")]
        if not found:
            return None
        return min(found, key=len).removesuffix(self.anchor)


def attention_rules(
    path: str,
    source: str,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "out_proj"),
    key_bias: bool = True,
) -> Rules:
    """Return the rules of an attention module whose four linear maps are separate tensors.

    Args:
      path: regular expression of the module's path among our parameters.
      source: the module's published name.
      names: published names of query, key, value and output, below ``source``.
      key_bias: whether keys have a bias; without one it becomes zeros.
    """
    query, key, value, out = (f"{source}.{name}" for name in names)
    key_bias_source = f"{key}.bias" if key_bias else f"{key}.bias?"
    return (
        (f"{path}/query/(.*)", rf"{query}.\LEAF"),
        (f"{path}/key/bias", key_bias_source),
        (f"{path}/key/(.*)", rf"{key}.\LEAF"),
        (f"{path}/value/(.*)", rf"{value}.\LEAF"),
        (f"{path}/out/(.*)", rf"{out}.\LEAF"),
    )


def fused_attention_rules(path: str, source: str, out: str) -> Rules:
    """Return the rules of an attention module with query, key and value in one tensor.

    Args:
      path: regular expression of the module's path among our parameters.
      source: the fused tensor's published name without "weight" or "bias".
      out: the published name of the output map.
    """
    return (
        (f"{path}/query/(kernel|bias)", rf"{source}\LEAF#0"),
        (f"{path}/key/(kernel|bias)", rf"{source}\LEAF#1"),
        (f"{path}/value/(kernel|bias)", rf"{source}\LEAF#2"),
        *module_rules((f"{path}/out", out)),
    )


def module_rules(*pairs: tuple[str, str]) -> Rules:
    """Return the rules of modules with a weight and a bias, from (path, published name) pairs."""
    return tuple((f"{path}/([^/]*)", rf"{source}.\LEAF") for path, source in pairs)


def block_rules(path: str, source: str, norms: tuple[str, str], mlp: tuple[str, str]) -> Rules:
    """Return the rules of a transformer block's norms and MLP.

    Args:
      path: regular expression of the block's path among our parameters.
      source: the block's published name.
      norms: published names of the norms of attention and MLP, below ``source``.
      mlp: published names of the MLP's two layers, below ``source``.
    """
    return module_rules(
        (f"{path}/self_attention_norm", f"{source}.{norms[0]}"),
        (f"{path}/mlp_norm", f"{source}.{norms[1]}"),
        (f"{path}/mlp_in", f"{source}.{mlp[0]}"),
        (f"{path}/mlp_out", f"{source}.{mlp[1]}"),
    )


def convert_tensors(
    layout: Layout, prefix: str, tensors: Mapping[str, np.ndarray], shapes: Any
) -> tuple[Any, list[str]]:
    """Convert published tensors to the parameters of a network.

    Args:
      layout: layout of the file.
      prefix: what comes before the layout's names in the file.
      tensors: name -> array, as published.
      shapes: nested dict of the parameters' shapes (``jax.eval_shape`` of the network's ``init``).

    Returns:
      Nested dict of float32 arrays, and the names of the tensors that the network does not need.

    Raises:
      UserError: lists every missing, unused, misshaped and damaged tensor.
    """
    # All problems are collected, so that one look at the message shows all of them.
    conversion = _Conversion(layout, prefix, _fold_weight_norm(tensors))
    params = jax.tree_util.tree_map_with_path(conversion.parameter, shapes)
    unneeded, unknown = conversion.left_over()
    for name in unknown:
        conversion.problems.append(f"unused: {name} {tuple(np.shape(conversion.tensors[name]))}")
    problems = conversion.problems

    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])
        if len(problems) > SHOWN_PROBLEMS:
            listed += "\n  ..."
        raise UserError(
            f"the file does not hold the {layout.name} that its configuration describes; "
            f"tensors that do not fit: {len(problems)}\n{listed}"
        )
    return params, unneeded


@dataclass
class _Conversion:
    """One file on its way to parameters: what was used of it, and what did not fit."""

    layout: Layout
    prefix: str
    tensors: Mapping[str, np.ndarray]
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def parameter(self, key_path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        """Return one parameter; if it cannot be used, note the problem and return zeros."""
        path = "/".join(entry.key for entry in key_path)
        sources = _sources(self.layout, path)
        found = self._find(sources)
        if found is None:
            if not any(source.optional for source in sources):
                self.problems.append(f"missing: {self.prefix}{sources[0].name} (for {path})")
            return np.zeros(shape.shape, np.float32)

        name, third = found
        value = np.asarray(self.tensors[name]).astype(np.float32)
        bad = value.size - np.count_nonzero(np.isfinite(value))
        # A fused tensor holds three parameters: it is damaged once, not three times.
        if bad and name not in self.used:
            self.problems.append(
                f"damaged: {bad} of the {value.size} entries of {name} are NaN or infinite"
            )
        self.used.add(name)

        # ``np.split`` and ``_arrange`` raise ValueError if the shape is another one.
        try:
            if third is not None:
                value = np.split(value, 3)[third]
            return _arrange(path, value, shape.shape)
        except ValueError:
            self.problems.append(
                f"misshaped: {name} {tuple(value.shape)} does not fit {path} {tuple(shape.shape)}"
            )
            return np.zeros(shape.shape, np.float32)

    def _find(self, sources: "list[_Source]") -> tuple[str, int | None] | None:
        """Return the full name of the first source in the file, and which third of it."""
        for source in sources:
            # Heads have names without the prefix.
            for name in (f"{self.prefix}{source.name}", source.name):
                if name in self.tensors:
                    return name, source.third
        return None

    def left_over(self) -> tuple[list[str], list[str]]:
        """Return the tensors that were not used: those known to be unneeded, and all others."""
        unneeded: list[str] = []
        unknown: list[str] = []
        for name in sorted(set(self.tensors) - self.used):
            bare = name.removeprefix(self.prefix)
            known = any(
                re.fullmatch(pattern, name) or re.fullmatch(pattern, bare)
                for pattern in self.layout.unused
            )
            (unneeded if known else unknown).append(name)
        return unneeded, unknown


@dataclass(frozen=True)
class _Source:
    """A tensor that may hold a parameter; ``name`` is without the prefix, see ``Layout.rules``."""

    name: str
    third: int | None
    optional: bool


def _sources(layout: Layout, path: str) -> list[_Source]:
    """Return the tensors that may hold the parameter of this path, in the order of the rules."""
    # PyTorch calls kernels and scales of norms "weight".
    last = path.rpartition("/")[2].removeprefix("norm_")
    leaf = "weight" if last in ("kernel", "scale") else "bias"

    found = []
    for pattern, replacement in layout.rules:
        match = re.fullmatch(pattern, path)
        if match:
            source = match.expand(replacement.replace(r"\LEAF", leaf))
            name, _, third = source.removesuffix("?").partition("#")
            found.append(_Source(name, int(third) if third else None, source.endswith("?")))

    if not found:
        raise UserError(f"{layout.name} has no parameter {path}")
    return found


def _arrange(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Put a published tensor's axes in our order; ValueError if it does not fit."""
    if not path.endswith("kernel"):
        # Some are published with axes of length 1, and biases of attention not divided into heads.
        published = [n for n in value.shape if n != 1]
        wanted = [n for n in shape if n != 1]
        flat_bias = path.endswith("bias") and published == [value.size]
        if published != wanted and not flat_bias:
            raise ValueError
        return value.reshape(shape)

    if value.ndim == 3:  # convolution: (out, in, time) -> (time, in, out)
        value = value.transpose(2, 1, 0)
        if value.shape != shape:
            raise ValueError
    elif value.ndim == 4:  # convolution: (out, in, row, column) -> (row, column, in, out)
        value = value.transpose(2, 3, 1, 0)
        # Patches are embedded by a linear map: (row column in, out).
        if len(shape) == 2:
            value = value.reshape(-1, value.shape[-1])
        if value.shape != shape:
            raise ValueError
    elif value.ndim == 2:  # (out, in) -> (in, out)
        # The output map of attention takes (heads, width of a head), the others one axis.
        inputs = int(np.prod(shape[:-1])) if path.endswith("/out/kernel") else shape[0]
        if value.shape[1] != inputs:
            raise ValueError
        value = value.T
    return np.ascontiguousarray(value.reshape(shape))


def _fold_weight_norm(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replace each pair g, v by w = g v / |v|, the norm over the axes where g has length 1."""
    folded = dict(tensors)
    for g_name, v_name in WEIGHT_NORM_NAMES:
        for name in tensors:
            base = name.removesuffix(g_name)
            if not name.endswith(f".{g_name}") or base + v_name not in tensors:
                continue
            # In float64, so that the rounding is that of the result alone.
            g = np.asarray(folded.pop(name)).astype(np.float64)
            v = np.asarray(folded.pop(base + v_name)).astype(np.float64)
            axes = tuple(axis for axis in range(v.ndim) if g.shape[axis] == 1)
            norm = np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
            folded[f"{base}weight"] = (g * v / norm).astype(np.float32)
    return folded


def _any_matches(pattern: str, names: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)
