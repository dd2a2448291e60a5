"""Models from plain values: all encoders and networks, and their options.

To add an encoder or a published network, write its module and list it here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from c2f_jax.errors import UserError
from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.layers import ATTENTION_IMPLEMENTATIONS
from c2f_jax.models.log_mel import LogMelSpeechEncoder
from c2f_jax.models.multimodal import MultimodalEncoder
from c2f_jax.models.networks.blip2 import Blip2
from c2f_jax.models.networks.vision_transformer import VisionTransformer
from c2f_jax.models.networks.wav2vec2 import Wav2Vec2
from c2f_jax.models.networks.whisper import Whisper
from c2f_jax.models.published import PublishedImage, PublishedSpeech
from c2f_jax.models.vit import ViTImageEncoder

# "published" is one of the networks below; "tokens" stands for a network of another tool, whose
# tokens are in a feature cache.
SPEECH_ENCODERS: dict[str, type[nn.Module]] = {
    "log_mel": LogMelSpeechEncoder,
    "published": PublishedSpeech,
    "tokens": PublishedSpeech,
}
IMAGE_ENCODERS: dict[str, type[nn.Module]] = {
    "vit": ViTImageEncoder,
    "published": PublishedImage,
    "tokens": PublishedImage,
}
MULTIMODAL_ENCODERS: dict[str, type[nn.Module]] = {"multimodal": MultimodalEncoder}
SPEECH_TOWERS: dict[str, type[nn.Module]] = {"wav2vec2": Wav2Vec2, "whisper": Whisper}
IMAGE_TOWERS: dict[str, type[nn.Module]] = {
    "vision_transformer": VisionTransformer,
    "blip2": Blip2,
}

# Fields of modules that are Flax's, or options of the whole model.
NO_OPTIONS = ("parent", "name", "branches", "dtype", "attention", "remat")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What ``frozen`` of a published encoder keeps, as a path below the encoder.
FROZEN_PATHS = {"tower": ("tower",), "conv": ("tower", "conv")}


@dataclass(frozen=True)
class ModelOptions:
    """Options of the whole model.

    Attributes:
      embedding_dim: D.
      branches: M, transformers and projections side by side in each of the two encoders: an
        ensemble on one trunk, each branch with its SIC loss. The paper has one.
      initial_tau: tau at step 0.
      dtype: compute type; parameters, logits, softmax and momentum are float32 in any case.
      attention: implementation of attention; "cudnn" is for GPUs and bfloat16.
      remat: recompute the activations of transformer blocks in the backward pass instead of
        keeping them.
    """

    embedding_dim: int = field(default=256, metadata={"min": 1})
    branches: int = field(default=1, metadata={"min": 1})
    initial_tau: float = field(default=0.07, metadata={"above": 0})
    dtype: str = field(default="float32", metadata={"choices": tuple(DTYPES)})
    attention: str = field(default="xla", metadata={"choices": ATTENTION_IMPLEMENTATIONS})
    remat: bool = False


def create_model(
    speech: Mapping[str, Any],
    image: Mapping[str, Any],
    multimodal: Mapping[str, Any],
    **options: Any,
) -> C2FModel:
    """Build a ``C2FModel``.

    Args:
      speech: ``name`` ("log_mel", "published", "tokens") and the encoder's attributes; the
        ``tower`` of a published one is a dict as in ``create_tower``.
      image: ``name`` ("vit", "published", "tokens") and the encoder's attributes.
      multimodal: ``MultimodalEncoder`` attributes.
      **options: of ``ModelOptions``.

    Raises:
      UserError: unknown encoder, attribute or option, or a value that is not among its choices.
    """
    known = [option.name for option in dataclasses.fields(ModelOptions)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"model has no {', '.join(unknown)}: its values are {', '.join(known)}")
    _check_choices("model", dataclasses.fields(ModelOptions), options)
    model = ModelOptions(**options)

    # Options of the whole model are attributes of each encoder and network.
    shared = {
        "dtype": DTYPES[model.dtype],
        "attention": model.attention,
        "remat": model.remat,
    }
    branched = shared | {"branches": model.branches}
    encoders = {
        "speech": _encoder("model.speech", SPEECH_ENCODERS, speech, branched),
        "image": _encoder("model.image", IMAGE_ENCODERS, image, branched),
    }
    for part, encoder in encoders.items():
        if model.branches > 1 and not getattr(encoder, "depth", 1):
            raise UserError(
                f"model.branches={model.branches}: branches are transformers, which "
                f"model.{part}.depth=0 leaves out"
            )

    return C2FModel(
        encoders["speech"],
        encoders["image"],
        _encoder(
            "model.multimodal", MULTIMODAL_ENCODERS, {"name": "multimodal", **multimodal}, shared
        ),
        embedding_dim=model.embedding_dim,
        branches=model.branches,
        initial_tau=model.initial_tau,
        frozen=_frozen_paths(encoders),
    )


def create_tower(
    attributes: Mapping[str, Any],
    where: str = "tower",
    towers: Mapping[str, type[nn.Module]] | None = None,
    **shared: Any,
) -> nn.Module:
    """Build a published network from plain values, such as those in a card of converted weights.

    Args:
      attributes: ``name`` and the network's attributes; ``vision`` of "blip2" is such a dict again.
      where: what error messages call it.
      towers: the registry to choose from; all by default.
      **shared: dtype, attention, remat.

    Raises:
      UserError: unknown name or attribute.
    """
    # Flax modules are hashed, and lists are what JSON has for tuples.
    values: dict[str, Any] = {}
    for name, value in attributes.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    if isinstance(values.get("vision"), dict):
        values["vision"] = create_tower(values["vision"], f"{where}.vision", IMAGE_TOWERS, **shared)
    return _encoder(where, towers or SPEECH_TOWERS | IMAGE_TOWERS, values, shared)


def option_fields(module: type[nn.Module]) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of a module that a configuration may set.

    Args:
      module: an encoder, the multimodal encoder, or a network.

    Returns:
      Dataclass fields; their metadata may have "min", "max" (inclusive), "above", "below"
      (exclusive) and "choices".
    """
    return tuple(option for option in dataclasses.fields(module) if option.name not in NO_OPTIONS)


