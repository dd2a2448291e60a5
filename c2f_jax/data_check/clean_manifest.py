"""A manifest of what a data check found usable."""

import collections
import json
import os

from etils import epath

from c2f_jax.data.manifest import ManifestSource
from c2f_jax.data_check.findings import Report
from c2f_jax.errors import UserError


def check_name(path: str) -> epath.Path:
    """The path of a manifest to be written; `UserError` where it exists or is no .jsonl."""
    path = epath.Path(path)
    if path.suffix != ".jsonl":
        raise UserError(f"--fix={path}: a name that ends in .jsonl is expected")
    if path.exists():
        raise UserError(f"--fix={path}: exists; nothing is overwritten, give another name")
    return path


def write_clean_manifest(report: Report, path: str) -> int:
    """Writes a manifest of what can be used and returns its number of rows; the data themselves are not touched.

    Left out: pairs that cannot be read, and of what is in two splits all but that of the test split (then validation).
    Duplicate pictures of a split get one image_id. Lengths are filled in. Paths are relative where the files lie below
    the manifest's folder. Raises `UserError` as `check_name`, and for a prepared set, which has no files.
    """
    path = check_name(path)
    if not all(isinstance(source, ManifestSource) for source in report.sources.values()):
        raise UserError(
            f"{report.name} is prepared: fix the folder or manifest that it was made from (--manual-dir)"
        )
    folder = os.path.abspath(path.parent) if "://" not in str(path) else str(path.parent)
    first_of = {f.name: f.like[1] for f in report.findings if f.kind == "duplicate picture"}
    same = ("duplicate picture", "duplicate recording", "repeated picture")
    leaking = collections.defaultdict(set)  # the first of its kind -> all that are like it
    for finding in report.findings:
        if finding.kind == "split leak":
            leaking[finding.like] |= {finding.like, (finding.split, finding.name)}
    for finding in report.findings:
        if finding.kind in same and finding.like in leaking:
            leaking[finding.like].add((finding.split, finding.name))
    dropped = set()
    for items in leaking.values():
        kept = max((split for split, _ in items), key=_importance)
        dropped |= {item for item in items if item[0] != kept}
    rows = []
    for split, source in report.sources.items():
        usable = [row for k, row in enumerate(source.rows) if k not in report.left_out[split]]
        ids = {row["image"]: row["image_id"] for row in source.rows}
        for length, row in zip(report.seconds[split], usable, strict=True):
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
                    "seconds": round(float(length), 4),
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _importance(split: str) -> int:
    return 2 if "test" in split else 0 if "train" in split else 1


def _relative(name: str, folder: str) -> str:
    if "://" in name:
        return name
    name = os.path.abspath(name)
    return os.path.relpath(name, folder) if name.startswith(folder + os.sep) else name
