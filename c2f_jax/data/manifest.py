"""Your own data: a JSONL or CSV file with the columns image, audio, split.

Optional columns: image_id (items with equal ids match each other; by default the image's path),
caption, speaker, seconds (only used to choose the batch that a recording is padded with). Paths are
relative to the manifest. Other columns are ignored.
"""

import csv
import dataclasses
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from c2f_jax.data.audio import read_bytes
from c2f_jax.data.source import SAMPLE_RATE, BadItems, ModelInputs, PairSource, Recording
from c2f_jax.errors import UserError

MANIFEST_SUFFIXES = (".jsonl", ".csv")

REQUIRED = ("image", "audio", "split")
MOST_SECONDS = 1e5  # a day; a larger number is a mistake

Report = Callable[[str, str], None]  # called with (where, what is wrong) for a bad line


class Note(NamedTuple):
    """An oddity of a listing.

    Attributes:
      kind: a kind of `c2f_jax.data_check.findings`.
      name: the item; its path if it is a file.
      detail: what is odd about it.
    """

    kind: str
    name: str
    detail: str


@dataclasses.dataclass
class Listing:
    """The pairs of a data set that was found on disk.

    Attributes:
      name: name of the data set, or path of the manifest.
      rows: one dict for each recording: image, audio (paths), split, image_id, caption, speaker,
        where (it is listed), samples (-1: unknown).
      notes: what is odd about the listing.
    """

    name: str
    rows: list[dict] = dataclasses.field(default_factory=list)
    notes: list[Note] = dataclasses.field(default_factory=list)

    def add(
        self,
        *,
        image: str | os.PathLike,
        audio: str | os.PathLike,
        split: str,
        image_id: str,
        where: str,
        caption: str = "",
        speaker: str = "",
    ) -> None:
        """Add a recording.

        Args:
          image: path of the image.
          audio: path of the recording.
          split: name of the split.
          image_id: identity of what the image shows.
          where: file and line that list it.
          caption: what is said.
          speaker: who says it.
        """
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

    def note(self, kind: str, name: str | os.PathLike, detail: str) -> None:
        """Add a note; see `Note`."""
        self.notes.append(Note(kind, str(name), detail))

    def count_splits(self) -> dict[str, tuple[int, int]]:
        """Count (images, recordings) of each split."""
        recordings = Counter(row["split"] for row in self.rows)
        images = {(row["split"], row["image"]) for row in self.rows}
        images_of = Counter(split for split, _ in images)
        return {split: (images_of[split], count) for split, count in recordings.items()}


class ManifestSource(PairSource):
    """One split of a manifest or of a published layout."""

    def __init__(
        self,
        path: str,
        split: str,
        rows: list[dict],
        bad_items: BadItems,
        inputs: ModelInputs | None = None,
    ) -> None:
        """Create a source.

        Args:
          path: path of the manifest, or name of the data set.
          split: name of the split.
          rows: rows of a `Listing`, all of this split.
          bad_items: what was left out.
          inputs: what the model is given of each item.

        Raises:
          UserError: an image has two image_ids.
        """
        # Images and identities are numbered in the order in which they are first met.
        gallery: dict[str, int] = {}
        identities: dict[str, int] = {}
        image_index: list[int] = []
        image_ids: list[int] = []
        self._image_names: list[str] = []
        for row in rows:
            identity = identities.setdefault(row["image_id"], len(identities))
            gallery_row = gallery.setdefault(row["image"], len(gallery))
            if gallery_row == len(image_ids):
                image_ids.append(identity)
                self._image_names.append(row["image_id"])
            elif image_ids[gallery_row] != identity:
                raise UserError(
                    f"{row['where']}: the image {row['image']} has image_id "
                    f"{row['image_id']!r} here and {self._image_names[gallery_row]!r} before; "
                    "an image has one image_id"
                )
            image_index.append(gallery_row)

        self._rows, self._images = rows, list(gallery)
        # Keys of feature caches are relative, so that a set can be moved with its caches.
        self._folder = path.rpartition("/")[0] + "/"
        super().__init__(
            path,
            split,
            image_index=image_index,
            image_ids=image_ids,
            num_samples=[row["samples"] for row in rows],
            bad_items=bad_items,
            inputs=inputs,
        )

    @property
    def rows(self) -> list[dict]:
        """The checked rows, one for each recording."""
        return self._rows

    def recording(self, index: int) -> Recording:
        """Return path, caption and speaker of recording `index`."""
        row = self._rows[index]
        return Recording(audio=row["audio"], caption=row["caption"], speaker=row["speaker"])

    def image(self, row: int) -> str:
        """Return the path of image `row`."""
        return self._images[row]

    def recording_key(self, index: int) -> str:
        """Return the recording's path as written in the manifest."""
        return self._rows[index]["audio"].removeprefix(self._folder)

    def image_key(self, row: int) -> str:
        """Return the image's path as written in the manifest."""
        return self._images[row].removeprefix(self._folder)

    def image_id(self, row: int) -> str:
        """Return the image_id of image `row` as written in the manifest."""
        return self._image_names[row]


