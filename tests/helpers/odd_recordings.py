"""A source with recordings as people have them: other rates, two channels, longer than the model
hears."""

import io

import numpy as np
import soundfile
from helpers.memory_source import Memory, png

RATES = (16_000, 8_000, 44_100)  # of recording 0, 1, 2, and so on


class OddRecordings(Memory):
    """Noise colored by its image, from 0.3 to 1.2 s; every fourth recording has two channels."""

    def __init__(self, count=24, per_image=2):
        super().__init__(np.random.default_rng(5).integers(4800, 19_000, count), per_image)

    def file(self, index, kind="WAV"):
        rng = np.random.default_rng(index)
        rate = RATES[index % len(RATES)]
        time = np.arange(self.lengths[index] * rate // 16_000) / rate
        wave = 0.3 * np.sin(2 * np.pi * (200 + 150 * self.image_index[index]) * time)
        wave = wave + 0.05 * rng.standard_normal(len(time))
        if index % 4 == 0:
            wave = np.stack([wave, 0.5 * wave], axis=1)
        data = io.BytesIO()
        soundfile.write(data, wave, rate, format=kind, subtype="PCM_16")
        return data.getvalue()

    def recording(self, index):
        return {"audio": self.file(index), "caption": f"caption {index}", "speaker": "someone"}

    def image(self, row):
        return png(np.random.default_rng(row).integers(0, 256, (9, 12, 3), np.uint8))
