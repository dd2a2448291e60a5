"""Load an exported model and run it, with jax and numpy alone."""

import datetime
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.typing import ArrayLike

from c2f_jax.errors import UserError
from c2f_jax.exported.header import EXPORT_AGAIN, read_header
from c2f_jax.exported.programs import PARAMETERS_SUFFIX, PROGRAM_SUFFIX


class Encoded(NamedTuple):
    """Encoded recordings or images, with the fields of ``models.c2f.Encoded``.

    Attributes:
      embedding: (b, D) float32, L2-normalized: the dot product of two is their cosine.
      tokens: (b, T, W), the token sequence, for ``ExportedModel.match``.
      lengths: (b,) int32 valid tokens.
    """

    embedding: jax.Array
    tokens: jax.Array
    lengths: jax.Array


@dataclass(frozen=True, repr=False)
class ExportedModel:
    """A trained model that was exported.

    Each number of rows is compiled when it first comes.

    Attributes:
      header: the content of ``export.json``: what the inputs are and how to prepare them.
      programs: name -> function of its inputs, with the parameters in it.
    """

    header: Mapping[str, Any]
    programs: Mapping[str, Callable[..., tuple[jax.Array, ...]]]

    @property
    def tau(self) -> float:
        """The learned temperature: cosine / tau + match logit orders candidates."""
        return self.header["model"]["tau"]

    def encode_speech(self, waveform: ArrayLike, lengths: ArrayLike) -> Encoded:
        """Encode recordings.

        Args:
          waveform: (b, S) float32 at 16 kHz, -1 to 1, zeros past the end of each; S is at most
            ``header["audio"]["samples"]``.
          lengths: (b,) valid samples, at least ``header["audio"]["min_samples"]``.

        Raises:
          UserError: an input has another shape or type, or a length is out of range.
        """
        return Encoded(*self._run("encode_speech", waveform, lengths))

    def encode_image(self, image: ArrayLike) -> Encoded:
        """Encode images.

        Args:
          image: (b, side, side, 3) uint8, prepared as ``header["image"]`` says.

        Raises:
          UserError: an input has another shape or type.
        """
        return Encoded(*self._run("encode_image", image))

    def match(
        self, speech_tokens: ArrayLike, speech_lengths: ArrayLike, image_tokens: ArrayLike
    ) -> jax.Array:
        """Match pairs by SIM.

        Args:
          speech_tokens: (b, T, W) of ``encode_speech``; T may be cut to the longest recording.
          speech_lengths: (b,) valid tokens.
          image_tokens: (b, P, W) of ``encode_image``.

        Returns:
          (b, 2) float32 logits, [no match, match].

        Raises:
          UserError: an input has another shape or type, a length is out of range, or SIM was not
            trained yet at the exported step.
        """
        return self._run("match", speech_tokens, speech_lengths, image_tokens)[0]

    def _run(self, name: str, *given: ArrayLike) -> tuple[jax.Array, ...]:
        """Check and pad the inputs of a program, then run it."""
        if name not in self.programs:
            raise UserError(
                f"{name}: SIM was not trained at step {self.header['model']['step']}, which was "
                "exported: rank by the cosine of the embeddings, or export a later step"
            )
        arrays = []
        for about, value in zip(self.header["programs"][name]["inputs"], given, strict=True):
            arrays.append(_checked(f"{name}: {about['name']}", value, about))
        rows = [len(array) for array in arrays]
        if len(set(rows)) > 1 or not rows[0]:
            raise UserError(f"{name}: the inputs have {rows} rows: give equally many, at least one")
        # Speech and its lengths.
        if len(given) > 1 and np.max(np.asarray(arrays[1])) > np.shape(given[0])[1]:
            raise UserError(f"{name}: a length exceeds the {np.shape(given[0])[1]} that are given")
        return self.programs[name](*arrays)

    def __repr__(self) -> str:
        model = self.header["model"]
        return f"ExportedModel({model['run']}@{model['step']}: {', '.join(self.programs)})"


