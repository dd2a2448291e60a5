"""Random access to pairs of recordings and images, and the items that cannot be used."""

import abc
import dataclasses
import threading
import zlib
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from c2f_jax.data.feature_cache import FeatureCache
from c2f_jax.data.files import Stamp, content_hash, printable
from c2f_jax.errors import UserError

MIN_SAMPLES = 400  # HuBERT's first frame needs this many
MOST_SHOWN = 5  # bad items that an error lists


class Recording(TypedDict):
    """What is known about one recording."""

    audio: bytes | str  # the encoded bytes, or a path
    caption: str
    speaker: str


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What the model is given of each item: waveform and pixels, or tokens of a frozen network.

    Attributes:
      image_resize: how an image becomes a square, see `decoding.images.decode_image`.
      image_resize_side: length of the short side before the crop of "short_side"; 0 for the image
        size.
      speech_features: tokens to read instead of recordings; None for recordings.
      image_features: tokens to read instead of images; None for images.
      speech_copies: tokens of varied copies of the recordings, which training draws from too.
    """

    image_resize: str = "square"
    image_resize_side: int = 0
    speech_features: FeatureCache | None = None
    image_features: FeatureCache | None = None
    speech_copies: tuple[FeatureCache, ...] = ()


class BadItems:
    """The recordings and images of one split that could not be used: named, counted, and limited.

    At most max_share of the items may be bad; one always may if there are a hundred or more.
    """

    def __init__(self, where: str, total: int, max_share: float = 0.01) -> None:
        """Start with none.

        Args:
          where: what error messages call the split.
          total: number of items of the split.
          max_share: share of them that may be bad.
        """
        self.where, self.total, self.max_share = where, total, max_share
        # One bad file of a hundred must not stop a run, however small the share.
        self.allowed = max(int(max_share * total), 1 if total >= 100 else 0)
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Record a bad item, once, however often it is met.

        Args:
          name: the item.
          reason: what is wrong with it.

        Raises:
          UserError: there are too many.
        """
        self.add_all({name: reason})

    def add_all(self, reasons: Mapping[str, str]) -> None:
        """Record several bad items at once, so that the error counts them all.

        Args:
          reasons: name of an item -> what is wrong with it.

        Raises:
          UserError: there are too many.
        """
        with self._lock:
            # The first reason counts: a later one may only follow from it.
            for name, reason in reasons.items():
                self._reasons.setdefault(name, reason)
            if len(self._reasons) > self.allowed:
                raise UserError(self._too_many())

    def merge(self, parts: Sequence[dict[str, str]]) -> None:
        """Take what several processes recorded in the place of what this one did.

        Args:
          parts: the reasons of each process; the same and in the same order in all of them, so that
            they agree on an error.

        Raises:
          UserError: there are too many.
        """
        with self._lock:
            self._reasons = {}
        self.add_all(ChainMap(*parts))

    def _too_many(self) -> str:
        """Say how many there are, and list the first."""
        lines = [
            f"{self.where}: {len(self._reasons)} of {self.total} items cannot be used, more than "
            f"the {self.allowed} allowed (max_bad_share {self.max_share:g}):"
        ]
        for name, reason in list(self._reasons.items())[:MOST_SHOWN]:
            lines.append(f"  {name}: {reason}")
        if len(self._reasons) > MOST_SHOWN:
            lines.append(f"  and {len(self._reasons) - MOST_SHOWN} more")
        lines.append("fix or remove them, or raise max_bad_share")
        return "\n".join(lines)

    def text(self) -> str:
        """Say what was left out, an item a line under the count; "" if nothing was."""
        lines = [f"left out of {printable(self.where)}: {len(self):,} of {self.total:,} items"]
        for name, reason in self.reasons.items():
            lines.append(f"  {printable(name)}: {printable(reason)}")
        return "\n".join(lines) if len(self) else ""

    @property
    def reasons(self) -> dict[str, str]:
        """Name of each bad item -> what is wrong with it."""
        with self._lock:
            return dict(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)