def _encoder(
    where: str,
    registry: Mapping[str, type[nn.Module]],
    attributes: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> nn.Module:
    """Build an encoder or a network.

    Args:
      where: what error messages call it.
      registry: name -> class.
      attributes: ``name`` and the attributes.
      shared: options of the whole model; a module gets those that it has.
    """
    values = dict(attributes)
    name = values.pop("name", None)
    if name not in registry:
        raise UserError(f"{where}.name={name!r}: choose one of {', '.join(registry)}")
    module = registry[name]

    # Only "published" takes a network.
    has_tower = bool(values.get("tower"))
    if name == "published" and not has_tower:
        raise UserError(
            f"{where}.name='published' needs `weights`, a folder of `c2f convert`, or `tower`"
        )
    if name == "tokens" and has_tower:
        raise UserError(f"{where}.name='tokens' takes no `tower`")
    if isinstance(values.get("tower"), dict):
        # Branches belong to the encoder, not to its network.
        towers = SPEECH_TOWERS if registry is SPEECH_ENCODERS else IMAGE_TOWERS
        of_tower = {key: value for key, value in shared.items() if key != "branches"}
        values["tower"] = create_tower(values["tower"], f"{where}.tower", towers, **of_tower)

    known = {option.name: option for option in option_fields(module)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(
            f"{where} ({name}) has no {', '.join(unknown)}: "
            f"its attributes are {', '.join(sorted(known))}"
        )
    _check_choices(where, tuple(known.values()), values)

    # A network without attention, say, has no choice of its implementation.
    own = {option.name for option in dataclasses.fields(module)}
    encoder = module(**values, **{key: shared[key] for key in shared if key in own})
    if hasattr(encoder, "heads") and encoder.width % encoder.heads:
        raise UserError(
            f"{where}: width {encoder.width} is not a multiple of heads {encoder.heads}"
        )
    if name in ("published", "tokens") and values.get("conv_blocks") and encoder.depth == 0:
        raise UserError(
            f"{where}.conv_blocks={values['conv_blocks']}: the convolutions are under a "
            "transformer, which depth 0 leaves out"
        )
    return encoder


def _check_choices(
    where: str, options: tuple[dataclasses.Field[Any], ...], values: Mapping[str, Any]
) -> None:
    """Raise UserError for a value that is not among the choices of its field."""
    for option in options:
        choices = option.metadata.get("choices")
        if choices and option.name in values and values[option.name] not in choices:
            raise UserError(
                f"{where}.{option.name}={values[option.name]!r}: choose one of {', '.join(choices)}"
            )


def _frozen_paths(encoders: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Return the paths of the parameters that are never trained."""
    paths = []
    for part, encoder in encoders.items():
        has_tower = getattr(encoder, "tower", None) is not None
        if has_tower and encoder.frozen in FROZEN_PATHS:
            paths.append((f"{part}_encoder", *FROZEN_PATHS[encoder.frozen]))
    return tuple(paths)
