"""The rows of a JSONL or CSV file as written: a line that is damaged costs that line alone."""

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from c2f_jax.data.files import check_scheme
from c2f_jax.decoding.audio import read_bytes
from c2f_jax.errors import UserError

REQUIRED = ("image", "audio", "split")
COLUMNS = (*REQUIRED, "image_id", "caption", "speaker", "seconds")
MOST_LINES = 100  # of a CSV row; in a longer one a quote was left open

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")

Report = Callable[..., None]  # called with (where, what is wrong, split="") for a bad line


def read_rows(path: str, report: Report) -> Iterator[tuple[int, dict]]:
    """Read the rows of a file.

    Args:
      path: path of the file, local or in a bucket; .csv for CSV, anything else for JSONL.
      report: called with the place of each line that cannot be read, and what is wrong with it.

    Returns:
      (line number, row as written) of each row; ``twice`` of a JSON row names a key that it has
      twice, "" for none.

    Raises:
      UserError: the file cannot be read, is not text in UTF-8 or has another format, or a column is
        missing.
    """
    check_scheme(path)
    parse = _parse_csv if path.lower().endswith(".csv") else _parse_jsonl
    yield from parse(path, _decode(path, read_bytes(path)), report)


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
    splits: set[str] = set()
    number, header, split_column = 0, None, 0
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
        swallowed = False
        if count > 1:
            known = splits | set(record[split_column : split_column + 1])
            swallowed = _swallowed(lines[number - count : number], len(header), split_column, known)
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


def _swallowed(lines: Sequence[str], columns: int, split_column: int, splits: set[str]) -> bool:
    """Return whether a record of several lines holds rows, each of a split that there is.

    A line between the first and the last tells by itself. The last one also ends a row whose first
    column goes over several lines; if it is a row of its own, then the first line is one, too.
    """

    def is_row(line: str, open_quote: bool = False) -> bool:
        try:
            record = next(csv.reader([line], strict=not open_quote), [])
            if open_quote:  # what follows the quote is one value: read it as if there were none
                record[-1:] = next(csv.reader(record[-1:]), [""])
        except csv.Error:
            return False
        return len(record) == columns and record[split_column] in splits

    if any(is_row(line) for line in lines[1:-1]):
        return True
    return is_row(lines[-1]) and is_row(lines[0], open_quote=True)


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
            if set(REQUIRED) <= {plain_name(word) for word in line.split(mark)}:
                hint = f"{name} separate its columns: write commas"
        close = {plain_name(name): name for name in header}
        for column in absent:
            if column in close and column != close[column]:
                hint += f"; write {column!r} for {close[column]!r}"
        raise UserError(f"{path}:1: no column {', '.join(absent)}; {hint}")

    for column in COLUMNS:
        if header.count(column) > 1:
            raise UserError(f"{path}:1: the header has {header.count(column)} columns {column!r}")
    return header


def plain_name(name: str) -> str:
    """Return a name without case, spaces, quotes, hyphens and characters that are not seen."""
    name = "".join(c for c in name if unicodedata.category(c) != "Cf")
    return name.strip().strip("'\"").strip().lower().replace("-", "_").replace(" ", "_")
