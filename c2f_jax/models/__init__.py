"""Encoders, the multimodal encoder and the C2F model, from plain values by ``create_model``."""

from c2f_jax.models.c2f import C2FModel, Encoded
from c2f_jax.models.factory import create_model, create_tower

__all__ = ["C2FModel", "Encoded", "create_model", "create_tower"]
