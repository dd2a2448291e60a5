"""Prepared sets: splits of TFDS directories whose records are pictures with their recordings."""

import functools

import numpy as np
from etils import epath

from c2f_jax.data.source import BadItems, PairSource, Recording
from c2f_jax.errors import UserError


def pair_features():
    """The TFDS features of a record: one picture with its recordings; pictures and recordings are encoded files."""
    from tensorflow_datasets import features

    recording = {"audio": features.Text(), "caption": features.Text(), "speaker": features.Text()}
    return features.FeaturesDict(
        {
            "image": features.Text(),
            "image_id": features.Text(),
            "recordings": features.Sequence(recording),
        }
    )


class PreparedSource(PairSource):
    """One split of a TFDS builder whose data are prepared, by random access, without a TensorFlow graph.

    The builder's metadata tell of each split: "captions", recordings of each picture (one number when all have as
    many); "samples" of each recording; optionally "identities" of the pictures, "bad_items" left out in preparation
    and "items", how many there were.
    """

    def __init__(self, builder, split: str, *, name: str, max_bad_share: float = 0.01):
        if split not in builder.info.splits:
            raise UserError(
                f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}"
            )
        about = builder.info.metadata[split]
        self._records = builder.as_data_source(split)
        # A record holds the picture and all its recordings: remembering it briefly saves reading it twice.
        self._record = functools.lru_cache(maxsize=64)(self._records.__getitem__)
        count = len(self._records)
        captions = np.broadcast_to(np.asarray(about["captions"], np.int64), count)
        self._first = np.cumsum(captions) - captions
        bad_items = BadItems(
            f"{name}, split {split}", about.get("items", len(about["samples"])), max_bad_share
        )
        bad_items.add_all(about.get("bad_items", {}))
        super().__init__(
            name,
            split,
            image_index=np.repeat(np.arange(count), captions),
            image_ids=about.get("identities", np.arange(count)),
            num_samples=about["samples"],
            bad_items=bad_items,
        )
        # image_index may be changed by the caller (noisy supervision); where a recording is stored may not.
        self._record_of = self.image_index.copy()
        self._key = f"{builder.info.full_name}/{split}"

    def recording(self, index: int) -> Recording:
        """Recording `index`: encoded bytes, caption, speaker."""
        row = int(self._record_of[index])
        k = int(index) - int(self._first[row])
        recordings = self._record(row)["recordings"]
        return Recording(
            audio=recordings["audio"][k],
            caption=recordings["caption"][k].decode(),
            speaker=recordings["speaker"][k].decode(),
        )

    def image(self, row: int) -> bytes:
        """Picture `row`: encoded bytes."""
        return self._record(int(row))["image"]

    def image_id(self, row: int) -> str:
        """The name of picture `row`, such as test-00007."""
        return self._record(int(row))["image_id"].decode()

    def recording_key(self, index: int) -> str:
        """What a feature cache calls recording `index`."""
        return f"{self._key}/{index}"

    def image_key(self, row: int) -> str:
        """What a feature cache calls picture `row`."""
        return f"{self._key}/{row}"


def is_prepared(path: str) -> bool:
    """Whether the path is a directory of a prepared set."""
    try:
        return (epath.Path(path) / "dataset_info.json").exists()
    except (OSError, ValueError):
        return False


def open_prepared(path: str):
    """The TFDS builder of a directory, whoever made it."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    if not builder.info.metadata or not builder.info.splits:
        raise UserError(
            f"{path}: a TFDS directory, but not one of `c2f data prepare`; prepare the data again"
        )
    return builder
