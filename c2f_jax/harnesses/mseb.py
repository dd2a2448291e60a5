"""A run as an encoder of MSEB, Google's Massive Sound Embedding Benchmark, for speech and images.

Reference:
  https://github.com/google-research/mseb
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from c2f_jax.decoding.image_modes import Note
from c2f_jax.errors import UserError
from c2f_jax.harnesses.encode import encode_files
from c2f_jax.index import say_notes
from c2f_jax.inference import TrainedModel
from c2f_jax.items import File, wave_file

if TYPE_CHECKING:
    from mseb import types


class MsebEncoder:
    """The coarse stage (SIC) of a run, for MSEB's retrieval of images by speech and the reverse.

    It has the methods of MSEB's ``MultiModalEncoder``, so its runners take it. Sounds are converted
    and cut as by ``c2f evaluate``. What is odd is printed when a kind of it is first met;
    ``say_notes`` prints how many there were.

    Attributes:
      workdir: directory of the run.
      step: "best", "latest" or the number of a checkpoint.
      notes: name, and kind and detail, of each item that was converted, cut or odd.
    """

    def __init__(self, workdir: str | PathLike[str], step: str | int = "best") -> None:
        """Name a run, which ``setup`` loads.

        Args:
          workdir: directory of the run.
          step: "best", "latest" or the number of a checkpoint.
        """
        self.workdir, self.step = str(workdir), step
        self.notes: list[tuple[str, Note]] = []
        self._model: TrainedModel | None = None

    def setup(self) -> None:
        """Load the run, once.

        Raises:
          UserError: there is no such run.
        """
        if self._model is None:
            self._model = TrainedModel.load(self.workdir, self.step)

    def encode(
        self, batch: Sequence[types.Sound | types.Image]
    ) -> list[types.SoundEmbedding | types.ImageEmbedding]:
        """Encode sounds or images.

        Args:
          batch: objects of one kind.

        Returns:
          The embedding (1, D) of each, L2-normalized, for the whole sound or image.

        Raises:
          UserError: they are something else, or one cannot be used.
        """
        from mseb import types

        self.setup()
        assert self._model is not None
        if all(isinstance(item, types.Sound) for item in batch):
            kind = "speech"
        elif all(isinstance(item, types.Image) for item in batch):
            kind = "image"
        else:
            found = sorted({type(item).__name__ for item in batch})
            raise UserError(
                f"a batch of {' and '.join(found)}: c2f_jax encodes sounds, or images, of MSEB"
            )
        to_file: Callable[[Any], File] = _sound_file if kind == "speech" else _image_file
        files = ((str(item.context.id), to_file(item)) for item in batch)
        encoded, notes = encode_files(self._model, kind, files)
        self._note(notes)
        rows = np.asarray(encoded.embedding)[:, None]  # (n, 1, D)
        return [_embedding(item, row) for item, row in zip(batch, rows, strict=True)]

    def say_notes(self) -> None:
        """Print how many items were converted, cut or odd, and the first of them."""
        say_notes(self.notes)

    def get_encode_flops(self, data: Any) -> int | None:
        """Return None: MSEB's number of operations is not known."""
        return None

    def output_type(self) -> type:
        """Return the type of what sounds become."""
        from mseb import types

        return types.SoundEmbedding

    def _note(self, notes: list[tuple[str, Note]]) -> None:
        """Keep the notes; print those of a kind that is met for the first time."""
        known = {kind for _, (kind, _) in self.notes}
        say_notes(note for note in notes if note[1][0] not in known)
        self.notes += notes


def _embedding(item: Any, row: np.ndarray) -> types.SoundEmbedding | types.ImageEmbedding:
    """Return MSEB's record of an embedding (1, D)."""
    from mseb import types

    stats = types.EncodingStats(item.size_bytes, row.nbytes)
    if isinstance(item, types.Image):
        height, width = item.image.shape[:2]
        return types.ImageEmbedding(row, np.array([[0, height, 0, width]]), item.context, stats)
    seconds = np.array([[0.0, len(item.waveform) / item.context.sample_rate]])
    return types.SoundEmbedding(row, seconds, item.context, stats)


def _sound_file(sound: types.Sound) -> File:
    rate = int(sound.context.sample_rate)
    return wave_file(np.asarray(sound.waveform), rate, str(sound.context.id))


def _image_file(image: types.Image) -> File:
    pixels = np.asarray(image.image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"{image.context.id}: {pixels.dtype} of shape {pixels.shape} is no image; give "
            "(height, width, 3) uint8"
        )
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=1)  # to be read as files are
    return data.getvalue()
