"""The prepared builder of `spoken_scenes`; the data set is made when it is not there yet."""

from c2f_jax.datasets.spoken_scenes import speech
from c2f_jax.errors import UserError


def known_config(config: str) -> str:
    """The name of a configuration, "default" for none given; `UserError` listing all for an unknown one."""
    from c2f_jax.datasets.spoken_scenes.builder import SpokenScenes

    if config and config not in SpokenScenes.builder_configs:
        known = ", ".join(SpokenScenes.builder_configs)
        raise UserError(f"spoken_scenes has no configuration {config!r}; it has {known}")
    return config or "default"


def prepared_builder(config: str = "", data_dir: str | None = None):
    """The TFDS builder of `spoken_scenes`, its data made first when they are not in data_dir; once made they stay."""
    from c2f_jax.datasets.spoken_scenes.builder import SpokenScenes

    config = known_config(config)

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
