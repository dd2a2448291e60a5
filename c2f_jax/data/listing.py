"""Read a listing of pairs, line by line: a line that cannot be read costs that line alone."""

import csv
import dataclasses
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from c2f_jax.data.audio import read_bytes
from c2f_jax.data.files import FileNames
from c2f_jax.data.source import SAMPLE_RATE
from c2f_jax.errors import UserError

REQUIRED = ("image", "audio", "split")
COLUMNS = (*REQUIRED, "image_id", "caption", "speaker", "seconds")
MOST_SECONDS = 1e5  # a day; a larger number is a mistake
MOST_LINES = 100  # of a CSV row; in a longer one a quote was left open
# What programs write for a missing value, as text.
MISSING = frozenset({"nan", "none", "null", "<na>", "na", "n/a", "#n/a", "nat"})

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")

Report = Callable[..., None]  # called with (where, what is wrong, split="") for a bad line


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
    parse = _parse_csv if path.lower().endswith(".csv") else _parse_jsonl
    for line, row in parse(path, _decode(path, read_bytes(path)), report):
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


def _decode(path: str, data: bytes) -> str:
    """Decode a text in UTF-8; bytes that are none become halves of surrogate pairs.

    Raises:
      UserError: the file is of another encoding throughout.
    """
    zeros = data[:4096].count(0)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros > len(data[:4096]) // 8:
        kind = "UTF-16 or UTF-32 text" if zeros else "UTF-16 text"
        raise UserError(f"{path}: {kind}, or no text at all; save it as UTF-8")
    return data.decode("utf-8-sig", errors="surrogateescape")


def _lines(path: str, text: str, report: Report) -> list[str]:
    """Split a text at line ends of any kind, which stay; lines that are not UTF-8 become empty."""
    lines = _LINE.findall(text)
    damaged = _NOT_UTF8.search(text) is not None
    for number, line in enumerate(lines):
        # A byte order mark stands where a file was appended to another.
        lines[number] = line = line.lstrip("\ufeff")
        found = _NOT_UTF8.search(line) if damaged else None
        if found:
            byte = ord(found[0]) - 0xDC00
            report(
                f"{path}:{number + 1}",
                f"not UTF-8 text (byte 0x{byte:02x}, column {found.start() + 1}); save the file "
                "as UTF-8",
            )
            lines[number] = ""
    return lines


def folder_of(path: str) -> str:
    """Return what is before the last name of a path, with its slash; "" for a bare name."""
    folder, slash, _ = path.rpartition("/")
    return folder + slash


def _join(folder: str, name: str) -> str:
    return name if os.path.isabs(name) or "://" in name else folder + name


def _parse_jsonl(path: str, text: str, report: Report) -> Iterator[tuple[int, dict]]:
    """Read (line number, row) of each line."""
    _check_jsonl(path, text)
    for line, content in enumerate(_lines(path, text, report), 1):
        # Blank lines are fine, such as one at the end.
        if not content.strip():
            continue
        where = f"{path}:{line}"

        try:
            row = json.loads(content, object_pairs_hook=_Row)
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