def is_manifest(path: str) -> bool:
    """Return whether a path names a manifest, judged by its suffix."""
    return str(path).lower().endswith(MANIFEST_SUFFIXES)


def load_manifest(
    path: str, split: str, *, max_bad_share: float = 0.01, inputs: ModelInputs | None = None
) -> ManifestSource:
    """Open one split of a manifest.

    Rows whose files do not exist are left out and named in `bad_items`; files in a bucket are only
    looked for when they are read.

    Args:
      path: path of the manifest, local or in a bucket.
      split: name of the split.
      max_bad_share: share of bad items above which reading ends with an error.
      inputs: what the model is given of each item.

    Returns:
      The pairs of the split.

    Raises:
      UserError: a line cannot be read or a column is missing (the message names file and line); the
        split is unknown or empty; or too many rows lack a file.
    """
    path = str(path)
    listing = read_listing(path)

    rows = [row for row in listing.rows if row["split"] == split]
    if not rows:
        counts = Counter(row["split"] for row in listing.rows)
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise UserError(
            f"{path}: no rows of the split {split!r}; splits in the file: "
            f"{listed or 'none, it has no rows'}"
        )

    # Look for all files first, so that an error can count those that are missing.
    bad_items = BadItems(f"{path}, split {split}", len(rows), max_bad_share)
    there, missing = [], {}
    for row in rows:
        name = _missing_file(row)
        if name is None:
            there.append(row)
        else:
            missing[name] = f"no such file ({row['where']})"

    bad_items.add_all(missing)
    return ManifestSource(path, split, there, bad_items, inputs)


def manifest_in(folder: str) -> str | None:
    """Look for manifest.jsonl or manifest.csv.

    Args:
      folder: a folder, which need not exist.

    Returns:
      The path of the manifest; None if there is none.
    """
    try:
        for suffix in MANIFEST_SUFFIXES:
            path = epath.Path(folder) / f"manifest{suffix}"
            if path.exists():
                return str(path)
    except (OSError, ValueError):  # no name that a folder can have
        pass
    return None


def read_listing(path: str, *, strict: bool = True) -> Listing:
    """Read all rows of a manifest.

    Args:
      path: path of the manifest, local or in a bucket.
      strict: whether a line that cannot be read is an error; otherwise it is noted and left out.

    Returns:
      The listing; its paths are absolute, or relative to the working directory as the manifest's
      is.

    Raises:
      UserError: the file cannot be read, a column is missing or, if strict, a line cannot be read.
    """
    path = str(path)
    listing = Listing(path)

    def report(where: str, reason: str) -> None:
        if strict:
            raise UserError(f"{where}: {reason}")
        listing.note("unreadable line", where, reason)

    folder = path.rpartition("/")[0]
    for row in _read_rows(path, report):
        for column in ("image", "audio"):
            # Plain text, so that paths in buckets and on disk are treated alike.
            row[column] = _join(folder, row[column])
        listing.rows.append(row)
    return listing