def load(folder: str | PathLike[str]) -> ExportedModel:
    """Load what ``c2f export`` has written, onto the default device.

    jax promises to run an export with a jaxlib that was built up to 6 months after the one that
    exported it. When another jaxlib reads it after that, a warning says so.

    Args:
      folder: local folder of ``c2f export --format=stablehlo``.

    Raises:
      UserError: a file is missing, damaged or cannot be read by this jax, or the programs are for
        other platforms than this process runs on.

    Reference:
      https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
    """
    folder = Path(folder)
    header = read_header(folder, "stablehlo")
    written, here = header["versions"]["jaxlib"], jaxlib.version.__version__
    about = f"{folder} was exported on {header['exported']} with jaxlib {written}"
    until = header["promised_until"]
    if here != written and datetime.date.today() > datetime.date.fromisoformat(until):
        warnings.warn(
            f"{about}, which promises that a jaxlib built up to {until} reads it; this is jaxlib "
            f"{here}: {EXPORT_AGAIN}",
            stacklevel=2,
        )

    platform, programs = jax.export.default_export_platform(), {}
    for name in header["programs"]:
        content = bytearray((folder / f"{name}{PROGRAM_SUFFIX}").read_bytes())
        try:
            exported = jax.export.deserialize(content)
            exported.mlir_module()  # else it would be read at the first call
        except Exception as error:  # of flatbuffers, of MLIR and of jax
            raise UserError(
                f"{about}, and jaxlib {here} cannot read it ({error}): {EXPORT_AGAIN}"
            ) from error
        if platform not in exported.platforms:
            raise UserError(
                f"{folder} holds programs for {', '.join(exported.platforms)}, and this process "
                f"runs on {platform}: set JAX_PLATFORMS to one of them"
            )
        with np.load(folder / f"{name}{PARAMETERS_SUFFIX}", allow_pickle=False) as stored:
            params = {key: jnp.asarray(stored[key]) for key in stored.files}
        programs[name] = _with_params(exported, params)
    return ExportedModel(header, programs)


def _with_params(
    exported: jax.export.Exported, params: Mapping[str, jax.Array]
) -> Callable[..., tuple[jax.Array, ...]]:
    """Return the function of the inputs alone."""
    compiled = jax.jit(exported.call)
    return lambda *inputs: compiled(params, *inputs)


def _checked(name: str, value: ArrayLike, about: Mapping[str, Any]) -> jax.Array | np.ndarray:
    """Return an input as its program takes it.

    Args:
      name: what error messages call it.
      value: the input.
      about: its entry in the header.

    Raises:
      UserError: it has another shape or type, or a length is out of range.
    """
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    sizes, wanted = tuple(about["shape"][1:]), jnp.dtype(about["dtype"])

    # Floats of 64 bits may lose some; bytes are not made of other numbers, which would wrap around.
    kind = jnp.floating if jnp.issubdtype(wanted, jnp.floating) else jnp.signedinteger
    is_kind = array.dtype == wanted or (
        jnp.issubdtype(array.dtype, kind) and jnp.issubdtype(wanted, kind)
    )
    fits = is_kind and array.ndim == 1 + len(sizes) and array.shape[2:] == sizes[1:]
    padding = sizes[0] - array.shape[1] if fits and sizes else 0
    if not fits or padding < 0 or (padding and not about["padded"]):
        shape = ", ".join(map(str, about["shape"]))
        raise UserError(
            f"{name} must be {wanted} ({shape}), {about['meaning']}; "
            f"got {array.dtype} {tuple(array.shape)}"
        )
    if not sizes and about["range"]:
        least, most = about["range"]
        values = np.asarray(array)
        if np.any((values < least) | (values > most)):
            raise UserError(f"{name} must be from {least} to {most}; got {values.tolist()}")

    # On the host for arrays of the host: a new length would be a new program on the device.
    if padding:
        pad: Any = jnp.pad if isinstance(array, jax.Array) else np.pad
        array = pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
    return array.astype(wanted)
