"""Anyone's own data: a JSONL or CSV file with the columns image, audio, split.

Optional columns: image_id (equal ids are the same thing shown, right answers for each other; the picture's path unless
given), caption, speaker, seconds (it only chooses the batch a recording is padded with). Paths are relative to the
manifest. Other columns are ignored.
"""

import csv
import dataclasses
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator

from etils import epath

from c2f_jax.data.audio import read_bytes
from c2f_jax.data.source import MANIFEST_SUFFIXES, SAMPLE_RATE, BadItems, PairSource, Recording
from c2f_jax.errors import UserError


@dataclasses.dataclass
class Listing:
    """The pairs of a data set that was found on disk.

    Attributes:
      name: of the data set.
      rows: one dict a recording, as of a manifest: image, audio (paths), split, image_id, caption, speaker, where,
        samples (-1: unknown).
      notes: (kind, name, detail) of each oddity of the listing; the kinds are those of `c2f_jax.data.check`.
    """

    name: str
    rows: list[dict] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def add(self, *, image, audio, split, image_id, where, caption="", speaker="") -> None:
        """One recording."""
        self.rows.append(
            {
                "image": str(image),
                "audio": str(audio),
                "split": split,
                "image_id": image_id,
                "caption": caption.strip(),
                "speaker": str(speaker),
                "where": where,
                "samples": -1,
            }
        )


REQUIRED = ("image", "audio", "split")


class ManifestSource(PairSource):
    """One split of a manifest or a published layout; `rows` are checked dicts with whole paths (see `read_listing`)."""

    def __init__(self, path: str, split: str, rows: list[dict], bad_items: BadItems):
        gallery: dict[str, int] = {}
        identities: dict[str, int] = {}
        image_index, image_ids, self._image_names = [], [], []
        for row in rows:
            identity = identities.setdefault(row["image_id"], len(identities))
            gallery_row = gallery.setdefault(row["image"], len(gallery))
            if gallery_row == len(image_ids):
                image_ids.append(identity)
                self._image_names.append(row["image_id"])
            elif image_ids[gallery_row] != identity:
                raise UserError(
                    f"{row['where']}: the picture {row['image']} has image_id {row['image_id']!r} here and "
                    f"{self._image_names[gallery_row]!r} before; a picture has one image_id"
                )
            image_index.append(gallery_row)
        self._rows, self._images = rows, list(gallery)
        self._folder = path.rpartition("/")[0] + "/"
        super().__init__(
            path,
            split,
            image_index=image_index,
            image_ids=image_ids,
            num_samples=[row["samples"] for row in rows],
            bad_items=bad_items,
        )

    @property
    def rows(self) -> list[dict]:
        """The checked rows, one a recording."""
        return self._rows

    def recording(self, index: int) -> Recording:
        """Recording `index`: path, caption, speaker."""
        row = self._rows[index]
        return Recording(audio=row["audio"], caption=row["caption"], speaker=row["speaker"])

    def image(self, row: int) -> str:
        """The path of picture `row`."""
        return self._images[row]

    def recording_key(self, index: int) -> str:
        """The recording's path as written in the manifest."""
        return self._rows[index]["audio"].removeprefix(self._folder)

    def image_key(self, row: int) -> str:
        """The picture's path as written in the manifest."""
        return self._images[row].removeprefix(self._folder)

    def image_id(self, row: int) -> str:
        """The image_id of picture `row` as written in the manifest."""
        return self._image_names[row]


def load_manifest(path: str, split: str, *, max_bad_share: float = 0.01) -> ManifestSource:
    """One split of the manifest at `path` (local or in a bucket).

    Rows whose files do not exist are left out and named in `bad_items`; files in a bucket are met only when read.
    Raises `UserError`, naming file and line, for lines that cannot be read and missing columns; for an unknown or
    empty split; and when more than max_bad_share of the split's rows lack a file.
    """
    path = str(path)
    listing = read_listing(path)
    rows = [row for row in listing.rows if row["split"] == split]
    if not rows:
        present = Counter(row["split"] for row in listing.rows)
        listed = (
            ", ".join(f"{name} ({count})" for name, count in present.items())
            or "none: it has no rows"
        )
        raise UserError(f"{path}: no rows of the split {split!r}; splits in the file: {listed}")
    bad_items = BadItems(f"{path}, split {split}", len(rows), max_bad_share)
    missing = {row["where"]: gap for row in rows if (gap := _missing_file(row))}
    bad_items.add_all({name: f"no such file ({where})" for where, name in missing.items()})
    rows = [row for row in rows if row["where"] not in missing]
    return ManifestSource(path, split, rows, bad_items)


