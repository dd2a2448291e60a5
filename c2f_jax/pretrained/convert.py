"""``c2f convert``: published weights to an Orbax checkpoint and a card, without PyTorch or unpickled code."""

import json
import re
from pathlib import Path

import jax
import numpy as np

from c2f_jax.errors import UserError
from c2f_jax.pretrained.architectures import describe
from c2f_jax.pretrained.names import FAIRSEQ, WAV2VEC2, convert_tensors, find_layout
from c2f_jax.pretrained.tensors import read_tensors, sha256, weight_files
from c2f_jax.pretrained.weights import save_weights, tower_shapes

HUB_FILES = ("*.json", "README.md", "*.safetensors", "pytorch_model*.bin")


def convert(sources, output, *, normalise=None, licence=None):
    """Convert published weights.

    Args:
      sources: local files or folders as published, or one hub id "owner/name". Several are read as one model, such as
        LAVIS's BLIP-2 and its EVA ViT-g, which come in two files.
      output: folder to write.
      normalise: waveform normalisation, where the publisher's files do not say.
      licence: for the card, where there is no README that says.

    Returns:
      The card.

    Raises:
      UserError: files that cannot be read or written, or tensors that are missing, unused, misshaped or damaged,
        all listed.
    """
    if (Path(output) / "params").exists():
        raise UserError(
            f"{output} holds converted weights already: remove it or give another --output"
        )
    card, params = read_published(sources, normalise=normalise, licence=licence)
    try:
        save_weights(output, card, params)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error})") from error
    return card


def read_published(sources, *, normalise=None, licence=None):
    """(card, parameters) of published weights; arguments and errors as in ``convert``."""
    where = [_local(source) for source in sources]
    files = [
        (given, file)
        for given, source in zip(sources, where, strict=True)
        for file in weight_files(source)
    ]
    folder = where[0] if where[0].is_dir() else where[0].parent
    tensors, settings = {}, {}
    for _, file in files:
        found, says = read_tensors(file)
        found = _visual_encoder_names(found)
        both = sorted(tensors.keys() & found.keys())
        if both:
            raise UserError(
                f"{file} holds {both[0]}, which another file given holds too: leave one of them out"
            )
        tensors |= found
        settings |= says
    config, processor = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    try:
        layout, prefix = find_layout(tensors)
        tower, preprocessing = _describe(
            layout, tensors, prefix, config, processor, settings, normalise
        )
        params = convert_tensors(layout, prefix, tensors, tower_shapes(tower, preprocessing))
    except UserError as error:
        raise UserError(f"{', '.join(map(str, where))}: {error}") from error
    card = {
        "layout": layout.name,
        "tower": tower,
        "preprocessing": preprocessing,
        "source": [
            {"given": str(given), "file": f.name, "sha256": sha256(f)} for given, f in files
        ],
        "licence": licence or _licence(folder),
        "parameters": int(sum(np.size(x) for x in jax.tree.leaves(params))),
    }
    return card, params


def _describe(layout, tensors, prefix, config, processor, settings, normalise):
    if normalise is not None and layout not in (FAIRSEQ, WAV2VEC2):
        raise UserError(
            f"--normalise is for wav2vec 2.0, HuBERT and WavLM; {layout.name} takes none"
        )
    try:
        return describe(layout, tensors, prefix, config, processor, settings, normalise)
    except KeyError as error:
        place = "config.json" if config else "the file"
        raise UserError(
            f"{layout.name}: {place} has no {error.args[0]}, which it is published with"
        ) from error


def _local(source):
    """A path as it is; a hub id downloaded into huggingface_hub's cache."""
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{source}: no such path; hub ids need the extra: pip install 'c2f_jax[hub]'"
        ) from error
    try:
        folder = Path(
            snapshot_download(source, allow_patterns=["*.json", "README.md", "*.safetensors"])
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
        return folder
    except Exception as error:  # the client has many errors of its own and of its transport
        raise UserError(
            f"{source}: neither a local path nor a hub id that can be downloaded ({error})"
        ) from error


def _visual_encoder_names(tensors):
    """EVA ViT-g's own file has the names of LAVIS's ``visual_encoder`` without the prefix."""
    if "patch_embed.proj.weight" not in tensors:
        return tensors
    return {f"visual_encoder.{name}": value for name, value in tensors.items()}


def _json(path):
    """The values of a JSON file that are not null; {} where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(
            path.read_text(),
            object_pairs_hook=lambda pairs: {k: v for k, v in pairs if v is not None},
        )
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: values by name are expected, {{...}}; download it again")
    return found


def _licence(folder):
    """The licence field of a README's front matter, as on the hub."""
    readme = folder / "README.md"
    found = readme.exists() and re.search(
        r"\A---\n(?:.*\n)*?license:\s*(\S+)", readme.read_text(errors="replace")
    )
    return found.group(1) if found else "unknown"
