"""A manifest of what a data check found usable."""

import collections
import json
import os
from typing import Any

from etils import epath

from c2f_jax.data.manifest import ManifestSource
from c2f_jax.data_check.findings import Report
from c2f_jax.errors import UserError

DUPLICATES = ("duplicate image", "duplicate recording", "repeated image")

Item = tuple[str, str]  # split and name


def check_name(path: str | os.PathLike) -> epath.Path:
    """Check the name of a manifest that will be written.

    Args:
      path: path of the manifest.

    Returns:
      The path.

    Raises:
      UserError: it does not end in .jsonl, or exists.
    """
    file = epath.Path(path)
    if file.suffix != ".jsonl":
        raise UserError(f"--fix={path}: give a name that ends in .jsonl")
    if file.exists():
        raise UserError(f"--fix={path}: already exists; give another name")
    return file


def write_clean_manifest(report: Report, path: str | os.PathLike) -> int:
    """Write a manifest of what can be used; the data themselves are not touched.

    It leaves out pairs that cannot be read. What is in two splits stays in the test split, else in
    validation. Duplicate images of a split get one image_id. Lengths are filled in.
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

    # Images that look the same get the image_id of the first of them.
    ids = {row["image"]: row["image_id"] for row in source.rows}
    first_of = {}
    for finding in report.findings:
        if finding.kind == "duplicate image":
            first_of[finding.name] = finding.like[1]

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
                "image_id": ids[first_of.get(row["image"], row["image"])],
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
    return os.path.relpath(name, folder) if name.startswith(folder + os.sep) else name
