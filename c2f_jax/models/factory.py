"""Models built from plain values."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from c2f_jax.errors import UserError
from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.encoder import POOLINGS
from c2f_jax.models.layers import ATTENTION_IMPLEMENTATIONS
from c2f_jax.models.log_mel import LogMelSpeechEncoder
from c2f_jax.models.multimodal import MultimodalEncoder
from c2f_jax.models.networks.blip2 import Blip2
from c2f_jax.models.networks.vision_transformer import VisionTransformer
from c2f_jax.models.networks.wav2vec2 import Wav2Vec2
from c2f_jax.models.networks.whisper import Whisper
from c2f_jax.models.published import FROZEN, PublishedImage, PublishedSpeech
from c2f_jax.models.vit import ViTImageEncoder

# "published" is a network that we have, "tokens" one of another tool, whose tokens a feature cache holds.
SPEECH_ENCODERS = {
    "log_mel": LogMelSpeechEncoder,
    "published": PublishedSpeech,
    "tokens": PublishedSpeech,
}
IMAGE_ENCODERS = {"vit": ViTImageEncoder, "published": PublishedImage, "tokens": PublishedImage}
SPEECH_TOWERS = {"wav2vec2": Wav2Vec2, "whisper": Whisper}
IMAGE_TOWERS = {"vision_transformer": VisionTransformer, "blip2": Blip2}
TOWERS = SPEECH_TOWERS | IMAGE_TOWERS
# Fields of modules that are Flax's, or values of the whole model.
NO_OPTIONS = ("parent", "name", "branches", "dtype", "attention", "remat")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def create_model(
    speech,
    image,
    multimodal,
    *,
    embedding_dim=256,
    branches=1,
    initial_tau=0.07,
    dtype="float32",
    attention="xla",
    remat=False,
):
    """Build a ``C2FModel``.

    Args:
      speech: dict with ``name`` ("log_mel", "published", "tokens") and the encoder's attributes; the ``tower`` of a
        published one is a dict as in ``create_tower``.
      image: dict with ``name`` ("vit", "published", "tokens") and the encoder's attributes.
      multimodal: dict of ``MultimodalEncoder`` attributes.
      embedding_dim: D.
      branches: M, transformers and projections side by side in each of the two encoders: an ensemble on one trunk,
        each branch with an SIC loss of its own.
      initial_tau: tau at step 0.
      dtype: compute type, "float32" or "bfloat16"; parameters, logits, softmax and momentum stay float32.
      attention: "xla" or "cudnn".
      remat: rematerialise transformer blocks in the backward pass.

    Raises:
      UserError: unknown encoder, attribute, type or attention implementation.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    if attention not in ATTENTION_IMPLEMENTATIONS:
        raise UserError(
            f"model.attention={attention!r}: choose one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
        )
    shared = {"dtype": DTYPES[dtype], "attention": attention, "remat": remat}
    frozen = []
    for part, attributes in (("speech", speech), ("image", image)):
        if branches > 1 and not attributes.get("depth", 1):
            raise UserError(
                f"model.branches={branches} are transformers: model.{part}.depth=0 leaves them out"
            )
        if attributes.get("name") == "published":
            frozen += _frozen_paths(part, attributes.get("frozen", "tower"))
    return C2FModel(
        _encoder("model.speech", SPEECH_ENCODERS, speech, shared, SPEECH_TOWERS).clone(
            branches=branches
        ),
        _encoder("model.image", IMAGE_ENCODERS, image, shared, IMAGE_TOWERS).clone(
            branches=branches
        ),
        _encoder(
            "model.multimodal",
            {"multimodal": MultimodalEncoder},
            {"name": "multimodal"} | multimodal,
            shared,
        ),
        embedding_dim=embedding_dim,
        branches=branches,
        initial_tau=initial_tau,
        frozen=tuple(frozen),
    )


def create_tower(attributes, where="tower", towers=None, **shared):
    """A published network from plain values, as they stand in a card of converted weights.

    Args:
      attributes: dict with ``name`` (a key of ``TOWERS``) and the network's attributes; ``vision`` of "blip2" is such a
        dict again.
      where: what error messages call it.
      towers: the registry to choose from; all by default.
      **shared: dtype, attention, remat.

    Raises:
      UserError: unknown name or attribute.
    """
    attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in attributes.items()}
    if isinstance(attributes.get("vision"), dict):
        attributes["vision"] = create_tower(
            attributes["vision"], f"{where}.vision", IMAGE_TOWERS, **shared
        )
    return _encoder(where, towers or TOWERS, attributes, shared)


def option_fields(module: type[nn.Module]) -> list[dataclasses.Field[Any]]:
    """Return the fields of a module that a configuration may set.

    Args:
      module: an encoder, the multimodal encoder, or a network.
    """
    return [f for f in dataclasses.fields(module) if f.name not in NO_OPTIONS]


def _frozen_paths(part, frozen):
    if frozen not in FROZEN or (frozen == "conv" and part == "image"):
        raise UserError(
            f"model.{part}.frozen={frozen!r}: choose one of tower, none{', conv' * (part == 'speech')}"
        )
    paths = {"tower": ("tower",), "conv": ("tower", "conv")}
    return [(f"{part}_encoder", *paths[frozen])] if frozen in paths else []


def _encoder(where, registry, attributes, shared, towers=None):
    attributes = dict(attributes)
    name = attributes.pop("name", None)
    if name not in registry:
        raise UserError(f"{where}.name={name!r}: choose one of {', '.join(registry)}")
    if name in ("published", "tokens") and (name == "published") != bool(attributes.get("tower")):
        needed = (
            "needs `weights`, a folder of `c2f convert`, or `tower`"
            if name == "published"
            else "takes no `tower`"
        )
        raise UserError(f"{where}.name={name!r} {needed}")
    if isinstance(attributes.get("tower"), dict):
        attributes["tower"] = create_tower(attributes["tower"], f"{where}.tower", towers, **shared)
    known = {option.name for option in option_fields(registry[name])}
    unknown = sorted(set(attributes) - known)
    if unknown:
        raise UserError(
            f"{where} ({name}) has no {', '.join(unknown)}: its attributes are {', '.join(sorted(known))}"
        )
    width, heads = (
        attributes.get(size, getattr(registry[name], size)) for size in ("width", "heads")
    )
    if width % heads:
        raise UserError(f"{where}: width {width} is not a multiple of heads {heads}")
    if (
        name in ("published", "tokens")
        and attributes.get("conv_blocks")
        and attributes.get("depth") == 0
    ):
        blocks = attributes["conv_blocks"]
        raise UserError(
            f"{where}.conv_blocks={blocks} stand under a transformer: depth 0 leaves it out"
        )
    if attributes.get("pooling", "cls") not in POOLINGS:
        raise UserError(
            f"{where}.pooling={attributes['pooling']!r}: choose one of {', '.join(POOLINGS)}"
        )
    return registry[name](**attributes, **shared)
