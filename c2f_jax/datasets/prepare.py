"""From what was downloaded, or a manifest, to a prepared set; and what a dry run says about it."""

import os

from c2f_jax.data.manifest import manifest_in, read_listing
from c2f_jax.data.source import MANIFEST_SUFFIXES
from c2f_jax.datasets.published import LAYOUTS, layout_of
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
    """Makes the prepared set unless it is there; the same call goes on after an interruption.

    Args:
      spec: a published data set, `spoken_scenes`, a manifest, or a folder that holds manifest.jsonl or manifest.csv.
      manual_dir: folder of the downloaded parts of a published set.
      data_dir: where it is put, local or gs://; TFDS's default directory unless given.
      name: of the prepared set of a manifest; that of its folder unless given.
      download: fetch parts that are missing where their owners give a direct link.
      threads: shards made at a time; None for one a core.
      max_bad_share: of the items of a split that may be left out.
      progress: show a bar.

    Returns:
      What to give as data.name: the name of the data set, or the directory of the prepared manifest.

    Raises:
      UserError: parts are missing, too much is bad, or the directory cannot be written.
    """
    import tensorflow_datasets as tfds

    spec = _manifest_of(str(spec), manual_dir)
    if spec.partition("/")[0] == "spoken_scenes":
        from c2f_jax.datasets.spoken_scenes.source import prepared_builder

        prepared_builder(spec.partition("/")[2], data_dir)
        return spec
    from c2f_jax.datasets.builder import ManifestPairs
    from c2f_jax.datasets.published import BUILDERS

    options = {
        "data_dir": data_dir,
        "threads": threads,
        "max_bad_share": max_bad_share,
        "progress": progress,
    }
    try:
        if spec in BUILDERS:
            builder = BUILDERS[spec](download=download, **options)
        else:
            builder = ManifestPairs(manifest=spec, name=name or _default_name(spec), **options)
        config = tfds.download.DownloadConfig(manual_dir=manual_dir)
        builder.download_and_prepare(download_config=config)
    except OSError as e:
        raise UserError(
            f"{spec} could not be prepared ({e}); the same command goes on where it stopped"
        ) from e
    return spec if spec in BUILDERS else str(builder.data_dir)


def dry_run(
    spec: str,
    *,
    manual_dir: str | None = None,
    data_dir: str | None = None,
    name: str | None = None,
) -> str:
    """What `prepare` would do: parts found and missing, where to get these and how large they are, and the splits.

    Nothing is written or fetched. Raises `UserError` for an unknown name and a manifest that cannot be read.
    """
    spec = _manifest_of(str(spec), manual_dir)
    lines = [spec]
    if spec.partition("/")[0] == "spoken_scenes":
        from c2f_jax.datasets.spoken_scenes.source import known_config

        known_config(spec.partition("/")[2])
        return f"{spec} is made on this machine and needs no files"
    if spec in LAYOUTS:
        layout, folders = LAYOUTS[spec], [manual_dir] if manual_dir else []
        found, missing = layout.find(folders), layout.missing(folders)
        for part in layout.parts:
            if part.what in found:
                lines.append(f"  found    {part.what}: {found[part.what]}")
            else:
                lines.append(f"  {'optional' if part.optional else 'missing '} {part.told()}")
        if missing:
            size = sum({part.source: part.gigabytes or 0.0 for part in missing}.values())
            where = manual_dir or "a folder, to be given with --manual-dir"
            lines.append(
                f"  to be put, unpacked, into {where}; {size:g} GB to fetch where the size is known"
            )
            if all(part.direct for part in missing):
                lines.append("  or give --download, and they are fetched from there")
            return "\n".join(lines)
        listing = layout.listing(folders)
    else:
        listing = read_listing(spec)
        lines.append(f"  prepared as {name or _default_name(spec)}")
    from c2f_jax.datasets.builder import count_splits

    files = {row[column] for row in listing.rows for column in ("image", "audio")}
    sizes = [os.path.getsize(file) for file in files if "://" not in file and os.path.isfile(file)]
    gone = sum("://" not in file and not os.path.isfile(file) for file in files)
    for split, (pictures, recordings) in count_splits(listing).items():
        lines.append(f"  {split}: {pictures:,} pictures, {recordings:,} recordings")
    lines.append(
        f"  {sum(sizes) / 1e9:.2f} GB in {len(sizes):,} files; {gone:,} listed files are missing"
    )
    lines.append(f"  would be written to {data_dir or 'the default directory of TFDS'}")
    return "\n".join(lines)


def _manifest_of(spec: str, manual_dir: str | None) -> str:
    if manual_dir is not None:
        layout_of(spec)
    if (
        spec in LAYOUTS
        or spec.partition("/")[0] == "spoken_scenes"
        or spec.lower().endswith(MANIFEST_SUFFIXES)
    ):
        return spec
    if path := manifest_in(spec):
        return path
    raise UserError(
        f"{spec!r}: give one of {', '.join(LAYOUTS)}, spoken_scenes, a manifest (a file that ends in "
        f"{' or '.join(MANIFEST_SUFFIXES)}), or a folder that holds manifest.jsonl"
    )


def _default_name(spec: str) -> str:
    """The name of the manifest's folder, in letters that a directory of TFDS may have."""
    name = os.path.basename(os.path.dirname(os.path.abspath(spec) if "://" not in spec else spec))
    return "".join(letter if letter.isalnum() else "_" for letter in name) or "manifest"