def manifest_in(folder: str) -> str | None:
    """The path of the manifest.jsonl or manifest.csv that a folder holds; None where there is none."""
    paths = (epath.Path(folder) / f"manifest{suffix}" for suffix in MANIFEST_SUFFIXES)
    try:
        return next((str(path) for path in paths if path.exists()), None)
    except (OSError, ValueError):  # no name that a folder can have
        return None


def read_listing(path: str, *, strict: bool = True) -> Listing:
    """All rows of a manifest, with absolute paths (or relative to the working directory, as the manifest's is).

    A line that cannot be read raises `UserError` or, unless strict, is noted and left out.
    """
    path = str(path)
    listing = Listing(path)

    def report(where: str, reason: str) -> None:
        if strict:
            raise UserError(f"{where}: {reason}")
        listing.notes.append(("unreadable line", where, reason))

    folder = path.rpartition("/")[0]
    for row in _read_rows(path, report):
        for column in ("image", "audio"):
            row[column] = _join(folder, row[column])
        listing.rows.append(row)
    return listing


def _join(folder: str, name: str) -> str:
    absolute = os.path.isabs(name) or "://" in name
    return name if absolute or not folder else f"{folder}/{name}"


def _missing_file(row: dict) -> str | None:
    """The first file of the row that does not exist; files in buckets pass, asking for each would take too long."""
    for column in ("audio", "image"):
        if "://" not in row[column] and not os.path.isfile(row[column]):
            return row[column]
    return None


def _read_rows(path: str, report: Callable[[str, str], None]) -> Iterator[dict]:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from e
    parse = _parse_csv if path.lower().endswith(".csv") else _parse_jsonl
    for line, row in parse(path, text, report):
        where = f"{path}:{line}"
        try:
            yield _checked(row, where)
        except ValueError as e:
            report(where, str(e))


def _parse_jsonl(path: str, text: str, report):
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as e:
            report(
                f"{path}:{line}",
                f"not JSON ({e.msg}, column {e.colno}); expected one object a line",
            )
        except (
            ValueError,
            RecursionError,
        ) as e:  # numbers of thousands of digits, thousands of brackets
            report(f"{path}:{line}", f"not JSON of a row ({e}); expected one object a line")
        else:
            if isinstance(row, dict):
                yield line, row
            else:
                report(
                    f"{path}:{line}", f"expected a JSON object with the keys {', '.join(REQUIRED)}"
                )


def _parse_csv(path: str, text: str, report):
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        absent = [column for column in REQUIRED if column not in header]
        if absent:
            raise UserError(
                f"{path}:1: no column {', '.join(absent)}; the header has {', '.join(header) or 'nothing'}"
            )
        for row in reader:
            if None in row or None in row.values():
                report(
                    f"{path}:{reader.line_num}",
                    f"{len(header)} columns expected as in the header; a value that holds a comma needs quotes",
                )
            else:
                yield reader.line_num, row
    except csv.Error as e:
        report(f"{path}:{reader.line_num}", f"not CSV ({e})")


def _checked(row: dict, where: str) -> dict:
    """The known columns of a row with defaults filled in; `ValueError` saying what is wrong with one."""
    for column in REQUIRED:
        value = row.get(column)
        if not isinstance(value, str) or not value:
            has = (
                f"it is {value!r}"
                if column in row
                else f"the row has {', '.join(map(str, row)) or 'nothing'}"
            )
            raise ValueError(f"needs a text under {column!r}; {has}")
    seconds = row.get("seconds")
    if seconds in (None, ""):
        samples = -1
    else:
        try:
            seconds = float(seconds)
        except (TypeError, ValueError, OverflowError):
            seconds = math.nan
        if not 0 < seconds < 1e5:
            raise ValueError(
                f"seconds is {row['seconds']!r}, expected the length of the recording, above 0"
            )
        samples = round(seconds * SAMPLE_RATE)
    identity = row.get("image_id")
    checked = {
        "image": row["image"],
        "audio": row["audio"],
        "split": row["split"],
        "where": where,
        "samples": samples,
        "image_id": row["image"] if identity in (None, "") else str(identity),
        "caption": str(row.get("caption") or ""),
        "speaker": str(row.get("speaker") or ""),
    }
    for column, value in checked.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
                raise ValueError(f"the text under {column!r} is not Unicode: {value!a}") from None
    return checked
