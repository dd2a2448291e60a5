"""Data sets by name."""

from c2f_jax.data.source import MANIFEST_SUFFIXES, PairSource
from c2f_jax.errors import UserError


def make_data_set(spec: str, data_dir: str | None = None) -> None:
    """Makes `spoken_scenes` in data_dir where it is not there; other data sets are made by `c2f data prepare` alone."""
    name, _, config = str(spec).partition("/")
    if name == "spoken_scenes":
        from c2f_jax.datasets.spoken_scenes.source import prepared_builder

        prepared_builder(config, data_dir)


def _spoken_scenes(
    config: str, split: str, data_dir: str | None, max_bad_share: float
) -> PairSource:
    from c2f_jax.data.prepared import PreparedSource
    from c2f_jax.datasets.spoken_scenes.source import prepared_builder

    name = f"spoken_scenes/{config}" if config not in ("", "default") else "spoken_scenes"
    builder = prepared_builder(config, data_dir)
    return PreparedSource(builder, split, name=name, max_bad_share=max_bad_share)


def _published(name: str):
    def load(config: str, split: str, data_dir: str | None, max_bad_share: float) -> PairSource:
        from c2f_jax.data.prepared import PreparedSource
        from c2f_jax.datasets.published import BUILDERS

        if config:
            raise UserError(f"{name} has no configuration {config!r}; give {name} alone")
        builder = BUILDERS[name](data_dir=data_dir)
        if not builder.info.splits:
            raise UserError(
                f"{name} is not prepared in {builder.data_dir}; `c2f data prepare {name} --dry-run` says what it needs"
            )
        return PreparedSource(builder, split, name=name, max_bad_share=max_bad_share)

    return load


# Name -> loader(config, split, data_dir, max_bad_share); the config is what follows the slash in "name/config".
DATA_SETS = {
    "spoken_scenes": _spoken_scenes,
    **{name: _published(name) for name in ("flickr8k_audio", "spoken_coco", "places_audio")},
}


def is_data_set(spec: str) -> bool:
    """Whether `load_pairs` takes it: a name, a manifest or a prepared directory, rather than a folder of files."""
    from c2f_jax.data.prepared import is_prepared

    spec = str(spec)
    return (
        spec.partition("/")[0] in DATA_SETS
        or spec.lower().endswith(MANIFEST_SUFFIXES)
        or is_prepared(spec)
    )


def load_pairs(
    spec: str, split: str, data_dir: str | None = None, *, max_bad_share: float = 0.01
) -> PairSource:
    """One split of a data set: by name, by the path of a manifest, or by the directory of a prepared set.

    Names are `spoken_scenes`, which is made in data_dir (TFDS's default directory unless given) when it is not there,
    and the published sets, which `c2f data prepare` makes. A manifest is a .jsonl or .csv file, on this machine or in
    a bucket (see `c2f_jax.data.manifest`). Raises `UserError` for an unknown name or split and for data that cannot be
    used.
    """
    spec = str(spec)
    if spec.lower().endswith(MANIFEST_SUFFIXES):
        from c2f_jax.data.manifest import load_manifest

        return load_manifest(spec, split, max_bad_share=max_bad_share)
    name, _, config = spec.partition("/")
    if name in DATA_SETS:
        return DATA_SETS[name](config, split, data_dir, max_bad_share)
    from c2f_jax.data.prepared import PreparedSource, is_prepared, open_prepared

    if is_prepared(spec):
        return PreparedSource(open_prepared(spec), split, name=spec, max_bad_share=max_bad_share)
    raise UserError(
        f"no data set {spec!r}: give one of {', '.join(sorted(DATA_SETS))}, the path of a manifest, a file that ends "
        f"in {' or '.join(MANIFEST_SUFFIXES)}, or the directory that `c2f data prepare` has made"
    )
