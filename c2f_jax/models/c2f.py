"""The C2F model: two encoders with projections for SIC, a multimodal encoder for SIM, a learnt temperature."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from c2f_jax.models.encoder import numbered
from c2f_jax.models.layers import Dense
from c2f_jax.objectives.keys import Site, fold_keys


class Encoded(NamedTuple):
    """One modality of a batch.

    Attributes:
      embedding: (n, D) float32, L2-normalised projection z of the [CLS]; of M branches (n, M D), each one's
        normalised projection times 1 / sqrt(M), so that a cosine is the mean of the branches' cosines.
      tokens: (n, T, W) token sequence H, [CLS] first; of M branches (n, T, M W).
      lengths: (n,) int32 valid tokens.
    """

    embedding: jax.Array
    tokens: jax.Array
    lengths: jax.Array


class Temperature(nn.Module):
    """The learnt temperature tau = exp(log_tau) that divides similarities.

    The logarithm is learnt, as in CLIP: a step of Adam at the encoders' learning rate would be a large share of tau.
    """

    initial: float = 0.07

    @nn.compact
    def __call__(self):
        """float32 scalar."""
        return jnp.exp(self.param("log_tau", nn.initializers.constant(jnp.log(self.initial)), ()))


class C2FModel(nn.Module):
    """Coarse-to-fine speech-image model.

    Attributes:
      speech_encoder: (waveform, lengths, keys) -> tokens, lengths.
      image_encoder: (image, keys) -> tokens, lengths.
      multimodal_encoder: (speech tokens, lengths, image tokens, lengths, keys) -> logits (n, 2).
      embedding_dim: D.
      branches: M, as the encoders have.
      initial_tau: tau at step 0.
      frozen: paths of the parameters that are never trained, such as ("speech_encoder", "tower").

    Per-example ``keys`` (n,) switch dropout on; None is deterministic.
    """

    speech_encoder: nn.Module
    image_encoder: nn.Module
    multimodal_encoder: nn.Module
    embedding_dim: int = 256
    branches: int = 1
    initial_tau: float = 0.07
    frozen: tuple[tuple[str, ...], ...] = ()

    def setup(self):
        # Projection and normalisation in float32 whatever the compute type: similarities are divided by a small tau.
        self.speech_projections, self.image_projections = (
            [
                Dense(self.embedding_dim, name=numbered(f"{part}_projection", m))
                for m in range(self.branches)
            ]
            for part in ("speech", "image")
        )
        self.temperature = Temperature(self.initial_tau)

    def encode_speech(self, waveform, lengths, keys=None) -> Encoded:
        """Encode recordings: waveform (n, S) float32 at 16 kHz with (n,) valid samples, or cached tokens (n, T, C)."""
        tokens, token_lengths = self.speech_encoder(
            waveform, lengths, fold_keys(keys, Site.SPEECH_ENCODER)
        )
        return Encoded(_embedding(self.speech_projections, tokens), tokens, token_lengths)

    def encode_image(self, image, keys=None) -> Encoded:
        """Encode images: (n, H, W, 3) uint8, or cached tokens (n, P, C)."""
        tokens, token_lengths = self.image_encoder(image, fold_keys(keys, Site.IMAGE_ENCODER))
        return Encoded(_embedding(self.image_projections, tokens), tokens, token_lengths)

    def match(self, speech: Encoded, image: Encoded, keys=None):
        """SIM logits (n, 2) of n pairs; embeddings are not used and may be None."""
        return self.multimodal_encoder(
            speech.tokens,
            speech.lengths,
            image.tokens,
            image.lengths,
            fold_keys(keys, Site.MULTIMODAL_ENCODER),
        )

    @property
    def embedding_size(self):
        """Entries of an embedding, M D."""
        return self.branches * self.embedding_dim

    def tau(self):
        """The temperature, float32 scalar."""
        return self.temperature()

    def __call__(self, batch):
        """Every part once, for initialisation: returns (speech, image, logits, tau)."""
        speech, image = (
            self.encode_speech(*speech_input(batch)),
            self.encode_image(image_input(batch)),
        )
        return speech, image, self.match(speech, image), self.tau()


def speech_input(batch):
    """Waveforms (n, S), or their tokens (n, T, C) from the feature cache, and the lengths (n,) in samples or tokens."""
    return batch["speech_tokens"] if "speech_tokens" in batch else batch["waveform"], batch[
        "speech_lengths"
    ]


def image_input(batch):
    """Images (n, H, W, 3) uint8, or their tokens (n, P, C) from the feature cache."""
    return batch["image_tokens"] if "image_tokens" in batch else batch["image"]


def _embedding(projections, tokens):
    """The branches' parts of the first token, each projected and normalised: (n, T, M W) -> (n, M D)."""
    parts = jnp.split(tokens[:, 0].astype(jnp.float32), len(projections), axis=-1)
    z = jnp.stack(
        [projection(part) for projection, part in zip(projections, parts, strict=True)], axis=1
    )  # (n, M, D)
    z = z * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), axis=-1, keepdims=True), 1e-12))
    return z.reshape(z.shape[0], -1) / math.sqrt(len(projections))
