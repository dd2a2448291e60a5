"""An encoded split, as retrieval takes it."""

from dataclasses import dataclass

import numpy as np

from c2f_jax.models.c2f import Encoded


@dataclass(frozen=True)
class EncodedSplit:
    """Everything of one split that retrieval needs, on the host, bad items left out.

    Attributes:
      speech, image: Encoded with numpy leaves.
      recordings: (R,) rows of the split's recordings that could be read.
      images: (G,) rows of its images.
      speech_ids, image_ids: (R,), (G,) identities; equal means right.
    """

    speech: Encoded
    image: Encoded
    recordings: np.ndarray
    images: np.ndarray
    speech_ids: np.ndarray
    image_ids: np.ndarray
