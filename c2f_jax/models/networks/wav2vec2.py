"""wav2vec 2.0, HuBERT and WavLM.

Strided convolutions over the waveform, a convolution for positions, a transformer.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from c2f_jax.models.encoder import NetworkOutput, TransformerEncoder
from c2f_jax.models.layers import BlockStyle, Dense, dropout, length_mask, span_mask
from c2f_jax.objectives.keys import Site, fold_keys

NORM_EPSILON = 1e-5


def normalize_waveform(waveform: jax.Array, lengths: jax.Array, epsilon: float = 1e-7) -> jax.Array:
    """Scale each utterance to mean 0 and variance 1; what lies past its end becomes 0.

    x_t = (x_t - mean) / sqrt(variance + epsilon),  t < length

    Args:
      waveform: (n, S) float32.
      lengths: (n,) valid samples.
      epsilon: added to the variance.

    Returns:
      (n, S) float32.
    """
    valid = length_mask(lengths, waveform.shape[1])
    mean, variance = _moments(waveform[..., None], valid)
    normalized = (waveform - mean[..., 0]) * jax.lax.rsqrt(variance[..., 0] + epsilon)
    return jnp.where(valid, normalized, 0.0)


class ConvFeatures(nn.Module):
    """The convolutional feature encoder.

    Attributes:
      widths: channels of each convolution; none of them is padded.
      kernels: kernel size of each convolution.
      strides: stride of each convolution.
      layer_norm: a layer norm after each convolution (large models); False for one group norm after
        the first, with as many groups as channels, that is a norm of each channel over time (base
        models).
      bias: whether convolutions have a bias (large models, except WavLM's).
      masked_norm: the group norm counts only the frames of the utterance itself, which makes the
        features independent of the padding; False counts the padding too, as the published code
        does.
      dtype: compute type.
    """

    widths: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    layer_norm: bool = False
    bias: bool = False
    masked_norm: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, waveform: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Run the convolutions.

        Args:
          waveform: (n, S).
          lengths: (n,) valid samples.

        Returns:
          (n, T, C) with T = floor((S - 400) / 320) + 1 as published, and (n,) int32 frames.
        """
        x = waveform[..., None].astype(self.dtype)
        shapes = zip(self.widths, self.kernels, self.strides, strict=True)
        for layer, (width, kernel, stride) in enumerate(shapes):
            x = nn.Conv(
                width,
                (kernel,),
                strides=(stride,),
                padding="VALID",
                use_bias=self.bias,
                dtype=self.dtype,
                name=f"conv_{layer}",
            )(x)
            # Frames whose window lies within the utterance.
            lengths = jnp.maximum((lengths - kernel) // stride + 1, 0)
            if self.layer_norm:
                x = nn.LayerNorm(NORM_EPSILON, dtype=self.dtype, name=f"norm_{layer}")(x)
            elif layer == 0:
                x = self._norm_over_time(x, lengths)
            # Fused into the next convolution, the exact GELU takes the TPU compiler 14 s a layer.
            x = jax.lax.optimization_barrier(nn.gelu(x, approximate=False))
        return x, lengths.astype(jnp.int32)

    def _norm_over_time(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Normalize each channel over time: (n, T, C), (n,) -> (n, T, C)."""
        scale = self.param("norm_scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("norm_bias", nn.initializers.zeros, (x.shape[-1],))
        counted = lengths if self.masked_norm else jnp.full_like(lengths, x.shape[1])
        mean, variance = _moments(x.astype(jnp.float32), length_mask(counted, x.shape[1]))
        normalized = (x - mean) * jax.lax.rsqrt(variance + NORM_EPSILON) * scale + bias
        return normalized.astype(self.dtype)


class PositionConv(nn.Module):
    """Convolution over time in groups of channels, zeros past both ends.

    Attributes:
      size: K of the kernel (K, W / groups, W).
      groups: groups of channels; each sees itself alone.
      dtype: compute type.
    """

    size: int
    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, T, W) -> (n, T, W)."""
        width = x.shape[-1]
        shape = (self.size, width // self.groups, width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (width,))

        def convolve(x: jax.Array, kernel: jax.Array, pieces: int) -> jax.Array:
            parts, kernels = (jnp.split(y, pieces, axis=-1) for y in (x, kernel))
            convolved = []
            for part, part_kernel in zip(parts, kernels, strict=True):
                y = jax.lax.conv_general_dilated(
                    part,
                    part_kernel,
                    window_strides=(1,),
                    padding=((self.size // 2, (self.size - 1) // 2),),
                    dimension_numbers=("NHC", "HIO", "NHC"),
                    feature_group_count=self.groups // pieces,
                )
                convolved.append(y)
            return jnp.concatenate(convolved, axis=-1)

        # XLA's gradient of a grouped convolution is very slow on the CPU: 2.9 s against 0.3 s as
        # one convolution per group, for HuBERT base's 16 groups and 2 x 4 s on one core.
        y = jax.lax.platform_dependent(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            cpu=functools.partial(convolve, pieces=self.groups),
            default=functools.partial(convolve, pieces=1),
        )
        return y + bias.astype(self.dtype)


class Wav2Vec2(TransformerEncoder):
    """wav2vec 2.0, HuBERT or WavLM as published; the defaults are HuBERT base.

    Attributes:
      conv_widths: see ``ConvFeatures``.
      conv_kernels: see ``ConvFeatures``.
      conv_strides: see ``ConvFeatures``.
      conv_layer_norm: see ``ConvFeatures``.
      conv_bias: see ``ConvFeatures``.
      masked_norm: see ``ConvFeatures``.
      normalize: scale waveforms to mean 0 and variance 1 first; published with the weights, never
        to be guessed.
      pre_norm: norms before the sub-layers (large models) instead of after (base).
      position_kernel: size of the convolution that takes the place of position embeddings.
      position_groups: groups of that convolution's channels.
      position_buckets: buckets of the gated relative positions (WavLM); see ``BlockStyle``.
      position_distance: largest distance of these positions; see ``BlockStyle``.
      layer_drop: probability of skipping a block in training.
      mask_time: share of frames that the mask embedding replaces in training.
      mask_time_length: frames in a span.
      mask_channels: share of channels that are set to 0 in training.
      mask_channels_length: channels in a span.

    Reference:
      Baevski et al. 2020 (wav2vec 2.0); Hsu et al. 2021 (HuBERT); Chen et al. 2022 (WavLM).
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    conv_widths: tuple[int, ...] = ConvFeatures.widths
    conv_kernels: tuple[int, ...] = ConvFeatures.kernels
    conv_strides: tuple[int, ...] = ConvFeatures.strides
    conv_layer_norm: bool = False
    conv_bias: bool = False
    masked_norm: bool = True
    normalize: bool = False
    pre_norm: bool = False
    position_kernel: int = 128
    position_groups: int = 16
    position_buckets: int = 0
    position_distance: int = BlockStyle.position_distance
    layer_drop: float = 0.0
    mask_time: float = 0.0
    mask_time_length: int = 10
    mask_channels: float = 0.0
    mask_channels_length: int = 10

    summary = "mean"

    def samples_per_token(self) -> int:
        """Return the samples from frame to frame."""
        return math.prod(self.conv_strides)

    @nn.compact
    def __call__(
        self, waveform: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
    ) -> NetworkOutput:
        """Run the network.

        Args:
          waveform: (n, S) float32 at 16 kHz.
          lengths: (n,) valid samples.
          keys: (n,) typed keys for dropout and masks.
        """
        if self.normalize:
            waveform = normalize_waveform(waveform, lengths)
        x, lengths = ConvFeatures(
            self.conv_widths,
            self.conv_kernels,
            self.conv_strides,
            self.conv_layer_norm,
            self.conv_bias,
            self.masked_norm,
            self.dtype,
            name="conv",
        )(waveform, lengths)

        x = nn.LayerNorm(NORM_EPSILON, dtype=self.dtype, name="feature_norm")(x)
        # (n, T, C) . (C, W) -> (n, T, W)
        x = Dense(self.width, dtype=self.dtype, name="feature_projection")(x)
        valid = length_mask(lengths, x.shape[1])
        x = self._masked(x, valid, keys)

        # The convolution over positions reaches past the end: the reference has zeros there, so
        # padding goes unseen.
        x = jnp.where(valid[..., None], x, 0)
        positions = PositionConv(
            self.position_kernel, self.position_groups, self.dtype, name="position_conv"
        )(x)
        x = x + nn.gelu(positions, approximate=False)
        if not self.pre_norm:
            x = nn.LayerNorm(NORM_EPSILON, dtype=self.dtype, name="input_norm")(x)
        x = dropout(x, self.dropout_rate, fold_keys(keys, Site.INPUT_DROPOUT))

        style = BlockStyle(
            self.pre_norm,
            "gelu",
            NORM_EPSILON,
            position_buckets=self.position_buckets,
            position_distance=self.position_distance,
        )
        transformer = self._transformer(style=style, layer_drop=self.layer_drop)
        x, hidden = transformer(x, lengths, keys)
        return NetworkOutput(x, lengths, hidden)

    def _masked(self, x: jax.Array, valid: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Hide spans of frames and of channels in training: (n, T, W), (n, T) -> (n, T, W)."""
        # The parameter is published with the weights, whether it is used or not.
        mask_embedding = self.param("mask_embedding", nn.initializers.uniform(), (self.width,))
        if keys is not None and self.mask_time:
            frame_keys = fold_keys(keys, Site.FRAME_MASK)
            masked = span_mask(frame_keys, x.shape[1], self.mask_time, self.mask_time_length, valid)
            x = jnp.where(masked[..., None], mask_embedding.astype(x.dtype), x)
        if keys is not None and self.mask_channels:
            channel_keys = fold_keys(keys, Site.CHANNEL_MASK)
            masked = span_mask(
                channel_keys, self.width, self.mask_channels, self.mask_channels_length
            )
            x = jnp.where(masked[:, None], 0, x)
        return x


def _moments(x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each channel's mean and variance: (n, T, C), (n, T) bool -> (n, 1, C) twice."""
    weights = valid[..., None].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
    mean = jnp.sum(x * weights, axis=1, keepdims=True) / count
    return mean, jnp.sum(jnp.square(x - mean) * weights, axis=1, keepdims=True) / count
