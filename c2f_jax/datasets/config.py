"""The `data` section of a configuration."""

from dataclasses import dataclass, field

from c2f_jax.data import batch_plan
from c2f_jax.data.augment import AugmentConfig
from c2f_jax.data.feature_cache import open_features
from c2f_jax.data.loader import BatchOptions
from c2f_jax.data.source import MIN_SAMPLES, ModelInputs, PairSource
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.decoding.images import RESIZE


@dataclass(frozen=True)
class DataConfig:
    """Options for reading data.

    Attributes:
      name: data set ("spoken_scenes", "spoken_scenes/tiny") or path of a manifest (.jsonl, .csv).
      data_dir: where TFDS keeps prepared sets; None for its default.
      train_split: split to train on.
      validation_split: split that chooses the best checkpoint.
      test_split: split of the final evaluation.
      image_size: side of an image in pixels.
      image_resize: how an image becomes a square, see `decoding.images.decode_image`; a published
        image network brings its own.
      image_resize_side: length of the short side before the crop of "short_side"; 0 for image_size.
      speech_features: feature cache (a folder of `c2f features`, made in training if the
        configuration names the network's weights) or file of tokens (.npz) to read instead of
        recordings.
      image_features: the same in place of images.
      speech_copies: number of copies of each training recording, varied as augment says, that the
        network runs on too. They are kept in caches beside speech_features, and training draws from
        the recording and its copies.
      bucket_seconds: training lengths; every batch has one of them, and longer recordings are
        cropped to the longest.
      max_seconds: evaluation length; recordings are taken whole up to it.
      max_bad_share: share of unreadable items above which a run stops.
      shuffled_share: share of training recordings whose image is swapped with another's (noisy
        supervision).
      threads: decoding threads.
      prefetch: batches held ready.
      max_padding: largest share of padding in training batches. Lengths are chosen to keep it, up
        to the last of bucket_seconds; each length is one more compiled step. None to use
        bucket_seconds as they are.
      augment: how training examples are varied.
    """

    name: str
    data_dir: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    image_size: int = field(default=64, metadata={"min": 1})
    image_resize: str = field(default="square", metadata={"choices": RESIZE})
    image_resize_side: int = field(default=0, metadata={"min": 0})
    speech_features: str | None = None
    image_features: str | None = None
    speech_copies: int = field(default=0, metadata={"min": 0})
    bucket_seconds: tuple[float, ...] = (4.5,)
    max_seconds: float = field(default=5.0, metadata={"min": MIN_SAMPLES / SAMPLE_RATE})
    max_bad_share: float = field(default=0.01, metadata={"min": 0.0, "max": 1.0})
    shuffled_share: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})
    threads: int = field(default=2, metadata={"min": 0})
    prefetch: int = field(default=4, metadata={"min": 0})
    max_padding: float | None = field(default=None, metadata={"above": 0.0, "below": 1.0})
    augment: AugmentConfig = AugmentConfig()

    def load(self, split: str, *, features: bool = True, copies: bool = False) -> PairSource:
        """Open a split.

        Args:
          split: name of the split.
          features: whether to read speech_features and image_features if they are given.
          copies: whether to read the varied copies too, as training does.

        Returns:
          The pairs of the split.

        Raises:
          UserError: the data set or a feature cache cannot be read.
        """
        speech = image = None
        if features and self.speech_features is not None:
            speech = open_features(self.speech_features)
        if features and self.image_features is not None:
            image = open_features(self.image_features)

        inputs = ModelInputs(
            image_resize=self.image_resize,
            image_resize_side=self.image_resize_side,
            speech_features=speech,
            image_features=image,
            speech_copies=tuple(map(open_features, self.copy_caches() if copies else ())),
        )
        return load_pairs(
            self.name, split, self.data_dir, max_bad_share=self.max_bad_share, inputs=inputs
        )

    def batch_options(
        self,
        source: PairSource,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> BatchOptions:
        """Return what training batches are made of.

        Args:
          source: training split, whose lengths decide the buckets where max_padding is given.
          batch_size: rows of all processes.
          seed: seed of the run.
          process_index: number of this process.
          process_count: number of processes.

        Returns:
          What `data.loader.train_batches` takes.

        Raises:
          UserError: max_padding cannot be kept.
        """
        bucket_seconds = self.bucket_seconds
        if self.max_padding is not None:
            longest = round(bucket_seconds[-1] * SAMPLE_RATE)
            samples = batch_plan.fit_buckets(
                source.num_samples, longest, batch_size=batch_size, max_padding=self.max_padding
            )
            bucket_seconds = tuple(count / SAMPLE_RATE for count in samples)

        return BatchOptions(
            batch_size=batch_size,
            image_size=self.image_size,
            bucket_seconds=bucket_seconds,
            seed=seed,
            augment=self.augment,
            process_index=process_index,
            process_count=process_count,
            threads=self.threads,
            prefetch=self.prefetch,
        )

    def features_path(self, kind: str) -> str | None:
        """Return speech_features or image_features.

        Args:
          kind: "speech" or "image".
        """
        return self.speech_features if kind == "speech" else self.image_features

    def copy_caches(self) -> list[str]:
        """Return the paths of the caches of speech_copies."""
        folder = str(self.speech_features).rstrip("/")
        return [f"{folder}-copy{number}" for number in range(1, self.speech_copies + 1)]
