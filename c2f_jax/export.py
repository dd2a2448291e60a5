"""Export a trained model as programs that run without this package's models."""

import dataclasses
import datetime
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from c2f_jax import __version__
from c2f_jax.config.experiment import create_experiment
from c2f_jax.config.files import load_saved_config
from c2f_jax.data.source import MIN_SAMPLES
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError
from c2f_jax.exported.header import HEADER, Array, promised_until, write_header
from c2f_jax.exported.onnx import OPSET, write_onnx
from c2f_jax.exported.programs import PLATFORMS, Program, write_stablehlo
from c2f_jax.inference import TrainedModel
from c2f_jax.models.c2f import C2FModel, Tokens
from c2f_jax.models.published import PublishedEncoder

FORMATS = ("stablehlo", "onnx")
# How each ``data.image_resize`` makes an image square; the names are side and short side.
PREPARATIONS = {
    "square": "cut out the largest center square and resize it to {side} x {side}",
    "squash": "resize the whole image to {side} x {side}",
    "short_side": "resize the short side to {short}, then cut out the center, {side} x {side}",
}


def load_for_export(workdir: str | PathLike[str], step: str, format: str) -> TrainedModel:
    """Load a run, with what can run anywhere in place of what is fast on one platform.

    Attention is XLA's, since cuDNN's kernels are for GPUs alone, and blocks are not recomputed.
    For ONNX everything is computed in float32, as few of its runtimes compute in bfloat16.
    Neither changes the parameters.

    Args:
      workdir: directory of the run.
      step: "best", "latest" or the number of a checkpoint.
      format: "stablehlo" or "onnx".

    Raises:
      UserError: as ``TrainedModel.load``.
    """
    config = load_saved_config(workdir)
    config.model.attention, config.model.remat = "xla", False
    if format == "onnx":
        config.model.dtype = "float32"
    return TrainedModel.load(workdir, step, create_experiment(config))


def export_model(
    model: TrainedModel, folder: str | PathLike[str], format: str = "stablehlo"
) -> dict[str, Any]:
    """Write both encoders and, once it is trained, the matcher.

    Args:
      model: a model of ``load_for_export``.
      folder: local folder; must be empty or not exist.
      format: "stablehlo" for ``c2f_jax.exported.load``, or "onnx".

    Returns:
      The header, as it is in ``export.json``.

    Raises:
      UserError: the folder cannot be written or is not empty, or the model reads a feature cache
        that another tool made.
    """
    target = _empty_folder(folder)
    programs = programs_of(model)
    write = {"stablehlo": write_stablehlo, "onnx": write_onnx}[format]

    # What fails halfway leaves nothing that looks like a model.
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as temporary:
        for program in programs:
            write(program, Path(temporary))
        described = {program.name: (program.inputs, program.outputs) for program in programs}
        header = write_header(Path(temporary), format, described, _facts(model, format))
        for name in (*header["files"], HEADER):  # the header last: it makes an export complete
            Path(temporary, name).replace(target / name)
    return header


def programs_of(model: TrainedModel) -> list[Program]:
    """Return the programs of a model: encode_speech, encode_image and, once SIM is trained, match.

    Raises:
      UserError: an encoder has no network of its own, since it reads the tokens of another tool.
    """
    flax_model, data = model.experiment.model, model.experiment.data
    for part in ("speech", "image"):
        encoder = getattr(flax_model, f"{part}_encoder")
        if isinstance(encoder, PublishedEncoder) and encoder.tower is None:
            raise UserError(
                f"{model.name}: its {part} encoder reads tokens that another tool has made "
                f"(data.{part}_features), and has no network to export: export that tool's network"
            )

    samples, side = round(data.max_seconds * SAMPLE_RATE), data.image_size
    waveform = Array(
        "waveform",
        ("batch", samples),
        "float32",
        f"recordings at {SAMPLE_RATE} Hz, samples of 16 bits over 32768, zeros past the end",
        (-1, 1),
        padded=True,
    )
    lengths = Array("lengths", ("batch",), "int32", "valid samples", (MIN_SAMPLES, samples))
    speech = _program(model, "encode_speech", _encode(flax_model, "speech"), (waveform, lengths))
    image = Array("image", ("batch", side, side, 3), "uint8", _preparation(data), (0, 255))
    encode_image = _program(model, "encode_image", _encode(flax_model, "image"), (image,))
    if not model.has_sim:
        return [speech, encode_image]

    # The matcher takes what the encoders return.
    tokens, token_lengths = speech.outputs[1:]
    longest: Any = tokens.shape[1]
    inputs = (
        dataclasses.replace(tokens, name="speech_tokens", padded=True),
        dataclasses.replace(token_lengths, name="speech_lengths", range=(1, longest)),
        dataclasses.replace(encode_image.outputs[1], name="image_tokens"),
    )
    return [speech, encode_image, _program(model, "match", _match(flax_model), inputs)]


