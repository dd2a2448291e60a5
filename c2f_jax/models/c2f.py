"""The C2F model: two encoders with projections for SIC, a multimodal encoder for SIM, and tau."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from c2f_jax.models.encoder import branch_projections, project
from c2f_jax.objectives.keys import Site, fold_keys
from c2f_jax.objectives.pairs import Features


class Tokens(NamedTuple):
    """Token sequences: what matching reads of an encoded batch.

    Attributes:
      tokens: (n, T, W).
      lengths: (n,) int32 valid tokens.
    """

    tokens: jax.Array
    lengths: jax.Array


class Encoded(NamedTuple):
    """One modality of a batch.

    Attributes:
      embedding: (n, D) float32, the L2-normalized projection z of the [CLS]; (n, M D) with M
        branches.
      tokens: (n, T, W), the token sequence H, [CLS] first; (n, T, M W) with M branches.
      lengths: (n,) int32, valid tokens.
    """

    embedding: jax.Array
    tokens: jax.Array
    lengths: jax.Array

    @property
    def features(self) -> Features:
        """The embedding and the Tokens, as ``c2f_losses`` takes them."""
        return Features(self.embedding, Tokens(self.tokens, self.lengths))


class Outputs(NamedTuple):
    """Every output of the model for n pairs.

    Attributes:
      speech: the encoded recordings.
      image: the encoded images.
      logits: (n, 2), SIM's "no match" and "match".
      tau: scalar, the temperature.
    """

    speech: Encoded
    image: Encoded
    logits: jax.Array
    tau: jax.Array


class Temperature(nn.Module):
    """The learned temperature tau = exp(log_tau) that divides similarities.

    The logarithm is learned, as in CLIP: a step of Adam at the encoders' learning rate would be a
    large share of tau.

    Attributes:
      initial: tau at step 0.
    """

    initial: float = 0.07

    @nn.compact
    def __call__(self) -> jax.Array:
        """Return tau, a float32 scalar."""
        return jnp.exp(self.param("log_tau", nn.initializers.constant(jnp.log(self.initial)), ()))


class C2FModel(nn.Module):
    """Coarse-to-fine speech-image model.

    Per-example ``keys`` (n,) turn dropout on; with None the model is deterministic.

    Attributes:
      speech_encoder: (waveform, lengths, keys) -> tokens, lengths.
      image_encoder: (image, keys) -> tokens, lengths.
      multimodal_encoder: (speech tokens, lengths, image tokens, lengths, keys) -> logits (n, 2).
      embedding_dim: D.
      branches: M, the same as in the encoders.
      initial_tau: tau at step 0.
      frozen: paths of the parameters that are never trained, such as ("speech_encoder", "tower").
    """

    speech_encoder: nn.Module
    image_encoder: nn.Module
    multimodal_encoder: nn.Module
    embedding_dim: int = 256
    branches: int = 1
    initial_tau: float = 0.07
    frozen: tuple[tuple[str, ...], ...] = ()

    def setup(self) -> None:
        """Create the projections and the temperature."""
        self.speech_projections = branch_projections(
            "speech_projection", self.embedding_dim, self.branches
        )
        self.image_projections = branch_projections(
            "image_projection", self.embedding_dim, self.branches
        )
        self.temperature = Temperature(self.initial_tau)

    def encode_speech(
        self, waveform: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
    ) -> Encoded:
        """Encode recordings.

        Args:
          waveform: (n, S) float32 at 16 kHz, or cached tokens (n, T, C).
          lengths: (n,) valid samples or tokens.
          keys: (n,) typed keys for dropout.
        """
        keys = fold_keys(keys, Site.SPEECH_ENCODER)
        tokens, token_lengths = self.speech_encoder(waveform, lengths, keys)
        return Encoded(project(self.speech_projections, tokens[:, 0]), tokens, token_lengths)

    def encode_image(self, image: jax.Array, keys: jax.Array | None = None) -> Encoded:
        """Encode images.

        Args:
          image: (n, H, W, 3) uint8, or cached tokens (n, P, C).
          keys: (n,) typed keys for dropout.
        """
        keys = fold_keys(keys, Site.IMAGE_ENCODER)
        tokens, token_lengths = self.image_encoder(image, keys)
        return Encoded(project(self.image_projections, tokens[:, 0]), tokens, token_lengths)

    def match(
        self, speech: Tokens | Encoded, image: Tokens | Encoded, keys: jax.Array | None = None
    ) -> jax.Array:
        """Return the SIM logits (n, 2) of n pairs; embeddings are not used and may be None."""
        keys = fold_keys(keys, Site.MULTIMODAL_ENCODER)
        return self.multimodal_encoder(
            speech.tokens, speech.lengths, image.tokens, image.lengths, keys
        )

    def prepare_speech(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Compute what all pairs of a recording share; see ``MultimodalEncoder``."""
        return self.multimodal_encoder.prepare_speech(tokens, lengths)

    def prepare_image(self, tokens: jax.Array) -> jax.Array:
        """Compute what all pairs of an image share."""
        return self.multimodal_encoder.prepare_image(tokens)

    def match_prepared(
        self,
        speech: jax.Array,
        speech_lengths: jax.Array,
        image: jax.Array,
        image_lengths: jax.Array,
    ) -> jax.Array:
        """Return the SIM logits (n, 2) of n pairs whose sides are prepared."""
        return self.multimodal_encoder.match_prepared(speech, speech_lengths, image, image_lengths)

    @property
    def embedding_size(self) -> int:
        """Entries of an embedding, M D."""
        return self.branches * self.embedding_dim

    def tau(self) -> jax.Array:
        """Return the temperature, a float32 scalar."""
        return self.temperature()

    def __call__(self, batch: Mapping[str, Any]) -> Outputs:
        """Run every part once, for initialization."""
        # Linen creates parameters when a module is called: a part left out would have none.
        speech = self.encode_speech(*speech_input(batch))
        image = self.encode_image(image_input(batch))
        return Outputs(speech, image, self.match(speech, image), self.tau())


def speech_input(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Return a batch's speech and its lengths.

    Returns:
      Waveforms (n, S) and (n,) samples, or tokens (n, T, C) of the feature cache and (n,) tokens.
    """
    name = "speech_tokens" if "speech_tokens" in batch else "waveform"
    return batch[name], batch["speech_lengths"]


def image_input(batch: Mapping[str, Any]) -> jax.Array:
    """Return images (n, H, W, 3) uint8, or their tokens (n, P, C) of the feature cache."""
    name = "image_tokens" if "image_tokens" in batch else "image"
    return batch[name]
