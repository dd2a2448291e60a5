"""Converted weights: an Orbax checkpoint and a card that says what they are."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from c2f_jax.data.feature_cache import with_current_names
from c2f_jax.data.files import check_writable
from c2f_jax.errors import UserError
from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.networks.vision_transformer import resize_positions
from c2f_jax.pretrained.networks import tower_shapes
from c2f_jax.pretrained.published_files import read_published

FORMAT = 1


def convert(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    part: str | None = None,
    normalize: bool | None = None,
    license: str | None = None,
) -> dict[str, Any]:
    """Convert published weights to an Orbax checkpoint and a card.

    Args:
      sources: as in ``read_published``.
      output: folder to write.
      part: as in ``read_published``.
      normalize: as in ``read_published``.
      license: as in ``read_published``.

    Returns:
      The card.

    Raises:
      UserError: as in ``read_published``, or the folder cannot be written.
    """
    if (Path(output) / "params").exists():
        raise UserError(
            f"{output} holds converted weights already: remove it or give another --output"
        )
    if "://" in str(output):
        raise UserError(f"--output={output}: must be a folder on a disk, which runs read it from")
    check_writable(output, "--output", folder=True)
    card, params = read_published(sources, part=part, normalize=normalize, license=license)
    try:
        save_weights(output, card, params)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error})") from error
    return card


def save_weights(folder: str | Path, card: Mapping[str, Any], params: Any) -> None:
    """Write ``<folder>/params`` (Orbax) and then ``<folder>/card.json``."""
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
    # The card comes last: a folder with a card is complete.
    (folder / "card.json").write_text(json.dumps({"format": FORMAT, **card}, indent=2) + "\n")


def load_card(folder: str | Path) -> dict[str, Any]:
    """Read the card of converted weights.

    Returns:
      Dict of tower, preprocessing, layout, source, left_out, license and parameters.

    Raises:
      UserError: no converted weights there.
    """
    path = Path(folder) / "card.json"
    try:
        card = json.loads(path.read_text(), object_pairs_hook=with_current_names)
        found_format = card["format"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{folder} holds no converted weights ({error}): make them with `c2f convert`"
        ) from error
    if found_format != FORMAT:
        raise UserError(
            f"{path} has format {found_format}, but this version reads format {FORMAT}: "
            "convert the weights again"
        )
    return card


def open_card(source: str | Path) -> dict[str, Any]:
    """Return the card of converted weights, or of published files converted in memory."""
    if _is_converted(source):
        return load_card(source)
    return _convert_in_memory(str(source))[0]


def load_weights(source: str | Path, shapes: Any = None) -> Any:
    """Load the parameters of converted weights, or of published files.

    Args:
      source: folder of ``c2f convert``, or a file or folder as published.
      shapes: what the network needs (``jax.eval_shape``). A projection that it does not use is left
        out, and position embeddings are interpolated to its number of patches. None for all as
        stored.

    Returns:
      Nested dict of float32 arrays.

    Raises:
      UserError: no weights there, damaged ones, or weights of another network.
    """
    params = _restore(source) if _is_converted(source) else _convert_in_memory(str(source))[1]
    return params if shapes is None else fit_params(params, shapes, source)


def load_published(
    model: C2FModel, weights: Mapping[str, str | Path], batch: Mapping[str, Any]
) -> dict[str, Any]:
    """Load the published parameters of a C2F model.

    Args:
      model: C2FModel with published networks.
      weights: "speech", "image" -> source, as in ``load_weights``.
      batch: in the shapes that the model takes; a network whose tokens are in the batch is not
        loaded.

    Returns:
      The part of the nested dict of all parameters that is published.
    """
    if not weights:
        return {}
    # Shapes alone: the networks' random parameters would be as large as the published ones.
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    loaded = {}
    for part, source in weights.items():
        encoder = shapes.get(f"{part}_encoder", {})
        if "tower" in encoder:
            loaded[f"{part}_encoder"] = {"tower": load_weights(source, encoder["tower"])}
    return loaded


def check_weights(
    workdir: str | epath.Path, weights: Mapping[str, str | Path], write: bool = False
) -> None:
    """Check that weights are those that a run was trained with.

    Compare their SHA-256 with those in ``<workdir>/weights.json``.

    Args:
      workdir: directory of the run.
      weights: "speech", "image" -> source, as in ``load_weights``.
      write: record the SHA-256 if none is recorded.

    Raises:
      UserError: they differ.
    """
    wanted = {
        part: [s["sha256"] for s in open_card(source)["source"]] for part, source in weights.items()
    }
    path = epath.Path(workdir) / "weights.json"
    if not path.exists():
        if write and wanted:
            path.write_text(json.dumps(wanted, indent=2) + "\n")
        return

    found = json.loads(path.read_text())
    if found != wanted:
        parts = sorted(found.keys() | wanted.keys())
        differing = [
            f"model.{part}.weights" for part in parts if found.get(part) != wanted.get(part)
        ]
        raise UserError(
            f"{workdir} was trained with other weights than {', '.join(differing)} names: "
            "restore those"
        )


def fit_params(params: Any, shapes: Any, where: str | Path) -> Any:
    """Fit stored parameters to a network.

    Args:
      params: nested dict of arrays.
      shapes: shapes of the network's parameters, see ``load_weights``.
      where: what error messages call the parameters.

    Raises:
      UserError: they belong to another network.
    """
    if "projection" not in shapes:
        params = {name: value for name, value in params.items() if name != "projection"}
    structure: Any = jax.tree.structure(params)
    if structure != jax.tree.structure(shapes):
        raise UserError(
            f"{where}: these weights do not fit the model's `tower`; give weights of that network"
        )

    def fit(path: tuple[Any, ...], wanted: jax.ShapeDtypeStruct, value: Any) -> Any:
        if value.shape == wanted.shape:
            return value
        # Positions of images for another image size; those of Whisper, (T, W), have a fixed number.
        if path[-1].key == "positions" and value.ndim == 3:
            return resize_positions(value, wanted.shape[1])
        name = "/".join(entry.key for entry in path)
        raise UserError(
            f"{where}: {name} has the shape {value.shape}, the model needs {wanted.shape}"
        )

    return jax.tree_util.tree_map_with_path(fit, shapes, params)


def _restore(folder: str | Path) -> Any:
    """Return all parameters of converted weights, on the first device of this process."""
    card = load_card(folder)
    # Orbax would otherwise ask for the devices that the weights were saved from.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        tower_shapes(card["tower"], card["preprocessing"]),
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(Path(folder).absolute() / "params", target)
    except (ValueError, KeyError, OSError) as error:
        # Orbax's messages are pages long.
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise UserError(
            f"{folder}: the converted weights are damaged ({reason}): convert them again"
        ) from error


@functools.lru_cache(maxsize=2)
def _convert_in_memory(source: str) -> tuple[dict[str, Any], Any]:
    if not Path(source).expanduser().exists():
        raise UserError(
            f"{source} does not exist: name a folder of `c2f convert`, or published files"
        )
    return read_published([source])


def _is_converted(source: str | Path) -> bool:
    return (Path(source) / "card.json").exists()