def _join(folder: str, name: str) -> str:
    absolute = os.path.isabs(name) or "://" in name
    return name if absolute or not folder else f"{folder}/{name}"


def _missing_file(row: Mapping) -> str | None:
    """Return the first local file of the row that does not exist."""
    for column in ("audio", "image"):
        # Asking a bucket for each file would take too long.
        if "://" not in row[column] and not os.path.isfile(row[column]):
            return row[column]
    return None


def _read_rows(path: str, report: Report) -> Iterator[dict]:
    """Read the checked rows of a manifest."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from e

    parse = _parse_csv if path.lower().endswith(".csv") else _parse_jsonl
    for line, row in parse(path, text, report):
        where = f"{path}:{line}"
        try:
            yield _check_row(row, where)
        except ValueError as e:
            report(where, str(e))


def _parse_jsonl(path: str, text: str, report: Report) -> Iterator[tuple[int, dict]]:
    """Read (line number, row) of each line."""
    for line, content in enumerate(text.split("\n"), 1):
        # Blank lines are fine, such as one at the end.
        if not content.strip():
            continue
        where = f"{path}:{line}"

        try:
            row = json.loads(content)
        except json.JSONDecodeError as e:
            report(where, f"not JSON ({e.msg}, column {e.colno}); write one object a line")
            continue
        except (ValueError, RecursionError) as e:  # thousands of digits, or of brackets
            report(where, f"not JSON of a row ({e}); write one object a line")
            continue

        if isinstance(row, dict):
            yield line, row
        else:
            report(where, f"must be a JSON object with the keys {', '.join(REQUIRED)}")


def _parse_csv(path: str, text: str, report: Report) -> Iterator[tuple[int, dict]]:
    """Read (line number, row) of each row."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        absent = [column for column in REQUIRED if column not in header]
        if absent:
            raise UserError(
                f"{path}:1: no column {', '.join(absent)}; "
                f"the header has {', '.join(header) or 'nothing'}"
            )

        # csv puts surplus values under None, and None in place of missing ones.
        for row in reader:
            if None in row or None in row.values():
                report(
                    f"{path}:{reader.line_num}",
                    f"must have {len(header)} columns, as the header; a value that holds a comma "
                    "needs quotes",
                )
            else:
                yield reader.line_num, row
    except csv.Error as e:
        report(f"{path}:{reader.line_num}", f"not CSV ({e})")


def _check_row(row: Mapping, where: str) -> dict:
    """Check the known columns of a row, and fill in the defaults.

    Args:
      row: the row as written.
      where: file and line.

    Returns:
      A row of a `Listing`.

    Raises:
      ValueError: a column is missing or holds no such value.
    """
    for column in REQUIRED:
        value = row.get(column)
        if isinstance(value, str) and value:
            continue
        if column in row:
            raise ValueError(f"{column!r} must be a non-empty string, not {value!r}")
        raise ValueError(
            f"{column!r} is missing; the row has {', '.join(map(str, row)) or 'nothing'}"
        )

    identity = row.get("image_id")
    checked = {
        "image": row["image"],
        "audio": row["audio"],
        "split": row["split"],
        "where": where,
        "samples": _samples(row.get("seconds")),
        "image_id": row["image"] if identity in (None, "") else str(identity),
        "caption": str(row.get("caption") or ""),
        "speaker": str(row.get("speaker") or ""),
    }

    # JSON can spell half of a surrogate pair, which no file name or page can hold.
    for column, value in checked.items():
        if not isinstance(value, str) or value.isascii():
            continue
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise ValueError(f"the text under {column!r} is not Unicode: {value!a}") from None
    return checked


def _samples(seconds: Any) -> int:
    """Convert a length as written to samples; -1 for none given."""
    if seconds in (None, ""):
        return -1
    try:
        value = float(seconds)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 < value < MOST_SECONDS:
        raise ValueError(f"seconds must be the length of the recording, above 0, not {seconds!r}")
    return round(value * SAMPLE_RATE)
