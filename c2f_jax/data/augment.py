"""Training-time changes of images and recordings: functions of (array, options, generator)."""

import dataclasses
import re
from dataclasses import field

import numpy as np
from PIL import Image

from c2f_jax.data.source import MIN_SAMPLES
from c2f_jax.decoding.audio import SAMPLE_RATE, to_pcm16
from c2f_jax.decoding.images import Box, center_square, resize_box
from c2f_jax.errors import UserError

# After these the center square is taken: in a long strip no crop may fit.
CROP_TRIES = 10
# Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Also "leftmost", "right-hand" and so on.
SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How training images and recordings are varied.

    Everything is off by default, and always off in evaluation.

    Attributes:
      crop_area: smallest share of the image's area that a random resized crop keeps; 1 for the
        center square.
      crop_ratio: largest aspect ratio of that crop; its inverse is the smallest.
      flip: probability of mirroring an image, unless one of its captions is unknown or mentions
        left or right.
      jitter: brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter.
      speed: duration and pitch are divided by 1 - speed to 1 + speed.
      gain_db: largest change of the level, up or down, in decibels.
      noise_db: (lowest, highest) signal-to-noise ratio of added white noise, in decibels; () for
        none.
      reverb_seconds: longest reverberation time (60 dB) of a synthetic room; 0 for none.
      reverb: probability of reverberation.
      time_masks: number of muted stretches.
      time_mask_seconds: length of the longest muted stretch.
      frequency_masks: number of muted bands.
      frequency_mask_octaves: width of the widest muted band.
    """

    crop_area: float = field(default=1.0, metadata={"min": 0.05, "max": 1.0})
    crop_ratio: float = field(default=1.33, metadata={"min": 1.0, "max": 4.0})
    flip: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})
    jitter: float = field(default=0.0, metadata={"min": 0.0, "max": 0.9})
    speed: float = field(default=0.0, metadata={"min": 0.0, "max": 0.5})
    gain_db: float = field(default=0.0, metadata={"min": 0.0, "max": 40.0})
    noise_db: tuple[float, ...] = ()
    reverb_seconds: float = field(default=0.0, metadata={"min": 0.0, "max": 5.0})
    reverb: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})
    time_masks: int = field(default=0, metadata={"min": 0, "max": 20})
    time_mask_seconds: float = field(default=0.2, metadata={"min": 0.0, "max": 10.0})
    frequency_masks: int = field(default=0, metadata={"min": 0, "max": 20})
    frequency_mask_octaves: float = field(default=0.5, metadata={"min": 0.0, "max": 5.0})

    @property
    def varies_images(self) -> bool:
        """Whether images are varied."""
        return self.crop_area < 1 or self.flip > 0 or self.jitter > 0

    @property
    def varies_speech(self) -> bool:
        """Whether recordings are varied."""
        return bool(
            self.speed
            or self.gain_db
            or self.noise_db
            or self.reverb_seconds
            or self.time_masks
            or self.frequency_masks
        )

    def speech_options(self) -> dict[str, float | list[float]]:
        """Return the options that recordings are varied by, as JSON holds them."""
        values = dataclasses.asdict(self)
        for name in ("crop_area", "crop_ratio", "flip", "jitter"):
            del values[name]
        values["noise_db"] = list(self.noise_db)
        return values

    def check(self) -> None:
        """Check what the ranges of the fields cannot express.

        Raises:
          UserError: noise_db is not a pair.
        """
        if len(self.noise_db) not in (0, 2) or list(self.noise_db) != sorted(self.noise_db):
            raise UserError(
                f"data.augment.noise_db={self.noise_db}: must be (lowest, highest), or () for none"
            )


def augment_image(
    rgb: np.ndarray, size: int, options: AugmentConfig, rng: np.random.Generator, *, may_flip: bool
) -> np.ndarray:
    """Cut a random square out of an image; mirror and jitter it.

    Args:
      rgb: uint8 (H, W, 3).
      size: side of the square in pixels.
      options: how much to vary.
      rng: random generator.
      may_flip: whether the image may be mirrored.

    Returns:
      uint8 (size, size, 3).
    """
    box = _random_box(rgb.shape[1], rgb.shape[0], options, rng)

    image = resize_box(Image.fromarray(rgb), box, size)
    if may_flip and rng.random() < options.flip:
        image = image[:, ::-1]
    if options.jitter:
        image = _jitter(image, 1 + rng.uniform(-options.jitter, options.jitter, 3))
    return np.ascontiguousarray(image)


def _random_box(width: int, height: int, options: AugmentConfig, rng: np.random.Generator) -> Box:
    """Draw a crop, its area and the log of its aspect ratio uniform.

    It is the center square where no crop that fits is drawn in some tries.
    """
    if options.crop_area < 1:
        for _ in range(CROP_TRIES):
            area = rng.uniform(options.crop_area, 1.0) * height * width
            ratio = np.exp(rng.uniform(-1, 1) * np.log(options.crop_ratio))
            w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
            if w <= width and h <= height:
                return rng.uniform(0, width - w), rng.uniform(0, height - h), w, h
    return center_square(width, height)


def _jitter(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Multiply brightness, contrast and saturation by the three factors."""
    brightness, contrast, saturation = factors.astype(np.float32)
    values = image.astype(np.float32) * brightness

    # Contrast is about the mean of the whole image, saturation about the gray of each pixel.
    values = (values - values.mean()) * contrast + values.mean()
    gray = values @ LUMA
    values = (values - gray[..., None]) * saturation + gray[..., None]
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def augment_wave(wave: np.ndarray, options: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Vary a recording: speed, reverberation, masks, noise, gain.

    Masks mute stretches of time and bands of frequency of the waveform, as SpecAugment does of the
    spectrogram.

    Args:
      wave: int16 (samples,) at 16 kHz.
      options: how much to vary.
      rng: random generator.

    Returns:
      int16 (other samples,) at 16 kHz.
    """
    values = wave.astype(np.float32) / 32768
    if options.speed:
        factor = rng.uniform(1 - options.speed, 1 + options.speed)
        values = _change_speed(values, factor)

    # The room comes before the masks and the noise, as it would in a recording.
    if options.reverb_seconds and rng.random() < options.reverb:
        values = _reverberate(values, rng.uniform(0.1, 1.0) * options.reverb_seconds, rng)

    # Bands before stretches: muting a band would spread sound into a muted stretch.
    for _ in range(options.frequency_masks):
        values = _mute_band(values, rng.uniform(0, options.frequency_mask_octaves), rng)
    for _ in range(options.time_masks):
        length = int(rng.uniform(0, min(options.time_mask_seconds * SAMPLE_RATE, len(values) / 2)))
        start = rng.integers(len(values) - length + 1)
        values[start : start + length] = 0.0

    # Noise is relative to the level of the recording after the changes above.
    if options.noise_db:
        lowest, highest = options.noise_db
        level = np.sqrt(np.mean(values**2)) * 10 ** (-rng.uniform(lowest, highest) / 20)
        values = values + level * rng.standard_normal(len(values), dtype=np.float32)
    if options.gain_db:
        values = values * np.float32(10 ** (rng.uniform(-options.gain_db, options.gain_db) / 20))

    # Quieter rather than clipped.
    peak = float(np.abs(values).max(initial=0.0))
    if peak > 1:
        values = values / peak
    return to_pcm16(values)


def _change_speed(values: np.ndarray, factor: float) -> np.ndarray:
    """Play faster by a factor, at a higher pitch, unless less than a frame would be left."""
    import soxr

    faster = soxr.resample(values, SAMPLE_RATE, SAMPLE_RATE / factor, quality="MQ")
    return faster if len(faster) >= MIN_SAMPLES else values


def _reverberate(values: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Convolve with noise that fades by 60 dB in the given seconds, after the direct sound."""
    from scipy.signal import fftconvolve

    times = np.arange(max(int(seconds * SAMPLE_RATE), 1)) / SAMPLE_RATE

    room = rng.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    room *= 0.5 / max(float(np.sqrt(np.sum(room**2))), 1e-9)
    room[0] = 1.0  # the direct sound
    return fftconvolve(values, room.astype(np.float32))[: len(values)].astype(np.float32)


def _mute_band(values: np.ndarray, octaves: float, rng: np.random.Generator) -> np.ndarray:
    """Mute a band of the given width that begins between 100 Hz and 7 kHz."""
    spectrum = np.fft.rfft(values)
    low = 100 * 2 ** rng.uniform(0, np.log2(70) - octaves)
    high = low * 2**octaves
    first, last = round(low * len(values) / SAMPLE_RATE), round(high * len(values) / SAMPLE_RATE)

    spectrum[first:last] = 0
    return np.fft.irfft(spectrum, len(values)).astype(np.float32)


def mentions_sides(captions: list[str]) -> bool:
    """Return whether mirroring might make a caption wrong.

    >>> mentions_sides(["a dog on the left"])
    True
    >>> mentions_sides(["a bright dog"])
    False
    >>> mentions_sides(["a dog", ""])
    True

    Args:
      captions: the captions of an image; "" for an unknown one.

    Returns:
      Whether one is unknown, or names the left or the right.
    """
    return any(not caption or SIDES.search(caption) for caption in captions)
