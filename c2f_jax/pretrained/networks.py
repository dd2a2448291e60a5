"""The network of a card: its attributes, its inputs and the shapes of its parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from c2f_jax.models.factory import IMAGE_TOWERS, create_tower


def bare_tower(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a card's network without its projection into the joint space."""
    # Encoders project the tokens themselves, with a map that is trained.
    tower = dict(card["tower"])
    if "projection" in tower:
        tower["projection"] = 0
    return tower


def tower_inputs(name: str, side: int = 224, samples: int = 16_000) -> tuple[np.ndarray, ...]:
    """Return zeros in the shapes that a network takes, to initialize it with.

    Args:
      name: name of the network, a key of ``SPEECH_TOWERS`` or ``IMAGE_TOWERS``.
      side: side of an image in pixels.
      samples: length of a recording.

    Returns:
      (1, side, side, 3) uint8 images, or (1, samples) float32 waveforms and their (1,) lengths.
    """
    if name in IMAGE_TOWERS:
        return (np.zeros((1, side, side, 3), np.uint8),)
    return np.zeros((1, samples), np.float32), np.full((1,), samples, np.int32)


def tower_shapes(tower: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> Any:
    """Return the shapes of a network's parameters, a nested dict.

    Args:
      tower: attributes as in ``create_tower``.
      preprocessing: as in the card; ``position_side`` is the image side of the positions.
    """
    inputs = tower_inputs(tower["name"], preprocessing.get("position_side", 224))
    return jax.eval_shape(create_tower(tower).init, jax.random.key(0), *inputs)["params"]
