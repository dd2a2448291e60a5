"""Prepared sets: splits of TFDS directories whose records are images with their recordings."""

from __future__ import annotations

import functools
import logging
import os
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from c2f_jax.data.files import Stamp, content_hash
from c2f_jax.data.source import BadItems, ModelInputs, PairSource, Recording
from c2f_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

log = logging.getLogger(__name__)

# Where the metadata of a set say what it was made from; with a space, as no split has.
MADE_FROM = "made from"
# Of each source: enough for the items that the threads are reading.
RECORDS_KEPT = 64


def pair_features() -> tfds.features.FeaturesDict:
    """Return the TFDS features of a record: one image with its recordings, all as encoded files."""
    from tensorflow_datasets import features

    # Encoded files are bytes to TFDS, whose Text holds any bytes.
    recording = {"audio": features.Text(), "caption": features.Text(), "speaker": features.Text()}
    return features.FeaturesDict(
        {
            "image": features.Text(),
            "image_id": features.Text(),
            "recordings": features.Sequence(recording),
        }
    )


class PreparedSource(PairSource):
    """One split of a prepared TFDS builder, by random access, without a TensorFlow graph.

    The builder's metadata hold for each split: "captions", the number of recordings of each image
    (one number when all have as many); "samples" of each recording; optionally "identities" of the
    images, "bad_items" left out in preparation, "items", how many there were, and "content", a hash
    of all records. Under MADE_FROM they hold "listing", the name or path of what was
    prepared, its "fingerprint", and "manifest", a hash of the file.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        *,
        name: str,
        max_bad_share: float = 0.01,
        inputs: ModelInputs | None = None,
    ) -> None:
        """Create a source.

        Args:
          builder: TFDS builder whose data are prepared.
          split: name of the split.
          name: what error messages call the data set.
          max_bad_share: share of bad items above which reading ends with an error.
          inputs: what the model is given of each item.

        Raises:
          UserError: there is no such split, or too much was left out in preparation.
        """
        if split not in builder.info.splits:
            raise UserError(
                f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}"
            )

        about = builder.info.metadata[split]
        self._records = builder.as_data_source(split)
        # A record holds the image and all its recordings: keeping it briefly saves reading it
        # twice.
        self._record = functools.lru_cache(maxsize=RECORDS_KEPT)(self._records.__getitem__)
        count = len(self._records)

        # The recordings of all images are numbered one after the other.
        captions = np.broadcast_to(np.asarray(about["captions"], np.int64), count)
        self._first = np.cumsum(captions) - captions

        items = about.get("items", len(about["samples"]))
        bad_items = BadItems(f"{name}, split {split}", items, max_bad_share)
        bad_items.add_all(about.get("bad_items", {}))
        super().__init__(
            name,
            split,
            image_index=np.repeat(np.arange(count), captions),
            image_ids=about.get("identities", np.arange(count)),
            num_samples=about["samples"],
            bad_items=bad_items,
            inputs=inputs,
        )
        # A caller may change image_index; where a recording is stored stays the same.
        self._record_of = self.image_index.copy()
        self._key = f"{builder.info.full_name}/{split}"
        # Of a set that does not know its content, what changes with nearly all of it.
        size = builder.info.splits[split].num_bytes
        self._content = about.get("content") or f"{size}-{zlib.crc32(self.num_samples.tobytes())}"

        made_from = builder.info.metadata.get(MADE_FROM, {})
        if made_from:
            self.origin = f"{name}, prepared from {made_from['listing']}"
            if _has_changed(made_from):
                log.warning(
                    "%s has changed since %s was prepared from it: run `c2f data prepare` again to "
                    "read what it lists",
                    made_from["listing"],
                    name,
                )

    def recording(self, index: int) -> Recording:
        """Return encoded bytes, caption and speaker of recording `index`."""
        row = int(self._record_of[index])
        k = int(index) - int(self._first[row])
        recordings = self._record(row)["recordings"]
        return Recording(
            audio=recordings["audio"][k],
            caption=recordings["caption"][k].decode(),
            speaker=recordings["speaker"][k].decode(),
        )

    def image(self, row: int) -> bytes:
        """Return the encoded bytes of image `row`."""
        return self._record(int(row))["image"]

    def image_id(self, row: int) -> str:
        """Return the name of image `row`, such as test-00007."""
        return self._record(int(row))["image_id"].decode()

    def content(self) -> str:
        """Return the hash of all records that was made in preparation."""
        return self._content

    def stamp(self, kind: str, index: int) -> Stamp:
        """Return the stamp of an item, whose state is that of the whole split."""
        return Stamp([self._content, int(index)], super().stamp(kind, index).content)

    def recording_key(self, index: int) -> str:
        """Return what a feature cache calls recording `index`."""
        return f"{self._key}/{index}"

    def image_key(self, row: int) -> str:
        """Return what a feature cache calls image `row`."""
        return f"{self._key}/{row}"


def _has_changed(made_from: Mapping[str, str]) -> bool:
    """Return whether the manifest that a set was made from is there and holds something else."""
    path = made_from["listing"]
    return os.path.isfile(path) and content_hash(path) != made_from["manifest"]


def is_prepared(path: str) -> bool:
    """Return whether a path is the directory of a prepared set."""
    try:
        return (epath.Path(path) / "dataset_info.json").exists()
    except (OSError, ValueError, KeyError):  # the path cannot name a directory, or is a URL
        return False


def open_prepared(path: str) -> tfds.core.DatasetBuilder:
    """Open the TFDS builder of a directory, whichever class made it.

    Args:
      path: directory of a prepared set.

    Returns:
      The builder.

    Raises:
      UserError: the directory was not made by `c2f data prepare`.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    if not builder.info.metadata or not builder.info.splits:
        raise UserError(
            f"{path}: a TFDS directory, but not one of `c2f data prepare`; prepare the data again"
        )
    return builder