class _Row(dict):
    """A JSON object; ``twice`` names a key that it has twice, "" for none."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = ""
        if len(pairs) > len(self):
            self.twice = Counter(key for key, _ in pairs).most_common(1)[0][0]


def _check_jsonl(path: str, text: str) -> None:
    """Raise UserError for a file that is no list of lines of JSON."""
    start = text.lstrip()
    if start.startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            return
        # A line may hold a list by mistake; a list of objects is the whole file.
        if any(isinstance(entry, dict) for entry in whole):
            raise UserError(
                f"{path}: one JSON array; write one object a line, without the brackets"
            )
    first = re.split(r"[,;\t\r\n]", start, maxsplit=len(COLUMNS))
    if start[:1] not in ("{", "[") and set(REQUIRED) <= {name.strip(' "') for name in first}:
        raise UserError(f"{path}: CSV, not JSON; give it a name that ends in .csv")


def _parse_csv(path: str, text: str, report: Report) -> Iterator[tuple[int, dict]]:
    """Read (line number, row) of each row; after a row that is not CSV, go on in the next line."""
    lines = _lines(path, text, report)
    number, header, split_column, splits = 0, None, 0, set()
    while number < len(lines):
        try:
            record, count = _csv_record(lines, number)
        except csv.Error as e:
            where = f"{path}:{number + 1}"
            if header is None:
                raise UserError(f"{where}: the header is not CSV ({e})") from e
            report(where, f"not CSV ({e})")
            number += 1
            continue

        number += count
        if header is None and record:
            header = _check_header(path, record)
            split_column = header.index("split")
            continue
        if header is None or not record or (record == header and count == 1):
            continue

        # An open quote swallows rows up to the next quote: each is there to be seen.
        where = f"{path}:{number - count + 1}"
        swallowed = 0
        if count > 1:
            known = splits | set(record[split_column : split_column + 1])
            swallowed = _swallowed(
                lines[number - count + 1 : number], len(header), split_column, known
            )
        if swallowed:
            report(where, "not CSV (a quote is opened and not closed before the next row)")
            number -= count - 1
        elif len(record) != len(header):
            report(
                where,
                f"must have {len(header)} columns, as the header; a value that holds a comma "
                "needs quotes",
            )
        else:
            splits.add(record[split_column])
            yield number - count + 1, dict(zip(header, record, strict=True))
    if header is None:
        _check_header(path, [])


def _csv_record(lines: Sequence[str], number: int) -> tuple[list[str], int]:
    """Read the CSV record that begins at a line; return it and its number of lines.

    Raises:
      csv.Error: it is not CSV, or a quote is not closed.
    """
    try:
        return next(csv.reader([lines[number]], strict=True), []), 1
    except csv.Error:
        # Perhaps a quoted value that goes on in the next line.
        reader = csv.reader(lines[number : number + MOST_LINES], strict=True)
        return next(reader, []), reader.line_num


def _swallowed(lines: Sequence[str], columns: int, split_column: int, splits: set[str]) -> int:
    """Count the lines inside of a record that are rows themselves, of a split that there is."""
    count = 0
    for line in lines:
        try:
            record = next(csv.reader([line], strict=True), [])
        except csv.Error:
            continue
        count += len(record) == columns and record[split_column] in splits
    return count


def _check_header(path: str, header: list[str]) -> list[str]:
    """Return the header of a CSV file.

    Raises:
      UserError: a column is missing or stands there twice, or commas do not separate the columns.
    """
    absent = [column for column in REQUIRED if column not in header]
    if absent:
        line = ",".join(header)
        hint = f"the header has {', '.join(map(repr, header)) if header else 'nothing'}"
        if line.lstrip().startswith(("{", "[")):
            hint = "it is JSON: give it a name that ends in .jsonl"
        for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if set(REQUIRED) <= {_plain(word) for word in line.split(mark)}:
                hint = f"{name} separate its columns: write commas"
        close = {_plain(name): name for name in header}
        for column in absent:
            if column in close and column != close[column]:
                hint += f"; write {column!r} for {close[column]!r}"
        raise UserError(f"{path}:1: no column {', '.join(absent)}; {hint}")

    for column in COLUMNS:
        if header.count(column) > 1:
            raise UserError(f"{path}:1: the header has {header.count(column)} columns {column!r}")
    return header


def _plain(name: str) -> str:
    """Return the name of a column without case, spaces, quotes and hyphens."""
    return name.strip().strip("'\"").strip().lower().replace("-", "_").replace(" ", "_")


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
        close = [name for name in row if _plain(str(name)) == column]
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
        if not isinstance(value, str):
            continue
        if "\0" in value:
            raise ValueError(f"the text under {column!r} holds a NUL byte: {value!a}")
        if value.isascii():
            continue
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise ValueError(f"the text under {column!r} is not Unicode: {value!a}") from None
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
            meant = _plain(str(column))
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
        like = first.setdefault(_plain(name), name)
        if like != name:
            detail = f"{count:,} rows of the split {name!r}, which is not {like!r}"
            notes.append(Note("splits alike", listing.name, detail))
    return notes
