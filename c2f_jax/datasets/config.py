"""The `data` section of a configuration."""

from dataclasses import dataclass

from c2f_jax.data.augment import AugmentConfig
from c2f_jax.data.feature_cache import open_features
from c2f_jax.datasets.registry import load_pairs


@dataclass(frozen=True)
class DataConfig:
    """What is read.

    Attributes:
      name: data set ("spoken_scenes", "spoken_scenes/tiny") or path of a manifest (.jsonl, .csv).
      data_dir: where TFDS keeps prepared sets; None for its default.
      train_split, validation_split, test_split: splits; validation chooses the best checkpoint.
      image_size: side in pixels.
      image_resize, image_resize_side: how a picture becomes a square, see ``data.images.decode_image``; a published
        image network brings its own.
      speech_features, image_features: feature caches (folders of ``c2f features``, made if the configuration names the
        network's weights) or files of tokens (.npz) to read instead of recordings and pictures.
      speech_copies: varied copies of each training recording, as augment says, which the network also runs on. Caches
        of their own beside speech_features hold them, and training draws from the recording and its copies.
      bucket_seconds: training lengths; every batch has one of them and longer recordings are cropped to the longest.
      max_seconds: evaluation length; recordings are taken whole up to it.
      max_bad_share: share of unreadable items above which a run stops.
      shuffled_share: share of training recordings whose image is swapped with another's (noisy supervision).
      threads: decoding threads.
      prefetch: batches held ready.
      max_padding: share of padding that training batches may have; lengths are then chosen for it, up to the last of
        bucket_seconds (a compiled step a length); None to take bucket_seconds as they are.
      augment: how training examples are varied.
    """

    name: str
    data_dir: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    image_size: int = 224
    image_resize: str = "square"
    image_resize_side: int = 0
    speech_features: str | None = None
    image_features: str | None = None
    speech_copies: int = 0
    bucket_seconds: tuple[float, ...] = (8.0,)
    max_seconds: float = 20.0
    max_bad_share: float = 0.01
    shuffled_share: float = 0.0
    threads: int = 4
    prefetch: int = 4
    max_padding: float | None = None
    augment: AugmentConfig = AugmentConfig()

    def load(self, split, features=True):
        """The PairSource of a split; ``features`` attaches the feature caches."""
        source = load_pairs(self.name, split, self.data_dir, max_bad_share=self.max_bad_share)
        source.image_resize = (self.image_resize, self.image_resize_side)
        if features:
            for part in ("speech", "image"):
                path = getattr(self, f"{part}_features")
                setattr(source, f"{part}_features", None if path is None else open_features(path))
        return source

    def copy_caches(self):
        """The paths of the caches of speech_copies."""
        folder = str(self.speech_features).rstrip("/")
        return [f"{folder}-copy{number}" for number in range(1, self.speech_copies + 1)]
