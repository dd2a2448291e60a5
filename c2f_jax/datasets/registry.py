"""Data sets by name, manifest or prepared directory: whatever `data.name` may be."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from c2f_jax.data.manifest import MANIFEST_SUFFIXES, is_manifest, load_manifest
from c2f_jax.data.prepared import PreparedSource, is_prepared, open_prepared
from c2f_jax.data.source import ModelInputs, PairSource
from c2f_jax.datasets.layout import Layout
from c2f_jax.datasets.spoken_scenes.source import prepared_builder
from c2f_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

    from c2f_jax.datasets.builder import FilePairs

# A published data set is a file of this folder, which holds its reader, its layout and its builder,
# and a line here: name -> module:builder. Only names, because the builders load TFDS.
PUBLISHED = {
    "flickr8k_audio": "flickr8k_audio:Flickr8kAudio",
    "spoken_coco": "spoken_coco:SpokenCoco",
    "places_audio": "places_audio:PlacesAudio",
}
SPOKEN_SCENES = "spoken_scenes"
DATA_SETS = (SPOKEN_SCENES, *PUBLISHED)


def data_set_name(spec: str) -> str:
    """Return what is before the slash of "name/config"; it need not be a data set."""
    return str(spec).partition("/")[0]


def published_builder(name: str) -> type[FilePairs]:
    """Import the TFDS builder of a published data set.

    Args:
      name: a name of `PUBLISHED`.

    Returns:
      The class; its LAYOUT says what the data set is made of.
    """
    module, _, builder = PUBLISHED[name].partition(":")
    return getattr(importlib.import_module(f"c2f_jax.datasets.{module}"), builder)


def layout_of(name: str) -> Layout:
    """Return the layout of a published data set.

    Args:
      name: name of the data set.

    Returns:
      Its layout, to read a folder of downloaded parts with.

    Raises:
      UserError: it is not a published data set.
    """
    if name not in PUBLISHED:
        raise UserError(
            f"{name} is not a published data set: --manual-dir needs one of {', '.join(PUBLISHED)}"
        )
    layout = published_builder(name).LAYOUT
    assert layout is not None  # the builders of published sets have one
    return layout


def make_data_set(spec: str, data_dir: str | None = None) -> None:
    """Make `spoken_scenes` if it is not there.

    Other data sets are made by `c2f data prepare` alone.

    Args:
      spec: name of a data set, with its configuration; anything but `spoken_scenes` is left alone.
      data_dir: where TFDS keeps prepared sets; None for its default.

    Raises:
      UserError: the configuration is unknown, or the data set cannot be made.
    """
    if data_set_name(spec) == SPOKEN_SCENES:
        check_data_dir(data_dir)
        prepared_builder(str(spec).partition("/")[2], data_dir)


def check_data_dir(data_dir: str | None) -> None:
    """Raise UserError if prepared sets would be in a bucket.

    ArrayRecord, their format, reads and writes files alone.
    """
    if "://" in str(data_dir):
        raise UserError(
            f"data_dir={data_dir}: prepared data sets are read from a disk, not from a bucket: "
            "give a folder, one that is mounted or that each machine copies"
        )


def is_data_set(spec: str) -> bool:
    """Return whether `load_pairs` takes it: a name, a manifest or a prepared directory."""
    return data_set_name(spec) in DATA_SETS or is_manifest(spec) or is_prepared(str(spec))


def open_builder(spec: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """Open a prepared set, by name or by its directory; `spoken_scenes` is made if it is not there.

    Args:
      spec: name of a data set, or directory of a prepared set.
      data_dir: where TFDS keeps prepared sets; None for its default.

    Returns:
      The TFDS builder, whose splits can be read.

    Raises:
      UserError: there is no such data set, or it is not prepared.
    """
    spec = str(spec)
    name, _, config = spec.partition("/")
    check_data_dir(data_dir)
    if name == SPOKEN_SCENES:
        return prepared_builder(config, data_dir)

    if name in PUBLISHED:
        if config:
            raise UserError(f"{name} has no configuration {config!r}: give {name} alone")
        builder = published_builder(name)(data_dir=data_dir)
        if not builder.info.splits:
            raise UserError(
                f"{name} is not prepared in {builder.data_dir}; "
                f"`c2f data prepare {name} --dry-run` says what it needs"
            )
        return builder

    if is_prepared(spec):
        return open_prepared(spec)

    raise UserError(
        f"no data set {spec!r}: give one of {', '.join(sorted(DATA_SETS))}, the path of a manifest "
        f"(a file that ends in {' or '.join(MANIFEST_SUFFIXES)}), or a directory made by "
        "`c2f data prepare`"
    )


def load_pairs(
    spec: str,
    split: str,
    data_dir: str | None = None,
    *,
    max_bad_share: float = 0.01,
    inputs: ModelInputs | None = None,
) -> PairSource:
    """Open one split of a data set.

    Args:
      spec: name of a data set, path of a manifest (.jsonl or .csv, local or in a bucket; see
        `c2f_jax.data.manifest`), or directory of a prepared set. `spoken_scenes` is made if it is
        not there; `c2f data prepare` makes the published sets.
      split: name of the split.
      data_dir: where TFDS keeps prepared sets; None for its default.
      max_bad_share: share of bad items above which reading ends with an error.
      inputs: what the model is given of each item; None for waveform and pixels.

    Returns:
      The pairs of the split, by random access.

    Raises:
      UserError: the data set or the split is unknown, or cannot be used.
    """
    spec = str(spec)
    if is_manifest(spec):
        return load_manifest(spec, split, max_bad_share=max_bad_share, inputs=inputs)

    # The default configuration has one name in messages and results, however it was written.
    builder = open_builder(spec, data_dir)
    name = SPOKEN_SCENES if spec in ("spoken_scenes/", "spoken_scenes/default") else spec
    return PreparedSource(builder, split, name=name, max_bad_share=max_bad_share, inputs=inputs)
