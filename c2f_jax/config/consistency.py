"""Checks that options agree with each other."""

from collections.abc import Mapping

import flax.linen as nn

from c2f_jax.datasets.config import DataConfig
from c2f_jax.errors import UserError
from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.vit import ViTImageEncoder


def check_features(model: C2FModel, data: DataConfig, weights: Mapping[str, str]) -> None:
    """Check that feature caches fit the encoders and the augmentation.

    A cache belongs to a frozen network, and an encoder without a network needs a cache.

    Raises:
      UserError: if they do not fit.
    """
    for part in ("speech", "image"):
        encoder = getattr(model, f"{part}_encoder")
        path = getattr(data, f"{part}_features")
        reads_tokens = hasattr(encoder, "tower")
        has_network = getattr(encoder, "tower", None) is not None
        if path is None:
            if reads_tokens and not has_network:
                raise UserError(
                    f"model.{part}.name='tokens' reads a feature cache: set data.{part}_features"
                )
        elif not reads_tokens:
            raise UserError(
                f"data.{part}_features needs model.{part}.name to be 'published' or 'tokens'"
            )
        elif has_network and path.endswith(".npz"):
            raise UserError(
                f"data.{part}_features={path} holds the tokens of another tool: read them with "
                f"model.{part}.name='tokens' and no weights; the cache of a network is a folder"
            )
        elif has_network and encoder.frozen != "tower":
            raise UserError(
                f"data.{part}_features needs a frozen network: set model.{part}.frozen='tower'"
            )

    # Cached tokens cannot be varied, except by copies made before encoding.
    varies_images, varies_speech = data.augment.varies_images, data.augment.varies_speech
    if data.image_features is not None and varies_images:
        raise UserError(
            "data.augment cannot vary images that data.image_features keeps encoded: "
            "drop one of the two"
        )
    if data.speech_copies and not (data.speech_features and varies_speech and "speech" in weights):
        raise UserError(
            f"data.speech_copies={data.speech_copies} needs data.speech_features, "
            "model.speech.weights and an option of data.augment that varies recordings, "
            "such as speed"
        )
    if data.speech_features is not None and varies_speech and not data.speech_copies:
        raise UserError(
            "data.augment cannot vary recordings that data.speech_features keeps encoded: "
            "drop one of the two, or set data.speech_copies"
        )


def check_image_grid(encoder: nn.Module, size: int) -> None:
    """Check that images divide into patches; the light ViT would drop a remainder.

    Args:
      encoder: image encoder; only the light ViT is checked.
      size: side of the image in pixels.

    Raises:
      UserError: if it does not.
    """
    if not isinstance(encoder, ViTImageEncoder):
        return
    patch, pool = encoder.patch, encoder.token_pool
    if size % patch:
        raise UserError(f"data.image_size={size} is not a multiple of model.image.patch={patch}")
    if encoder.conv_stem and patch & (patch - 1):
        raise UserError(
            f"model.image.patch={patch}: must be a power of two with model.image.conv_stem"
        )
    if (size // patch) % pool:
        raise UserError(
            f"model.image.token_pool={pool} does not divide the {size // patch} patches of a side"
        )
