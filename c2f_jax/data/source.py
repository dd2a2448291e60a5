"""Pairs of recordings and images by random access, and what of them cannot be used."""

import abc
import threading
from typing import TypedDict

import numpy as np

from c2f_jax.errors import UserError

SAMPLE_RATE = 16_000
MIN_SAMPLES = 400  # HuBERT's first frame needs as many


class Recording(TypedDict):
    """What is known of one recording; the audio is the encoded bytes or a path."""

    audio: bytes | str
    caption: str
    speaker: str


class BadItems:
    """The recordings and pictures of one split that could not be used: counted, named, and limited in share.

    Up to max_share of the items may be bad, and one of a hundred or more always; the next one raises `UserError`.
    """

    def __init__(self, where: str, total: int, max_share: float = 0.01):
        self.where, self.total, self.max_share = where, total, max_share
        self.allowed = max(int(max_share * total), 1 if total >= 100 else 0)
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Records one bad item (once, however often it is met); raises `UserError` when there are too many."""
        self.add_all({name: reason})

    def add_all(self, reasons: dict[str, str]) -> None:
        """Records several at once, so that the error counts them all."""
        with self._lock:
            for name, reason in reasons.items():
                self._reasons.setdefault(name, reason)
            if len(self._reasons) > self.allowed:
                raise UserError(self._too_many())

    def _too_many(self) -> str:
        shown = [f"  {name}: {reason}" for name, reason in list(self._reasons.items())[:5]]
        more = len(self._reasons) - len(shown)
        return "\n".join(
            [
                f"{self.where}: {len(self._reasons)} of {self.total} items cannot be used, which is more than the "
                f"{self.allowed} allowed (max_bad_share {self.max_share:g}):",
                *shown,
                *([f"  and {more} more"] if more else []),
                "mend or remove them, or raise max_bad_share",
            ]
        )

    @property
    def reasons(self) -> dict[str, str]:
        """Name of each bad item -> what is wrong with it."""
        with self._lock:
            return dict(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)


class PairSource(abc.ABC):
    """One split of a data set: M recordings, each of one of G pictures.

    name, split:   what it is called
    image_index:   int32 (M,) the picture (gallery row) of each recording
    image_ids:     int32 (G,) identity of each picture; pictures of equal identity are right answers for each other
    num_samples:   int32 (M,) length of each recording at 16 kHz, -1 where unknown
    bad_items:     what was left out, and why
    speech_features, image_features: FeatureCache to read tokens from instead of recordings or pictures; None for none
    speech_copies: FeatureCaches of varied copies of the recordings, that training draws from too
    image_resize:  how pictures become squares, and by way of which size (see `data.images.decode_image`)
    """

    speech_features = None
    image_features = None
    speech_copies = ()
    image_resize = ("square", 0)

    def __init__(
        self,
        name: str,
        split: str,
        *,
        image_index,
        image_ids,
        num_samples,
        bad_items: BadItems | None = None,
    ):
        self.name, self.split = name, split
        self.image_index = np.asarray(image_index, np.int32)
        self.image_ids = np.asarray(image_ids, np.int32)
        self.num_samples = np.asarray(num_samples, np.int32)
        if bad_items is None:  # an empty one is false
            bad_items = BadItems(f"{name}, split {split}", len(self.image_index))
        self.bad_items = bad_items

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def num_images(self) -> int:
        """G, the number of distinct pictures."""
        return len(self.image_ids)

    @abc.abstractmethod
    def recording(self, index: int) -> Recording:
        """Recording `index`, its audio still encoded."""

    @abc.abstractmethod
    def image(self, row: int) -> bytes | str:
        """Picture `row` of the gallery: the encoded bytes or a path."""

    @abc.abstractmethod
    def image_id(self, row: int) -> str:
        """The identity of picture `row` as the data set writes it."""

    def captions(self, identity: int) -> list[str]:
        """The captions of all recordings of one identity of `image_ids`."""
        rows = np.flatnonzero(self.image_ids[self.image_index] == identity)
        return [self.recording(int(index))["caption"] for index in rows]

    def recording_key(self, index: int) -> str:
        """What a feature cache calls recording `index`."""
        return f"{self.split}/{index}"

    def image_key(self, row: int) -> str:
        """What a feature cache calls picture `row`."""
        return f"{self.split}/{row}"

    def recording_name(self, index: int) -> str:
        """What error messages call recording `index`."""
        audio = self.recording(index)["audio"]
        return audio if isinstance(audio, str) else f"{self.name}, {self.split}, recording {index}"

    def image_name(self, row: int) -> str:
        """What error messages call picture `row`."""
        image = self.image(row)
        return (
            image
            if isinstance(image, str)
            else f"{self.name}, {self.split}, image {self.image_id(row)}"
        )


MANIFEST_SUFFIXES = (".jsonl", ".csv")
