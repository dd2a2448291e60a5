"""Values of config.json and preprocessor_config.json that several families share."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from c2f_jax.errors import UserError
from c2f_jax.pretrained.tensor_names import Attributes, Published

BICUBIC = 3  # Pillow's number for it, in preprocessor_config.json
# Sizes that config.json leaves out if they are those of a base model.
BASE_SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
# Published name -> ours, a key of ``models.layers.ACTIVATIONS``.
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def activation(name: str) -> str:
    """Return our name of a published activation."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json: activation {name!r} is not supported; "
            f"choose one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def speech_preprocessing(normalize: bool) -> Attributes:
    """Return the card's preprocessing of recordings."""
    return {"sample_rate": 16_000, "normalize": normalize}


def image_preprocessing(
    processor: Mapping[str, Any],
    config: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    squash: bool,
) -> Attributes:
    """Return the card's preprocessing of images: sides in pixels, and how to get there.

    Args:
      processor: preprocessor_config.json; what it does not say is taken from the other arguments.
      config: the ViT's config.json; ``image_size`` and ``patch_size`` are read.
      mean: mean of each color, 0 to 1.
      std: standard deviation of each color.
      squash: resize both sides alike; False to resize the short side and crop the center.

    Raises:
      UserError: resampling other than bicubic.
    """
    # The defaults are what the networks were trained with; the processor's values come first.
    resize_side = _side(processor.get("size"), config["image_size"])
    if "size" in processor:
        by_short_side = isinstance(processor["size"], int) or "shortest_edge" in processor["size"]
        squash = not by_short_side

    # What is cropped out is the network's input.
    image_size = resize_side
    if processor.get("do_center_crop", not squash):
        image_size = _side(processor.get("crop_size"), resize_side)

    if int(processor.get("resample", BICUBIC)) != BICUBIC:
        raise UserError(
            "preprocessor_config.json: only bicubic resampling is supported; "
            f'write "resample": {BICUBIC} there to use it'
        )
    return {
        "image_size": image_size,
        "resize": "squash" if squash else "short_side",
        "resize_side": resize_side,
        "resample": "bicubic",
        "mean": list(processor.get("image_mean") or mean),
        "std": list(processor.get("image_std") or std),
        # Position embeddings exist for whole patches only.
        "position_side": config["image_size"] // config["patch_size"] * config["patch_size"],
    }


def vision_transformer(config: Mapping[str, Any], preprocessing: Attributes) -> Attributes:
    """Return the attributes of a ViT that have the same name in every config.json."""
    return {
        "name": "vision_transformer",
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "patch": config["patch_size"],
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "activation": activation(config["hidden_act"]),
        "epsilon": config["layer_norm_eps"],
    }


def normalize_flag(found: bool | None, published: Published) -> bool:
    """Return whether waveforms are normalized to mean 0 and variance 1.

    Args:
      found: what the publisher's files say; None for nothing.
      published: the files, with the user's ``normalize``.

    Raises:
      UserError: neither says, or they contradict each other.
    """
    # Never guessed: with the wrong flag the tokens look fine and retrieve badly.
    given = published.normalize
    if found is None and given is None:
        raise UserError(
            "neither the checkpoint nor a preprocessor_config.json says whether waveforms are "
            "normalized to mean 0 and variance 1: give --normalize=true or --normalize=false as "
            "the publisher says (fairseq: base models false, large ones true)"
        )
    if None not in (found, given) and bool(found) != given:
        raise UserError(
            f"--normalize={given} contradicts the publisher's files, which say {bool(found)}: "
            "leave it out"
        )
    return bool(given if found is None else found)


def block_numbers(names: Iterable[str], pattern: str) -> list[int]:
    """Return the numbers of the blocks that have a tensor of this name, in order.

    Args:
      names: names of all tensors.
      pattern: regular expression of a tensor's name; its first group is the number of the block.

    Raises:
      UserError: there is no such tensor.
    """
    matches = [re.fullmatch(pattern, name) for name in names]
    found = sorted(int(match.group(1)) for match in matches if match)
    if not found:
        raise UserError(f"no tensor has a name like {pattern!r}")
    return found


def _side(value: Any, default: int) -> int:
    """Return a side in pixels, published as a number or as {name of an edge: number}."""
    if isinstance(value, dict):
        value = value.get("shortest_edge", value.get("height"))
    return int(value or default)
