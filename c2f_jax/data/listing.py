"""A listing of pairs: its checked rows, what is odd about it, and which line is left out why."""

import dataclasses
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from c2f_jax.data.files import FileNames, check_scheme
from c2f_jax.data.rows import COLUMNS, REQUIRED, plain_name, read_rows
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError

MOST_SECONDS = 1e5  # a day; a larger number is a mistake
# What programs write for a missing value, as text.
MISSING = frozenset({"nan", "none", "null", "<na>", "na", "n/a", "#n/a", "nat"})


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
      rows: one dict for each recording: image, audio (paths), split, image_id ("" for none given),
        caption, speaker, where (it is listed), samples (-1: unknown).
      notes: what is odd about the listing.
      left_out: place -> (split, what is wrong) of each line that cannot be used; the split is ""
        where that is unknown.
    """

    name: str
    rows: list[dict] = dataclasses.field(default_factory=list)
    notes: list[Note] = dataclasses.field(default_factory=list)
    left_out: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

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

    def leave_out(self, kind: str, name: str, where: str, reason: str, split: str = "") -> None:
        """Note a line that cannot be used.

        Args:
          kind: kind of the note.
          name: name of the note.
          where: file and line.
          reason: what is wrong with it.
          split: its split, if that is known.
        """
        self.note(kind, name, reason if name == where else f"{where}: {reason}")
        self.left_out[where] = (split, reason)

    def left_out_of(self, split: str) -> dict[str, str]:
        """Return place -> what is wrong of the lines that are left out of a split.

        A line whose split is unknown is left out of each.
        """
        found = {}
        for where, (its_split, reason) in self.left_out.items():
            if its_split in ("", split):
                found[where] = reason
        return found

    def count_splits(self) -> dict[str, tuple[int, int]]:
        """Count (images, recordings) of each split."""
        recordings = Counter(row["split"] for row in self.rows)
        images = {(row["split"], row["image"]) for row in self.rows}
        images_of = Counter(split for split, _ in images)
        return {split: (images_of[split], count) for split, count in recordings.items()}

    def resolve(self, split: str | None = None) -> set[str]:
        """Give each file one path and each image of a split one image_id.

        Rows of an image that has another image_id already are left out, with a note. An image
        without an image_id has its own path, as the listing writes it.

        Args:
          split: the split to keep; None to keep all.

        Returns:
          The files that do not exist. Files in a bucket are only looked for when they are read.
        """
        names, missing = FileNames(), set()
        rows = [row for row in self.rows if split in (None, row["split"])]
        for row in rows:
            for column in ("image", "audio"):
                path = names.find(row[column])
                if path is None:
                    missing.add(row[column])
                elif path != row[column]:
                    row[column] = path

        # What was found under another spelling, once each.
        for spelling, path in names.other_spellings().items():
            self.note("other spelling", spelling, f"the same file as {path}")

        given: dict[tuple[str, str], str] = {}
        kept = []
        for row in rows:
            known = given.setdefault((row["split"], row["image"]), row["image_id"])
            if not known and row["image_id"]:
                given[row["split"], row["image"]] = row["image_id"]
            elif row["image_id"] not in ("", known):
                reason = (
                    f"the image {row['image']} has image_id {row['image_id']!r} here and "
                    f"{known!r} before; an image has one image_id"
                )
                self.leave_out("two image ids", row["image"], row["where"], reason, row["split"])
                continue
            kept.append(row)

        folder = folder_of(self.name)
        for row in kept:
            identity = given[row["split"], row["image"]]
            row["image_id"] = identity or row["image"].removeprefix(folder)
        self.rows = kept
        return missing


def read_listing(path: str, *, strict: bool = True) -> Listing:
    """Read all rows of a manifest.

    Args:
      path: path of the manifest, local or in a bucket.
      strict: whether a line that cannot be read is an error; otherwise it is noted and left out.

    Returns:
      The listing; its paths are absolute, or relative to the working directory as the manifest's
      is. Files are not looked for; see `Listing.resolve`.

    Raises:
      UserError: the file cannot be read, is not text in UTF-8, or has another format; a column is
        missing; or, if strict, a line cannot be read.
    """
    path = str(path)
    listing = Listing(path)

    def report(where: str, reason: str, split: str = "") -> None:
        if strict:
            raise UserError(f"{where}: {reason}")
        listing.leave_out("unreadable line", where, where, reason, split)

    folder = folder_of(path)
    odd = _OddValues(path)
    for line, row in read_rows(path, report):
        where = f"{path}:{line}"
        try:
            checked = _check_row(row, where)
        except ValueError as e:
            split = row.get("split")
            report(where, str(e), split if isinstance(split, str) else "")
            continue
        odd.look(row, line)
        for column in ("image", "audio"):
            # Plain text, so that paths in buckets and on disk are treated alike.
            checked[column] = _join(folder, checked[column])
        listing.rows.append(checked)

    listing.notes += odd.notes()
    listing.notes += _splits_alike(listing)
    return listing


def folder_of(path: str) -> str:
    """Return what is before the last name of a path, with its slash; "" for a bare name."""
    folder, slash, _ = path.rpartition("/")
    return folder + slash


def _join(folder: str, name: str) -> str:
    return name if os.path.isabs(name) or "://" in name else folder + name


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
    twice = getattr(row, "twice", "")
    if twice:
        raise ValueError(f"the key {twice!r} stands there twice")
    for column in REQUIRED:
        value = row.get(column)
        if isinstance(value, str) and value:
            continue
        if column in row:
            raise ValueError(f"{column!r} must be a non-empty string, not {value!r}")
        close = [name for name in row if plain_name(str(name)) == column]
        hint = f": write {column!r} for {close[0]!r}" if close else ""
        raise ValueError(
            f"{column!r} is missing; the row has {', '.join(map(str, row)) or 'nothing'}{hint}"
        )

    checked = {
        "image": row["image"],
        "audio": row["audio"],
        "split": row["split"],
        "where": where,
        "samples": _samples(row.get("seconds")),
        "image_id": _name("image_id", row.get("image_id")),
        "caption": "" if _is_missing(row.get("caption")) else str(row["caption"]),
        "speaker": _name("speaker", row.get("speaker")),
    }
    for column, value in checked.items():
        if column == "where" or not isinstance(value, str):
            continue  # a folder may have any name
        if "\0" in value:
            raise ValueError(f"the text under {column!r} holds a NUL byte: {value!a}")
        if value.isascii():
            continue
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise ValueError(f"the text under {column!r} is not Unicode: {value!a}") from None
    check_scheme(checked["image"])
    check_scheme(checked["audio"])
    return checked


def _is_missing(value: Any) -> bool:
    """Return whether a value is none: absent, null, empty, or not a number, as data frames have."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _is_missing_text(value: Any) -> bool:
    """Return whether a text is what programs write for a missing value."""
    return isinstance(value, str) and value.strip().lower() in MISSING