class PairSource(abc.ABC):
    """One split of a data set: M recordings, each of one of G images.

    Attributes:
      name: name of the data set.
      split: name of the split.
      image_index: int32 (M,), the image (gallery row) of each recording. A caller may change it, to
        train with wrong captions.
      image_ids: int32 (G,), identity of each image; images of equal identity
        match each other.
      num_samples: int32 (M,), length of each recording at 16 kHz, -1 where unknown.
      bad_items: what was left out, and why.
      inputs: what the model is given of each item.
      origin: the name, and what the data were made from if that is something else.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        image_index: npt.ArrayLike,
        image_ids: npt.ArrayLike,
        num_samples: npt.ArrayLike,
        bad_items: BadItems | None = None,
        inputs: ModelInputs | None = None,
    ) -> None:
        """Create a source.

        Args:
          name: name of the data set.
          split: name of the split.
          image_index: (M,), see the attributes.
          image_ids: (G,), see the attributes.
          num_samples: (M,), see the attributes.
          bad_items: what was left out; None for nothing.
          inputs: what the model is given of each item; None for waveform and pixels.
        """
        self.name, self.split, self.origin = name, split, name

        self.image_index = np.asarray(image_index, np.int32)
        self.image_ids = np.asarray(image_ids, np.int32)
        self.num_samples = np.asarray(num_samples, np.int32)
        if bad_items is None:  # an empty one is false
            bad_items = BadItems(f"{name}, split {split}", len(self.image_index))
        self.bad_items = bad_items
        self.inputs = inputs or ModelInputs()

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def num_images(self) -> int:
        """G, the number of distinct images."""
        return len(self.image_ids)

    def identity(self) -> dict[str, int | str]:
        """Return what a resumed run, or a result, knows its data by.

        Neither folders nor the spelling of paths are in it. "crc32" is of the order, the image ids
        and the lengths as listed, "content" of what the files hold.
        """
        parts = (self.image_ids[self.image_index], self.image_index, self.num_samples)
        checksum = zlib.crc32(b"".join(part.tobytes() for part in parts))
        numbers = {"recordings": len(self), "images": self.num_images, "crc32": checksum}
        return numbers | {"content": self.content()}

    def content(self) -> str:
        """Return a text that differs if the items hold something else; "" if that is unknown."""
        return ""

    def shared_identity(self) -> str:
        """Describe an identity that more than half of the images share; "" if there is none.

        All of them count as correct answers to each other, so that recall means little.
        """
        ids, counts = np.unique(self.image_ids, return_counts=True)
        if self.num_images < 2 or 2 * counts.max() <= self.num_images:
            return ""
        name = self.image_id(int(np.flatnonzero(self.image_ids == ids[counts.argmax()])[0]))
        return f"{counts.max():,} of {self.num_images:,} images have the image_id {name!r}"

    @abc.abstractmethod
    def recording(self, index: int) -> Recording:
        """Return recording `index`, its audio still encoded."""

    @abc.abstractmethod
    def image(self, row: int) -> bytes | str:
        """Return image `row` of the gallery: the encoded bytes or a path."""

    @abc.abstractmethod
    def image_id(self, row: int) -> str:
        """Return the identity of image `row` as the data set writes it."""

    def captions(self, identity: int) -> list[str]:
        """Return the captions of all recordings of one identity of `image_ids`."""
        rows = np.flatnonzero(self.image_ids[self.image_index] == identity)
        return [self.recording(int(index))["caption"] for index in rows]

    def recording_key(self, index: int) -> str:
        """Return what a feature cache calls recording `index`."""
        return f"{self.split}/{index}"

    def image_key(self, row: int) -> str:
        """Return what a feature cache calls image `row`."""
        return f"{self.split}/{row}"

    def stamp(self, kind: str, index: int) -> Stamp:
        """Return what a feature cache knows the content of an item by.

        Args:
          kind: "speech" or "image".
          index: number of the recording, or row of the image.
        """

        def content() -> str:
            return content_hash(
                self.recording(index)["audio"] if kind == "speech" else self.image(index)
            )

        return Stamp([], content)

    def recording_name(self, index: int) -> str:
        """Return what error messages call recording `index`."""
        audio = self.recording(index)["audio"]
        return audio if isinstance(audio, str) else f"{self.name}, {self.split}, recording {index}"

    def image_name(self, row: int) -> str:
        """Return what error messages call image `row`."""
        image = self.image(row)
        if isinstance(image, str):
            return image
        return f"{self.name}, {self.split}, image {self.image_id(row)}"
