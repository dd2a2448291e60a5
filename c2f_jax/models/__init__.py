"""Encoders, the multimodal encoder and the C2F model, built from plain values by ``create_model``."""

import dataclasses

import jax.numpy as jnp

from c2f_jax.errors import UserError
from c2f_jax.models.c2f import C2FModel, Encoded, momentum_subset
from c2f_jax.models.image import ViTImageEncoder
from c2f_jax.models.layers import ATTENTION_IMPLEMENTATIONS
from c2f_jax.models.multimodal import MultimodalEncoder
from c2f_jax.models.speech import LogMelSpeechEncoder

__all__ = ["C2FModel", "Encoded", "create_model", "momentum_subset"]

SPEECH_ENCODERS = {"log_mel": LogMelSpeechEncoder}
IMAGE_ENCODERS = {"vit": ViTImageEncoder}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def create_model(
    speech, image, multimodal, *, embedding_dim=256, initial_tau=0.07, dtype="float32", attention="xla", remat=False
):
    """Build a ``C2FModel``.

    Args:
      speech: dict with ``name`` ("log_mel") and the encoder's attributes.
      image: dict with ``name`` ("vit") and the encoder's attributes.
      multimodal: dict of ``MultimodalEncoder`` attributes.
      embedding_dim: D.
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
        raise UserError(f"model.attention={attention!r}: choose one of {', '.join(ATTENTION_IMPLEMENTATIONS)}")
    shared = {"dtype": DTYPES[dtype], "attention": attention, "remat": remat}
    return C2FModel(
        _encoder("model.speech", SPEECH_ENCODERS, speech, shared),
        _encoder("model.image", IMAGE_ENCODERS, image, shared),
        _encoder("model.multimodal", {"multimodal": MultimodalEncoder}, {"name": "multimodal"} | multimodal, shared),
        embedding_dim=embedding_dim,
        initial_tau=initial_tau,
    )


def _encoder(where, registry, attributes, shared):
    attributes = dict(attributes)
    name = attributes.pop("name", None)
    if name not in registry:
        raise UserError(f"{where}.name={name!r}: choose one of {', '.join(registry)}")
    known = {f.name for f in dataclasses.fields(registry[name])} - {"parent", "name"} - set(shared)
    unknown = sorted(set(attributes) - known)
    if unknown:
        raise UserError(f"{where} ({name}) has no {', '.join(unknown)}: its attributes are {', '.join(sorted(known))}")
    width, heads = (attributes.get(size, getattr(registry[name], size)) for size in ("width", "heads"))
    if width % heads:
        raise UserError(f"{where}: width {width} is not a multiple of heads {heads}")
    return registry[name](**attributes, **shared)
