"""A manifest of what a data check found usable."""

import collections
import json
import os
from typing import Any

from etils import epath

from c2f_jax.data.files import check_writable, printable
from c2f_jax.data.manifest import ManifestSource
from c2f_jax.data_check.findings import Report
from c2f_jax.errors import UserError

DUPLICATES = ("duplicate image", "duplicate recording", "repeated image")

Item = tuple[str, str]  # split and name


def check_name(path: str | os.PathLike, data: str = "") -> epath.Path:
    """Check the path of a manifest that will be written.

    Args:
      path: path of the manifest.
      data: path of the data that it will name.

    Returns:
      The path.

    Raises:
      UserError: it does not end in .jsonl, exists or cannot be written, or JSON cannot hold the
        names of files in another folder.
    """
    file = epath.Path(path)
    if file.suffix != ".jsonl":
        raise UserError(f"--fix={path}: give a name that ends in .jsonl")
    if file.exists():
        raise UserError(f"--fix={path}: already exists; give another name")
    check_writable(path, "--fix")
    place = os.path.abspath(data)
    folder = place if os.path.isdir(place) else os.path.dirname(place)
    elsewhere = os.path.dirname(os.path.abspath(path)) != folder
    if elsewhere and os.path.exists(place) and not _is_unicode(folder):
        raise UserError(
            f"--fix={path}: the name of the folder {printable(folder)} is not Unicode, and a "
            "manifest elsewhere cannot hold it: give a file in that folder"
        )
    return file


def write_clean_manifest(report: Report, path: str | os.PathLike) -> int:
    """Write a manifest of what can be used; the data themselves are not touched.

    It leaves out pairs that cannot be read. What is in two splits stays in the test split, else in
    validation. Duplicate images of a split get one image_id, and so do all images of their ids; see
    `joined_ids`. Lengths are filled in.
    Paths are relative if the files are below the manifest's folder.

    Args:
      report: what the check found.
      path: path of the manifest.

    Returns:
      The number of its rows.

    Raises:
      UserError: as `check_name`, and for a prepared set, which has no files.
    """
    file = check_name(path)
    if not all(isinstance(source, ManifestSource) for source in report.sources.values()):
        raise UserError(
            f"{report.name} is prepared: fix the folder or manifest that it was made from "
            "(--manual-dir)"
        )

    folder = str(file.parent)
    if "://" not in folder:
        folder = os.path.abspath(folder)

    dropped = _leaks(report)
    rows = []
    for split in report.sources:
        rows += _clean_rows(report, split, dropped, folder)

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def count_dropped(report: Report, written: int) -> dict[str, int]:
    """Count what a clean manifest lacks of what was checked.

    Args:
      report: what the check found.
      written: the number of its rows.

    Returns:
      What was left out, in words -> how much of it; nothing that was not.
    """
    listed = sum(len(source) for source in report.sources.values())
    unusable = sum(len(rows) for rows in report.left_out.values())
    counts = {
        "lines that cannot be used": len(report.not_listed),
        "recordings that cannot be used, or whose image cannot": unusable,
        "recordings that are also in another split, or whose image is": (
            listed - unusable - written
        ),
    }
    return {what: count for what, count in counts.items() if count}


def joined_ids(report: Report, split: str) -> dict[str, str]:
    """Join the image_ids of images that are the same.

    Equal images match, and so do images of equal image_id: all images of the joined ids do.

    Args:
      report: what the check found.
      split: name of the split.

    Returns:
      image_id -> the one that takes its place, for those that change.
    """
    ids = {row["image"]: row["image_id"] for row in report.sources[split].rows}
    # Images by the first that they are like, which may be in another split.
    alike: dict[Item, list[str]] = collections.defaultdict(list)
    for finding in report.findings:
        if finding.like is None or finding.item is None or finding.item[0] != "image":
            continue
        for its_split, name in (finding.like, (finding.split, finding.name)):
            if its_split == split:
                alike[finding.like].append(ids[name])

    joined: dict[str, str] = {}
    for first, *others in alike.values():
        for other in others:
            kept, gone = _last(joined, first), _last(joined, other)
            if kept != gone:
                joined[gone] = kept
    return {gone: _last(joined, gone) for gone in joined}


def _last(joined: dict[str, str], name: str) -> str:
    """Follow a name to the one that takes its place."""
    while name in joined:
        name = joined[name]
    return name


def _leaks(report: Report) -> set[Item]:
    """Find the items that are also in a more important split, and all their copies."""
    alike: dict[Item, set[Item]] = collections.defaultdict(set)  # by the first of their kind
    for finding in report.findings:
        if finding.kind == "split leak" and finding.like is not None:
            alike[finding.like] |= {finding.like, (finding.split, finding.name)}

    for finding in report.findings:
        if finding.kind in DUPLICATES and finding.like in alike:
            alike[finding.like].add((finding.split, finding.name))

    dropped = set()
    for items in alike.values():
        kept = max((split for split, _ in items), key=_importance)
        dropped |= {item for item in items if item[0] != kept}
    return dropped


def _clean_rows(
    report: Report, split: str, dropped: set[Item], folder: str
) -> list[dict[str, Any]]:
    """Return the rows of a split that are kept."""
    source = report.sources[split]

    joined = joined_ids(report, split)
    usable = [row for k, row in enumerate(source.rows) if k not in report.left_out[split]]
    rows = []
    for seconds, row in zip(report.seconds[split], usable, strict=True):
        if (split, row["image"]) in dropped or (split, row["audio"]) in dropped:
            continue
        rows.append(
            {
                "image": _relative(row["image"], folder),
                "audio": _relative(row["audio"], folder),
                "split": split,
                "image_id": joined.get(row["image_id"], row["image_id"]),
                "caption": row["caption"],
                "speaker": row["speaker"],
                "seconds": round(float(seconds), 4),
            }
        )
    return rows


def _importance(split: str) -> int:
    """Rank the splits: test, then validation, then train."""
    if "test" in split:
        return 2
    return 0 if "train" in split else 1


def _relative(name: str, folder: str) -> str:
    if "://" in name:
        return name
    name = os.path.abspath(name)
    below = name.startswith(folder + os.sep)
    return os.path.relpath(name, folder) if below or not _is_unicode(name) else name


def _is_unicode(name: str) -> bool:
    """Return whether a manifest can hold a name: JSON is Unicode, names of files are bytes."""
    return name.encode(errors="replace") == name.encode(errors="surrogatepass")
