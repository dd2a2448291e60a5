"""Prepare a data set from downloads or a manifest, and say in a dry run what that needs."""

import os

from etils import epath

from c2f_jax.data.listing import Listing, read_listing
from c2f_jax.data.manifest import MANIFEST_SUFFIXES, is_manifest, manifest_in
from c2f_jax.datasets.layout import Layout
from c2f_jax.datasets.registry import (
    PUBLISHED,
    SPOKEN_SCENES,
    check_data_dir,
    data_set_name,
    layout_of,
    load_pairs,
    open_builder,
    published_builder,
)
from c2f_jax.datasets.spoken_scenes.source import known_config, prepared_builder
from c2f_jax.errors import UserError


def prepare(
    spec: str,
    *,
    manual_dir: str | None = None,
    data_dir: str | None = None,
    name: str | None = None,
    download: bool = False,
    threads: int | None = None,
    max_bad_share: float = 0.01,
    progress: bool = True,
) -> str:
    """Make a prepared set if it is not there; the same call resumes after an interruption.

    A set whose listing or files have changed since is made anew.

    Args:
      spec: a published data set, `spoken_scenes`, a manifest, or a folder that holds manifest.jsonl
        or manifest.csv.
      manual_dir: folder of the downloaded parts of a published set.
      data_dir: directory to write to, on a disk; None for TFDS's default.
      name: name of the prepared set of a manifest; by default that of its folder.
      download: whether to fetch missing parts where their owners give a direct link.
      threads: shards made at a time; None for one a core.
      max_bad_share: share of the items of a split that may be left out.
      progress: whether to show a bar.

    Returns:
      What to give as data.name: the name of the data set, or the directory of the prepared
      manifest.

    Raises:
      UserError: parts are missing, too much is bad, the directory cannot be written, or it holds
        what was prepared from another listing.
    """
    check_data_dir(data_dir)
    spec = _find_spec(str(spec), manual_dir)
    if data_set_name(spec) == SPOKEN_SCENES:
        prepared_builder(spec.partition("/")[2], data_dir)
        return spec

    # TFDS is loaded here, so that a dry run does not need it.
    import tensorflow_datasets as tfds

    from c2f_jax.datasets.builder import FilePairs, ManifestPairs

    options = {
        "data_dir": data_dir,
        "threads": threads,
        "max_bad_share": max_bad_share,
        "progress": progress,
    }

    def create() -> FilePairs:
        if spec in PUBLISHED:
            return published_builder(spec)(download=download, **options)
        return ManifestPairs(manifest=spec, name=name or _default_name(spec), **options)

    try:
        builder = create()
        if builder.info.splits and not builder.is_current(manual_dir):
            print(f"{spec} has changed: {builder.data_dir} is made anew", flush=True)
            epath.Path(builder.data_dir).rmtree()
            builder = create()
        config = tfds.download.DownloadConfig(manual_dir=manual_dir)
        builder.download_and_prepare(download_config=config)
    except OSError as e:
        raise UserError(
            f"{spec} could not be prepared ({e}); the same command resumes where it stopped"
        ) from e
    return spec if spec in PUBLISHED else str(builder.data_dir)


def left_out_text(ready: str, data_dir: str | None = None) -> str:
    """Say what preparation left out of each split, item by item; "" if nothing was.

    Args:
      ready: what `prepare` returned.
      data_dir: as for `prepare`.
    """
    texts = []
    for split in open_builder(ready, data_dir).info.splits:
        texts.append(load_pairs(ready, split, data_dir, max_bad_share=1.0).bad_items.text())
    return "\n".join(filter(None, texts))


def dry_run(
    spec: str,
    *,
    manual_dir: str | None = None,
    data_dir: str | None = None,
    name: str | None = None,
) -> str:
    """Describe what `prepare` would do; nothing is written or fetched.

    Args:
      spec: as for `prepare`.
      manual_dir: as for `prepare`.
      data_dir: as for `prepare`.
      name: as for `prepare`.

    Returns:
      The parts found and those missing, where to get these and how large they are; or the splits
      that would be written.

    Raises:
      UserError: the name is unknown, or the manifest cannot be read.
    """
    spec = _find_spec(str(spec), manual_dir)
    if data_set_name(spec) == SPOKEN_SCENES:
        known_config(spec.partition("/")[2])
        return f"{spec} is made on this machine and needs no files"

    lines = [spec]
    if spec in PUBLISHED:
        layout = layout_of(spec)
        folders = [manual_dir] if manual_dir else []
        lines += _describe_parts(layout, folders)
        if layout.missing(folders):
            return "\n".join(lines)
        listing = layout.listing(folders)
    else:
        listing = read_listing(spec, strict=False)
        listing.resolve()
        lines.append(f"  prepared as {name or _default_name(spec)}")

    # Nothing is missing: say what would be written.
    lines += _describe_listing(listing)
    lines.append(f"  would be written to {data_dir or 'the default directory of TFDS'}")
    return "\n".join(lines)


def _describe_parts(layout: Layout, folders: list[str]) -> list[str]:
    """Say which parts were found, and where to get the others."""
    found, missing = layout.find(folders), layout.missing(folders)
    lines = []
    for part in layout.parts:
        if part.what in found:
            lines.append(f"  found    {part.what}: {found[part.what]}")
        else:
            lines.append(f"  {'optional' if part.optional else 'missing '} {part.describe()}")

    if missing:
        # Several parts may come in one archive.
        size = sum({part.source: part.gigabytes or 0.0 for part in missing}.values())
        where = folders[0] if folders else "a folder, and name it with --manual-dir"
        lines.append(f"  unpack them into {where}; {size:g} GB to fetch, without unknown sizes")
        if all(part.direct for part in missing):
            lines.append("  or give --download, and they are fetched from there")
    return lines


def _describe_listing(listing: Listing) -> list[str]:
    """Count the images, recordings and files of a listing."""
    lines = []
    for split, (images, recordings) in listing.count_splits().items():
        lines.append(f"  {split}: {images:,} images, {recordings:,} recordings")

    for where, (_, reason) in listing.left_out.items():
        lines.append(f"  left out: {where}: {reason}")
    files = {row[column] for row in listing.rows for column in ("image", "audio")}
    sizes, gone = [], 0
    for file in files:
        if "://" in file:  # asking a bucket for each file would take too long
            continue
        if os.path.isfile(file):
            sizes.append(os.path.getsize(file))
        else:
            gone += 1
    lines.append(
        f"  {sum(sizes) / 1e9:.2f} GB in {len(sizes):,} files; {gone:,} listed files are missing"
    )
    return lines


def _find_spec(spec: str, manual_dir: str | None) -> str:
    """Return the name of a data set or the path of a manifest, which may be that of its folder."""
    if manual_dir is not None:
        layout_of(spec)
    if spec in PUBLISHED or data_set_name(spec) == SPOKEN_SCENES or is_manifest(spec):
        return spec
    path = manifest_in(spec)
    if path is None:
        raise UserError(
            f"{spec!r}: give one of {', '.join(PUBLISHED)}, {SPOKEN_SCENES}, a manifest (a file "
            f"that ends in {' or '.join(MANIFEST_SUFFIXES)}), or a folder that holds manifest.jsonl"
        )
    return path


def _default_name(spec: str) -> str:
    """Return the name of the manifest's folder, in characters that a directory of TFDS may have."""
    # A manifest in the working directory has the name of that directory.
    path = spec if "://" in spec else os.path.abspath(spec)
    name = os.path.basename(os.path.dirname(path))
    return "".join(c if c.isalnum() else "_" for c in name) or "manifest"
