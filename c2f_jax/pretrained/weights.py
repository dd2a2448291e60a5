"""Converted weights: an Orbax checkpoint and a card that says what they are; training and `c2f features` read them."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from c2f_jax.errors import UserError
from c2f_jax.models.factory import IMAGE_TOWERS, create_tower
from c2f_jax.models.networks.vision_transformer import resize_positions

FORMAT = 1


def bare_tower(card):
    """The network of a card without its projection into the publisher's joint space: attributes as a dict."""
    return {name: 0 if name == "projection" else value for name, value in card["tower"].items()}


def tower_inputs(name, side=224, samples=16_000):
    """Inputs of the shapes that a network of this name takes, to initialise it with."""
    if name in IMAGE_TOWERS:
        return (np.zeros((1, side, side, 3), np.uint8),)
    return np.zeros((1, samples), np.float32), np.full((1,), samples, np.int32)


def tower_shapes(tower, preprocessing):
    """Nested dict of the shapes of a network's parameters (``tower`` as in ``create_tower``)."""
    inputs = tower_inputs(tower["name"], preprocessing.get("position_side", 224))
    return jax.eval_shape(create_tower(tower).init, jax.random.key(0), *inputs)["params"]


def save_weights(folder, card, params):
    """Write ``<folder>/params`` (Orbax) and then ``<folder>/card.json``."""
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
    (folder / "card.json").write_text(json.dumps({"format": FORMAT} | card, indent=2) + "\n")


def load_card(folder):
    """The card of converted weights, a dict: tower, preprocessing, layout, source, licence, parameters.

    Raises:
      UserError: no converted weights there.
    """
    path = Path(folder) / "card.json"
    try:
        card = json.loads(path.read_text())
        if card["format"] != FORMAT:
            raise UserError(
                f"{path} is of format {card['format']}, this program reads {FORMAT}: convert the weights again"
            )
        return card
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder} holds no converted weights ({error}): make them with `c2f convert`"
        ) from error


def open_card(source):
    """The card of converted weights, or of published files, which are then converted in memory."""
    return load_card(source) if _is_converted(source) else _convert_in_memory(str(source))[0]


def load_weights(source, shapes=None):
    """Parameters of converted weights, or of published files: nested dict of float32 arrays.

    Args:
      source: folder of ``c2f convert``, or a file or folder as published.
      shapes: what the network needs (``jax.eval_shape``); a projection that it does not use is left out, and position
        embeddings are interpolated to its number of patches. None for all as stored.

    Raises:
      UserError: no weights there, damaged ones, or weights of another network.
    """
    if not _is_converted(source):
        params = _convert_in_memory(str(source))[1]
        return params if shapes is None else fit_params(params, shapes, source)
    card = load_card(source)
    stored = tower_shapes(card["tower"], card["preprocessing"])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), stored)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(Path(source).absolute() / "params", target)
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{source}: the converted weights are damaged ({reason}): convert them again"
        ) from error
    return params if shapes is None else fit_params(params, shapes, source)


def load_published(model, weights, batch):
    """The published parameters of a C2F model, the part of the nested dict of all its parameters that they are.

    Args:
      model: C2FModel.
      weights: "speech", "image" -> source, as in ``load_weights``.
      batch: of the shapes that the model takes; a network whose tokens the batch holds is not loaded.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    loaded = {}
    for part, source in weights.items():
        encoder = shapes.get(f"{part}_encoder", {})
        if "tower" in encoder:
            loaded[f"{part}_encoder"] = {"tower": load_weights(source, encoder["tower"])}
    return loaded


def check_weights(workdir, weights, write=False):
    """Compare the SHA-256 of the weights with those that a run was trained with, in ``<workdir>/weights.json``.

    Args:
      workdir: of the run.
      weights: "speech", "image" -> source, as in ``load_weights``.
      write: record them where nothing is recorded.

    Raises:
      UserError: they are others.
    """
    wanted = {
        part: [s["sha256"] for s in open_card(source)["source"]] for part, source in weights.items()
    }
    path = epath.Path(workdir) / "weights.json"
    found = json.loads(path.read_text()) if path.exists() else None
    if found is None:
        if write and wanted:
            path.write_text(json.dumps(wanted, indent=2) + "\n")
    elif found != wanted:
        differing = ", ".join(
            f"model.{p}.weights"
            for p in sorted(found.keys() | wanted.keys())
            if found.get(p) != wanted.get(p)
        )
        raise UserError(
            f"{workdir} was trained with other weights than {differing} names: restore those"
        )


def _is_converted(source):
    return (Path(source) / "card.json").exists()


@functools.lru_cache(maxsize=2)
def _convert_in_memory(source):
    from c2f_jax.pretrained.convert import read_published

    if not Path(source).expanduser().exists():
        raise UserError(
            f"{source} does not exist: name a folder of `c2f convert`, or published files"
        )
    return read_published([source])


def fit_params(params, shapes, where):
    """``params`` for a network of these shapes; see ``load_weights``."""
    if "projection" not in shapes:
        params = {k: v for k, v in params.items() if k != "projection"}

    def fit(path, wanted, value):
        if value.shape == wanted.shape:
            return value
        if path[-1].key == "positions" and value.ndim == 3:
            return resize_positions(value, wanted.shape[1])
        name = "/".join(entry.key for entry in path)
        raise UserError(
            f"{where}: {name} has the shape {value.shape}, the model needs {wanted.shape}"
        )

    if jax.tree.structure(params) != jax.tree.structure(shapes):
        raise UserError(f"{where}: these weights are of another network than the model's `tower`")
    return jax.tree_util.tree_map_with_path(fit, shapes, params)
