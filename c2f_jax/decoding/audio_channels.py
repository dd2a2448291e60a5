"""Several channels to one: which of them hold sound, and whether their mean would lose it."""

import numpy as np

from c2f_jax.decoding.audio_streams import Note

_RATE = 2_000  # Hz that channels are compared at; what is above half of it is folded below
_LENGTH = 512  # samples of a stretch at that rate, a quarter of a second
_BANDS = (50, 102)  # bins of 3.9 Hz where bands begin: above hum, up to 1 kHz
_WINDOW = np.hanning(_LENGTH).astype(np.float32)
_TOGETHER = 64 * _LENGTH  # samples a channel transformed at once
_SILENT = 1e-6  # of the power of the loudest channel: a channel without sound
_CANCELLED = 0.5  # of the power that unrelated channels leave in their sum, in all of a recording
_LOST = 0.2  # the same, in one band of a stretch
_LOST_SHARE = 0.1  # of the power of a recording, in such bands


class ChannelMeter:
    """Compares channels, in bands of stretches, while a recording is read.

    A loud hum that channels share hides speech in opposite phase, and so do stretches in phase
    those that are not: neither shows in the variance of the whole mean.
    """

    def __init__(self, rate: int) -> None:
        """Start.

        Args:
          rate: Hz.
        """
        self._step = max(rate // _RATE, 1)
        self._waiting: list[np.ndarray] = []
        self._count = 0
        self._power: list[np.ndarray] = []  # (stretches, channels, bands)
        self._joint: list[np.ndarray] = []  # (stretches, bands), of the sum of the channels

    def add(self, block: np.ndarray) -> None:
        """Take the samples (n, channels) that follow."""
        whole = len(block) // self._step
        if not whole:
            return
        channels = block.shape[1]
        if channels == 2 and block.flags.c_contiguous:  # both at once, several times as fast
            block = block.view(np.complex64)
        small = block[: whole * self._step : self._step].copy()
        for start in range(1, self._step):
            small += block[start : whole * self._step : self._step]
        self._waiting.append(small.view(np.float32).reshape(whole, channels))
        self._count += whole
        if self._count >= _TOGETHER:
            self._measure(self._count // _LENGTH)

    def judge(self) -> tuple[int | None, float, list[Note]]:
        """Decide between the mean of the channels and one of them.

        Returns:
          The channel to take alone or None for the mean, what to multiply the mean by, and notes.
        """
        if self._count:
            self._measure(-(-self._count // _LENGTH))
        if not self._power:
            return None, 1.0, []
        power, joint = np.concatenate(self._power), np.concatenate(self._joint)
        of_channels, total = power.sum(axis=(0, 2)), power.sum(axis=1)
        # Of equally loud ones the first, whatever noise they have.
        loudest = int(np.argmax(of_channels >= 0.99 * of_channels.max()))
        if not 0 < total.sum() < np.inf:  # silent, or refused later
            return None, 1.0, []

        # Unrelated channels leave the sum of their powers in their sum, equal ones more.
        lost = total[joint < _LOST * total].sum() / total.sum()
        if joint.sum() < _CANCELLED * total.sum() or lost > _LOST_SHARE:
            share = 1 - np.minimum(joint, total).sum() / total.sum()
            detail = (
                f"{len(of_channels)} channels, whose mean would lose {share:.0%} of the sound; "
                f"channel {loudest + 1} was taken alone"
            )
            return loudest, 1.0, [("out of phase", detail)]
        silent = int((of_channels < _SILENT * of_channels[loudest]).sum())
        if not silent:
            return None, 1.0, []
        note = ("silent channel", f"{silent} of {len(of_channels)}, left out of the mean")
        return None, len(of_channels) / (len(of_channels) - silent), [note]

    def _measure(self, stretches: int) -> None:
        """Take the power of stretches, the last of which may be short."""
        small = np.concatenate(self._waiting)
        self._waiting = [small[stretches * _LENGTH :]]
        self._count = len(self._waiting[0])
        part = np.zeros((stretches * _LENGTH, small.shape[1]), np.float32)
        part[: len(small)] = small[: len(part)]
        part = part.reshape(stretches, _LENGTH, -1).transpose(0, 2, 1) * _WINDOW
        # (stretches, channels, bins)
        spectra = np.fft.rfft(part)[..., _BANDS[0] :]
        starts = np.subtract(_BANDS, _BANDS[0])
        self._power.append(np.add.reduceat(_squares(spectra), starts, axis=-1))
        self._joint.append(np.add.reduceat(_squares(spectra.sum(axis=1)), starts, axis=-1))


def _squares(values: np.ndarray) -> np.ndarray:
    return values.real**2 + values.imag**2
