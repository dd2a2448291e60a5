"""Published weights, local or from the hub, as a card and the parameters of our network."""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from c2f_jax.errors import UserError
from c2f_jax.pretrained.families import find_layout
from c2f_jax.pretrained.networks import tower_shapes
from c2f_jax.pretrained.tensor_names import Attributes, Layout, Published, convert_tensors
from c2f_jax.pretrained.tensors import read_tensors, sha256, weight_files

HUB_TEXTS = ("*.json", "README.md")
SAFETENSORS = "*.safetensors"
TORCH_FILES = "pytorch_model*.bin"
# SpeechCLIP's checkpoints hold two networks: the prefixes of fairseq's HuBERT and OpenAI's CLIP.
SPEECHCLIP_PARTS = {"speech": "audio_encoder.encoder.", "image": "clip.model.visual."}


def read_published(
    sources: Sequence[str | Path],
    *,
    part: str | None = None,
    normalize: bool | None = None,
    license: str | None = None,
) -> tuple[dict[str, Any], Any]:
    """Read published weights.

    Args:
      sources: local files or folders as published, or one hub id "owner/name". Several are read as
        one model, such as LAVIS's BLIP-2 and its EVA ViT-g, which come in two files.
      part: "speech" or "image", which network of a checkpoint of SpeechCLIP.
      normalize: whether waveforms are normalized, if the publisher's files do not say.
      license: license for the card, if no README names it.

    Returns:
      The card, a dict, and the parameters, a nested dict of float32 arrays.

    Raises:
      UserError: files that cannot be read, or tensors that are missing, unused, misshaped or
        damaged, all listed.
    """
    local = [_local_path(source) for source in sources]
    folder = local[0] if local[0].is_dir() else local[0].parent
    files = []
    for given, path in zip(sources, local, strict=True):
        files += [(given, file) for file in weight_files(path)]

    # Configurations are read beside the first source.
    tensors, settings = _read_files([file for _, file in files])
    tensors, others = _choose_part(tensors, part, local[0])
    published = Published(
        tensors,
        config=_read_json(folder / "config.json"),
        processor=_read_json(folder / "preprocessor_config.json"),
        settings=settings,
        normalize=normalize,
    )
    try:
        converted = _convert(published)
    except UserError as error:
        raise UserError(f"{', '.join(map(str, local))}: {error}") from error

    card = {
        "layout": converted.layout,
        "tower": converted.tower,
        "preprocessing": converted.preprocessing,
        "source": [
            {"given": str(given), "file": file.name, "sha256": sha256(file)}
            for given, file in files
        ],
        "left_out": _count_modules([*converted.unneeded, *others]),
        "license": license or _readme_license(folder),
        "parameters": int(sum(np.size(x) for x in jax.tree.leaves(converted.params))),
    }
    return card, converted.params


def describe(layout: Layout, published: Published) -> tuple[Attributes, Attributes]:
    """Return the network of published files and its preprocessing.

    Args:
      layout: layout of the files.
      published: what the files hold.

    Returns:
      The attributes for ``create_tower``, and the preprocessing for the card.

    Raises:
      UserError: a value that is needed is missing or not supported.
    """
    if published.normalize is not None and not layout.takes_normalize:
        raise UserError(
            f"--normalize is for wav2vec 2.0, HuBERT and WavLM; {layout.name} does not take it"
        )
    if layout.needs_config and not published.config:
        raise UserError(f"{layout.name}: config.json must be beside the weights")
    try:
        return layout.describe(published)
    except KeyError as error:
        place = "config.json" if published.config else "the file"
        raise UserError(
            f"{layout.name}: {place} has no {error.args[0]}: use the files as published"
        ) from error


@dataclass(frozen=True)
class _Converted:
    """A converted model: its parameters, fields of its card, names of unneeded tensors."""

    layout: str
    tower: Attributes
    preprocessing: Attributes
    params: Any
    unneeded: list[str]


def _convert(published: Published) -> _Converted:
    """Find the layout of published tensors, and convert them."""
    layout, prefix = find_layout(published.tensors)
    published = dataclasses.replace(published, prefix=prefix)
    tower, preprocessing = describe(layout, published)
    shapes = tower_shapes(tower, preprocessing)
    params, unneeded = convert_tensors(layout, prefix, published.tensors, shapes)
    unneeded = [name.removeprefix(prefix) for name in unneeded]
    return _Converted(layout.name, tower, preprocessing, params, unneeded)


def _choose_part(
    tensors: Mapping[str, np.ndarray], part: str | None, where: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the tensors of one network, and the names of the others in a SpeechCLIP checkpoint."""
    prefixes = SPEECHCLIP_PARTS.values()
    is_speechclip = all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes)
    if part is None:
        if is_speechclip:
            raise UserError(
                f"{where} holds two networks of SpeechCLIP: give --part=speech for its HuBERT or "
                "--part=image for its CLIP"
            )
        return dict(tensors), []

    if not is_speechclip:
        raise UserError(
            f"--part={part} is for checkpoints of SpeechCLIP, which hold two networks; {where} is "
            "none of them: leave --part out"
        )
    prefix = SPEECHCLIP_PARTS[part]
    chosen = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return chosen, [name for name in tensors if name not in chosen]


def _count_modules(names: Sequence[str]) -> dict[str, int]:
    """Return how many of these tensors each module holds, by the first part of the names."""
    return dict(sorted(collections.Counter(name.partition(".")[0] for name in names).items()))


def _read_files(files: Sequence[Path]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors and the settings of all files."""
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {}
    for file in files:
        found, says = read_tensors(file)
        # EVA ViT-g comes in a file of another publisher.
        found = _visual_encoder_names(found)
        both = sorted(tensors.keys() & found.keys())
        if both:
            raise UserError(
                f"{file} holds {both[0]}, which another given file holds too: leave one out"
            )
        tensors |= found
        settings |= says
    return tensors, settings


def _local_path(source: str | Path) -> Path:
    """Return a path as it is; download a hub id into huggingface_hub's cache."""
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
        # Many models are published in both formats: PyTorch's is downloaded only if it must be.
        folder = Path(snapshot_download(str(source), allow_patterns=[*HUB_TEXTS, SAFETENSORS]))
        if not any(folder.glob(SAFETENSORS)):
            patterns = [*HUB_TEXTS, SAFETENSORS, TORCH_FILES]
            folder = Path(snapshot_download(str(source), allow_patterns=patterns))
        return folder
    except Exception as error:  # the client and its transport raise many kinds of errors
        raise UserError(
            f"{source}: neither a local path nor a hub id that can be downloaded ({error})"
        ) from error


def _visual_encoder_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the prefix of LAVIS's ``visual_encoder``, which EVA ViT-g's own file leaves out."""
    if "patch_embed.proj.weight" not in tensors:
        return dict(tensors)
    return {f"visual_encoder.{name}": value for name, value in tensors.items()}


def _read_json(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file that are not null; {} if there is no file."""
    if not path.exists():
        return {}

    def without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if value is not None}

    try:
        found = json.loads(path.read_text(), object_pairs_hook=without_nulls)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold values by name, {{...}}; download it again")
    return found


def _readme_license(folder: Path) -> str:
    """Return the license in a README's front matter, as on the hub, or "unknown"."""
    # The front matter is between two lines of dashes at the top.
    readme = folder / "README.md"
    if not readme.exists():
        return "unknown"
    found = re.search(r"\A---\n(?:.*\n)*?license:\s*(\S+)", readme.read_text(errors="replace"))
    return found.group(1) if found else "unknown"
