"""One split of `spoken_scenes` as recordings and pictures; the data set is made when it is not there yet."""

import functools

import numpy as np

from c2f_jax.data.pairs import PairSource, Recording
from c2f_jax.data.spoken_scenes import speech
from c2f_jax.errors import UserError


class SpokenScenesSource(PairSource):
    """Reads the prepared data set by random access, without a TensorFlow graph."""

    def __init__(self, config: str, split: str, data_dir: str | None = None):
        builder = prepared_builder(config, data_dir)
        if split not in builder.info.splits:
            raise UserError(f"spoken_scenes has no split {split!r}; it has {', '.join(builder.info.splits)}")
        self._scenes = builder.as_data_source(split)
        # A record holds the picture and all its recordings: remembering it briefly saves reading it twice.
        self._scene = functools.lru_cache(maxsize=64)(self._scenes.__getitem__)
        about = builder.info.metadata[split]
        self._captions = about["captions"]
        count = len(self._scenes)
        super().__init__(
            f"spoken_scenes/{config}" if config not in ("", "default") else "spoken_scenes",
            split,
            image_index=np.repeat(np.arange(count), self._captions),
            image_ids=np.arange(count),
            num_samples=about["samples"],
        )

    def recording(self, index: int) -> Recording:
        """Recording `index`: FLAC bytes, caption, speaker."""
        scene, k = divmod(int(index), self._captions)
        recordings = self._scene(scene)["recordings"]
        return Recording(
            audio=recordings["audio"][k],
            caption=recordings["caption"][k].decode(),
            speaker=recordings["speaker"][k].decode(),
        )

    def image(self, row: int) -> bytes:
        """Picture `row`: PNG bytes."""
        return self._scene(int(row))["image"]

    def image_id(self, row: int) -> str:
        """The name of scene `row`, such as test-00007."""
        return self._scene(int(row))["image_id"].decode()


def prepared_builder(config: str = "", data_dir: str | None = None):
    """The TFDS builder of `spoken_scenes`, its data made first when they are not in data_dir; once made they stay."""
    from c2f_jax.data.spoken_scenes.builder import SpokenScenes

    config = config or "default"
    if config not in SpokenScenes.builder_configs:
        known = ", ".join(SpokenScenes.builder_configs)
        raise UserError(f"spoken_scenes has no configuration {config!r}; it has {known}")

    def open_builder():
        return SpokenScenes(config=config, data_dir=data_dir, file_format="array_record")

    builder = open_builder()
    if builder.info.splits:
        return builder
    speech.check_installed()
    print(f"making the data set spoken_scenes/{config} in {builder.data_dir} (once)", flush=True)
    try:
        builder.download_and_prepare()
    except OSError as e:
        # Another process may have finished the same set in the meantime; then its copy serves.
        builder = open_builder()
        if not builder.info.splits:
            raise UserError(
                f"spoken_scenes/{config} could not be made in {builder.data_dir} ({e}); give a data_dir "
                "that can be written and has 1 GB of room"
            ) from e
    return builder
