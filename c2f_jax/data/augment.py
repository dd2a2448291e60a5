"""Training-time changes of pictures and recordings: pure functions of (arrays, options, random generator)."""

import dataclasses
import re
from dataclasses import field

import numpy as np
from PIL import Image

from c2f_jax.data.images import resize_box
from c2f_jax.errors import UserError

SAMPLE_RATE = 16_000
SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How training images and recordings are varied.

    Everything is off by default, and always off in evaluation. The metadata of a field are its range.

    Attributes:
      crop_area: smallest share of the image's area that a random resized crop keeps; 1 for the
        center square.
      crop_ratio: largest aspect ratio of that crop; its inverse is the smallest.
      flip: probability of mirroring an image, unless one of its captions is unknown or mentions left
        or right.
      jitter: brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter.
      speed: duration and pitch are divided by 1 - speed to 1 + speed.
      gain_db: largest change of the level, up or down, in decibels.
      noise_db: (lowest, highest) signal-to-noise ratio of added white noise, in decibels; () for none.
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
        """Check the values.

        Raises:
          UserError: a value is out of range.
        """
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            low, high = option.metadata.get("min"), option.metadata.get("max")
            if low is not None and not low <= value <= high:
                raise UserError(
                    f"data.augment.{option.name}={value}: must be between {low:g} and {high:g}"
                )
        if len(self.noise_db) not in (0, 2) or list(self.noise_db) != sorted(self.noise_db):
            raise UserError(
                f"data.augment.noise_db={self.noise_db}: must be (lowest, highest), or () for no noise"
            )


def augment_picture(
    rgb: np.ndarray, size: int, options: AugmentConfig, rng: np.random.Generator, *, may_flip: bool
) -> np.ndarray:
    """A random square of a picture: uint8 (H, W, 3) -> uint8 (size, size, 3).

    Random resized crop (area and log aspect ratio uniform, ten tries, then the centre square), mirrored, jittered.
    """
    height, width = rgb.shape[:2]
    box = None
    for _ in range(10 if options.crop_area < 1 else 0):
        area = rng.uniform(options.crop_area, 1.0) * height * width
        ratio = np.exp(rng.uniform(-1, 1) * np.log(options.crop_ratio))
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if w <= width and h <= height:
            box = (rng.uniform(0, width - w), rng.uniform(0, height - h), w, h)
            break
    if box is None:
        side = min(height, width)
        box = ((width - side) / 2, (height - side) / 2, side, side)
    picture = resize_box(Image.fromarray(rgb), box, size)
    if may_flip and rng.random() < options.flip:
        picture = picture[:, ::-1]
    if options.jitter:
        picture = _jitter(picture, 1 + rng.uniform(-options.jitter, options.jitter, 3))
    return np.ascontiguousarray(picture)


def _jitter(picture: np.ndarray, factors: np.ndarray) -> np.ndarray:
    brightness, contrast, saturation = factors.astype(np.float32)
    values = picture.astype(np.float32) * brightness
    values = (values - values.mean()) * contrast + values.mean()
    grey = values @ np.array([0.299, 0.587, 0.114], np.float32)
    values = (values - grey[..., None]) * saturation + grey[..., None]
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def augment_wave(wave: np.ndarray, options: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """A varied recording: int16 (samples,) at 16 kHz -> int16 (other samples,); speed, reverb, masks, noise, gain.

    Masks mute stretches of time and bands of frequency of the waveform, as SpecAugment does of the spectrogram.
    """
    values = wave.astype(np.float32) / 32768
    if options.speed:
        import soxr

        factor = rng.uniform(1 - options.speed, 1 + options.speed)
        # Played at another rate; at least one frame must be left of the shortest recordings.
        faster = soxr.resample(values, SAMPLE_RATE, SAMPLE_RATE / factor, quality="MQ")
        values = faster if len(faster) >= 400 else values
    if options.reverb_seconds and rng.random() < options.reverb:
        values = _reverberate(values, rng.uniform(0.1, 1.0) * options.reverb_seconds, rng)
    for _ in range(options.frequency_masks):
        values = _mute_band(values, rng.uniform(0, options.frequency_mask_octaves), rng)
    for _ in range(options.time_masks):
        length = int(rng.uniform(0, min(options.time_mask_seconds * SAMPLE_RATE, len(values) / 2)))
        start = rng.integers(len(values) - length + 1)
        values[start : start + length] = 0.0
    if options.noise_db:
        level = np.sqrt(np.mean(values**2)) * 10 ** (-rng.uniform(*options.noise_db) / 20)
        values = values + level * rng.standard_normal(len(values), dtype=np.float32)
    if options.gain_db:
        values = values * np.float32(10 ** (rng.uniform(-options.gain_db, options.gain_db) / 20))
    peak = float(np.abs(values).max(initial=0.0))
    if peak > 1:  # quieter rather than clipped
        values = values / peak
    return np.clip(np.round(values * 32768), -32768, 32767).astype(np.int16)


def _reverberate(values: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Convolved with exponentially fading noise, 60 dB in `seconds`, the direct sound first; of the same length."""
    from scipy.signal import fftconvolve

    times = np.arange(max(int(seconds * SAMPLE_RATE), 1)) / SAMPLE_RATE
    room = rng.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    room *= 0.5 / max(float(np.sqrt(np.sum(room**2))), 1e-9)
    room[0] = 1.0
    return fftconvolve(values, room.astype(np.float32))[: len(values)].astype(np.float32)


def _mute_band(values: np.ndarray, octaves: float, rng: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft(values)
    low = 100 * 2 ** rng.uniform(0, np.log2(70) - octaves)  # 100 Hz to 7 kHz
    first, last = (round(f * len(values) / SAMPLE_RATE) for f in (low, low * 2**octaves))
    spectrum[first:last] = 0
    return np.fft.irfft(spectrum, len(values)).astype(np.float32)


def speaks_of_sides(captions: list[str]) -> bool:
    """Whether a mirrored picture might no longer be what its captions say; also where a caption is unknown.

    >>> speaks_of_sides(["a dog on the left"]), speaks_of_sides(["a bright dog"]), speaks_of_sides(["a dog", ""])
    (True, False, True)
    """
    return any(not caption or SIDES.search(caption) for caption in captions)