def _name(column: str, value: Any) -> str:
    """Return an identity as text: that of 7, 7.0 and "7" is the same; "" for none given.

    Raises:
      ValueError: the value names nothing.
    """
    if _is_missing(value) or _is_missing_text(value):
        return ""
    if isinstance(value, str):
        text = unicodedata.normalize("NFC", value.strip())
        # Data frames write whole numbers so if others are missing.
        return re.sub(r"^(-?\d+)\.0+$", r"\1", text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{column!r} must be text or a number, not {value!r}")
    if isinstance(value, float):
        if not abs(value) < 2**53:  # beyond, different numbers are rounded to the same
            raise ValueError(f"{column!r} is {value!r}, which is not exact: write it as text")
        if value.is_integer():
            value = int(value)
    return str(value)


def _samples(seconds: Any) -> int:
    """Convert a length as written to samples; -1 for none given."""
    if _is_missing(seconds) or _is_missing_text(seconds):
        return -1
    try:
        value = math.nan if isinstance(seconds, bool) else float(seconds)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 < value < MOST_SECONDS:
        raise ValueError(f"seconds must be the length of the recording, above 0, not {seconds!r}")
    return round(value * SAMPLE_RATE)


class _OddValues:
    """Columns that are not read, and texts that stand for missing values, counted."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._found: dict[tuple[str, str], list[int]] = {}  # (column, text) -> first line, count

    def look(self, row: Mapping, line: int) -> None:
        """Look at a row as written."""
        for column in row:
            if column not in COLUMNS:
                self._count(column, "", line)
        for column in ("image_id", "speaker", "seconds"):
            if _is_missing_text(row.get(column)):
                self._count(column, row[column], line)

    def _count(self, column: str, text: str, line: int) -> None:
        self._found.setdefault((column, text), [line, 0])[1] += 1

    def notes(self) -> list[Note]:
        """Return what was found."""
        notes = []
        for (column, text), (line, count) in self._found.items():
            where = f"{self._path}:{line}"
            meant = plain_name(str(column))
            if text:
                detail = f"{column} {text!r} of {count:,} rows is read as missing"
                notes.append(Note("missing value", where, detail))
            elif meant in COLUMNS:
                detail = f"{column!r} is not read: write {meant!r}"
                notes.append(Note("misspelled column", where, detail))
            else:
                notes.append(Note("ignored column", where, f"{column!r} is not read"))
        return notes


def _splits_alike(listing: Listing) -> list[Note]:
    """Note splits whose names differ in case or spaces alone."""
    counts = Counter(row["split"] for row in listing.rows)
    first: dict[str, str] = {}
    notes = []
    for name, count in counts.most_common():
        like = first.setdefault(plain_name(name), name)
        if like != name:
            detail = f"{count:,} rows of the split {name!r}, which is not {like!r}"
            notes.append(Note("splits alike", listing.name, detail))
    return notes
