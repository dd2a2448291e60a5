"""An encoded split: everything that retrieval takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

from c2f_jax.models.c2f import Encoded


@dataclass(frozen=True)
class EncodedSplit:
    """The encoded recordings and images of one split, on the host, unreadable items left out.

    Attributes:
      speech: encoded recordings, with numpy leaves: embedding (R, D), tokens (R, T, W), lengths
        (R,). Tokens and lengths may be None if only the coarse stage is wanted.
      image: encoded images: embedding (G, D), tokens (G, P, W), lengths (G,).
      speech_ids: (R,) identity of what each recording describes.
      image_ids: (G,) identity of each image; a recording and an image match if their ids are equal.
      recordings: (R,) row of each recording in the split; None for 0 .. R - 1.
      images: (G,) row of each image in the split; None for 0 .. G - 1.
    """

    speech: Encoded
    image: Encoded
    speech_ids: np.ndarray
    image_ids: np.ndarray
    recordings: np.ndarray = None  # type: ignore[assignment]
    images: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # The rows default to all rows; a frozen dataclass can only set them this way.
        if self.recordings is None:
            object.__setattr__(self, "recordings", np.arange(len(self.speech_ids)))
        if self.images is None:
            object.__setattr__(self, "images", np.arange(len(self.image_ids)))

    def select_recordings(self, rows: np.ndarray) -> EncodedSplit:
        """Return the split with some of its recordings and all its images.

        Args:
          rows: (r,) int, places in ``recordings``.
        """
        return dataclasses.replace(
            self,
            speech=jax.tree.map(lambda leaf: leaf[rows], self.speech),
            speech_ids=self.speech_ids[rows],
            recordings=self.recordings[rows],
        )

    def select_images(self, rows: np.ndarray) -> EncodedSplit:
        """Return the split with some of its images and the recordings that describe them.

        Args:
          rows: (g,) int, places in ``images``.
        """
        described = np.flatnonzero(np.isin(self.speech_ids, self.image_ids[rows]))
        fewer = dataclasses.replace(
            self,
            image=jax.tree.map(lambda leaf: leaf[rows], self.image),
            image_ids=self.image_ids[rows],
            images=self.images[rows],
        )
        return fewer.select_recordings(described)

    def __repr__(self) -> str:
        return f"EncodedSplit({len(self.speech_ids):,} recordings, {len(self.image_ids):,} images)"
