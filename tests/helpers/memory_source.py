"""A PairSource in memory whose samples and pixels tell which row they are of, and batches of it."""

import io
import itertools
import threading

import numpy as np
import soundfile
from PIL import Image

from c2f_jax.data import loader
from c2f_jax.data.source import PairSource


class Memory(PairSource):
    """Recordings whose samples all equal (index + 1) / 1024, images whose pixels all equal the
    row."""

    def __init__(self, lengths, per_image=2, broken=(), broken_images=()):
        count = len(lengths)
        self.lengths, self.broken, self.broken_images = lengths, broken, broken_images
        self.reads, self._lock = 0, threading.Lock()
        images = -(-count // per_image)
        super().__init__(
            "memory",
            "train",
            image_index=np.arange(count) // per_image,
            image_ids=np.arange(images) + 100,
            num_samples=lengths,
        )

    def recording(self, index):
        with self._lock:
            self.reads += 1
        audio = b"damaged" if index in self.broken else wav(self.wave(index))
        return {"audio": audio, "caption": f"caption {index}", "speaker": "someone"}

    def wave(self, index):
        return np.full(self.lengths[index], (index + 1) / 1024)

    def image(self, row):
        if row in self.broken_images:
            return b"damaged"
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (row, row, row)).save(buffer, "PNG")
        return buffer.getvalue()

    def image_id(self, row):
        return f"picture {row}"


def wav(wave):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16_000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def take(source, count, start_step=0, **options):
    values = {
        "batch_size": 8,
        "image_size": 8,
        "bucket_seconds": (0.1,),
        "seed": 3,
        "threads": 0,
        **options,
    }
    batches = loader.train_batches(source, loader.BatchOptions(**values), start_step=start_step)
    return list(itertools.islice(batches, count))


def same(a, b):
    assert [step for step, _ in a] == [step for step, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def png(image, kind="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()