OUTPUTS = {
    "embedding": "L2-normalized: the dot product of speech and image is their cosine",
    "tokens": "token sequence, the summary first",
    "token_lengths": "valid tokens",
    "logits": "no match, match; their difference, match - no match, is the match logit",
}


def _program(
    model: TrainedModel,
    name: str,
    function: Callable[..., tuple[jax.Array, ...]],
    inputs: tuple[Array, ...],
) -> Program:
    """Return a program with its own part of the parameters and a description of its outputs."""
    # As ``C2FModel`` names its parts: speech_encoder, speech_projection, ...
    part = {"encode_speech": "speech_", "encode_image": "image_", "match": "multimodal_"}[name]
    params = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        if key.startswith(part):
            params[key] = np.asarray(leaf)
    program = Program(name, function, params, inputs, ())

    outputs = []
    names = ["logits"] if name == "match" else ["embedding", "tokens", "token_lengths"]
    shapes = jax.eval_shape(function, params, *program.input_specs())
    for output, x in zip(names, shapes, strict=True):
        outputs.append(Array(output, ("batch", *x.shape[1:]), str(x.dtype), OUTPUTS[output]))
    return dataclasses.replace(program, outputs=tuple(outputs))


def _encode(model: C2FModel, part: str) -> Callable[..., tuple[jax.Array, ...]]:
    def encode(params: Mapping[str, jax.Array], *inputs: jax.Array) -> tuple[jax.Array, ...]:
        encoded: Any = model.apply(_variables(params), *inputs, method=f"encode_{part}")
        return tuple(encoded)

    return encode


def _match(model: C2FModel) -> Callable[..., tuple[jax.Array, ...]]:
    def match(
        params: Mapping[str, jax.Array],
        speech_tokens: jax.Array,
        speech_lengths: jax.Array,
        image_tokens: jax.Array,
    ) -> tuple[jax.Array, ...]:
        image_lengths = jnp.full((image_tokens.shape[0],), image_tokens.shape[1], jnp.int32)
        speech, image = Tokens(speech_tokens, speech_lengths), Tokens(image_tokens, image_lengths)
        logits: Any = model.apply(_variables(params), speech, image, method="match")
        return (logits,)

    return match


def _variables(params: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Return parameters, which are named by their paths, as Flax takes them."""
    return {"params": flax.traverse_util.unflatten_dict(dict(params), sep="/")}


def _facts(model: TrainedModel, format: str) -> dict[str, Any]:
    """Return what the header says besides programs and files."""
    data, today = model.experiment.data, datetime.date.today()
    packages = ["jax", "jaxlib"] + ["jax2onnx"] * (format == "onnx")
    facts: dict[str, Any] = {
        "exported": today.isoformat(),
        "versions": {"c2f_jax": __version__}
        | {name: importlib.metadata.version(name) for name in packages},
    }
    if format == "onnx":
        facts["opset"] = OPSET
    else:
        facts["promised_until"] = promised_until(today).isoformat()
        facts["platforms"] = list(PLATFORMS)
    return facts | {
        "model": {
            "run": Path(model.workdir).name,
            "step": model.step,
            "fingerprint": model.fingerprint,
            "has_sim": model.has_sim,
            "tau": model.tau,
        },
        "audio": {
            "sample_rate": SAMPLE_RATE,
            "max_seconds": data.max_seconds,
            "samples": round(data.max_seconds * SAMPLE_RATE),
            "min_samples": MIN_SAMPLES,
        },
        "image": {
            "side": data.image_size,
            "resize": data.image_resize,
            "resize_side": data.image_resize_side,
            "preparation": _preparation(data),
        },
    }


def _preparation(data: Any) -> str:
    """Return how an image must be prepared, in words."""
    how = PREPARATIONS[data.image_resize].format(
        side=data.image_size, short=data.image_resize_side or data.image_size
    )
    return f"RGB, upright as EXIF says; {how}, bicubic with antialiasing"


def _empty_folder(folder: str | PathLike[str]) -> Path:
    """Make a folder; raise UserError unless it is new or empty."""
    if "://" in str(folder):
        raise UserError(f"--output={folder}: give a local folder, and copy it when it is complete")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        content = sorted(path.iterdir())
    except OSError as error:
        raise UserError(
            f"--output={folder} cannot be written ({error}): give another folder"
        ) from error
    if content:
        raise UserError(
            f"--output={folder} holds {content[0].name}: give an empty folder, or a new one"
        )
    return path
