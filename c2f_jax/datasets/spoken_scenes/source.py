"""Open `spoken_scenes`, which is made first if it is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from c2f_jax.datasets.spoken_scenes import speech
from c2f_jax.errors import UserError

if TYPE_CHECKING:
    from c2f_jax.datasets.spoken_scenes.builder import SpokenScenes


def known_config(config: str) -> str:
    """Check the name of a configuration.

    Args:
      config: the name; "" for none given.

    Returns:
      The name, "default" for none given.

    Raises:
      UserError: there is no such configuration.
    """
    # TFDS is loaded here, so that other data sets can be opened without it.
    from c2f_jax.datasets.spoken_scenes.builder import SpokenScenes

    if config and config not in SpokenScenes.builder_configs:
        known = ", ".join(SpokenScenes.builder_configs)
        raise UserError(f"spoken_scenes has no configuration {config!r}; it has {known}")
    return config or "default"


def prepared_builder(config: str = "", data_dir: str | None = None) -> SpokenScenes:
    """Open the data set; make it first if it is not there.

    Args:
      config: name of the configuration.
      data_dir: where TFDS keeps prepared sets; None for its default.

    Returns:
      The TFDS builder, whose splits can be read.

    Raises:
      UserError: there is no such configuration, espeak-ng is not installed, or the directory cannot
        be written.
    """
    config = known_config(config)
    builder = _open(config, data_dir)
    if builder.info.splits:
        return builder

    # Making takes minutes, so a missing library is named first.
    speech.check_installed()
    print(f"making the data set spoken_scenes/{config} in {builder.data_dir} (once)", flush=True)
    try:
        builder.download_and_prepare()
    except OSError as e:
        # Another process may have finished the same set in the meantime: use its copy.
        builder = _open(config, data_dir)
        if not builder.info.splits:
            raise UserError(
                f"spoken_scenes/{config} could not be made in {builder.data_dir} ({e}); give a "
                "data_dir that can be written and has 1 GB of free space"
            ) from e
    return builder


def _open(config: str, data_dir: str | None) -> SpokenScenes:
    from c2f_jax.datasets.spoken_scenes.builder import SpokenScenes

    return SpokenScenes(config=config, data_dir=data_dir, file_format="array_record")
