"""The header of an exported model, and its checksums."""

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from c2f_jax.errors import UserError

HEADER = "export.json"
VERSION = 1
EXPORT_AGAIN = "export again from the checkpoint with `c2f export`"
# jax promises that a jaxlib built up to 6 months after the exporting one reads an export.
PROMISED_DAYS = 181


@dataclass(frozen=True)
class Array:
    """An input or an output of a program.

    Attributes:
      name: its name, also in the ONNX file.
      shape: sizes; "batch" stands for any number of rows.
      dtype: type of the entries, such as "float32".
      meaning: what it is, in words.
      range: smallest and largest value; None if the values are not bounded.
      padded: whether axis 1 is padded with zeros, so that ``ExportedModel`` takes shorter ones.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str
    range: tuple[float, float] | None = None
    padded: bool = False


def promised_until(exported: datetime.date) -> datetime.date:
    """Return the day up to which jax promises that newly built versions read an export."""
    return exported + datetime.timedelta(days=PROMISED_DAYS)


def write_header(
    folder: Path,
    format: str,
    programs: Mapping[str, tuple[tuple[Array, ...], tuple[Array, ...]]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``export.json``, with the checksums of all files in the folder.

    Args:
      folder: where the files of all programs are.
      format: "stablehlo" or "onnx".
      programs: name -> inputs and outputs.
      facts: JSON values about the model and about what wrote it.

    Returns:
      The header.
    """
    described = {}
    for name, (inputs, outputs) in programs.items():
        described[name] = {
            "inputs": [asdict(array) for array in inputs],
            "outputs": [asdict(array) for array in outputs],
        }
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    header = {
        "version": VERSION,
        "format": format,
        **facts,
        "programs": described,
        "files": files,
    }
    (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n")
    return json.loads(json.dumps(header))


def read_header(folder: Path, format: str) -> dict[str, Any]:
    """Read ``export.json`` and compare the files with their checksums.

    Args:
      folder: a folder that ``c2f export`` has written.
      format: what it must hold, "stablehlo" or "onnx".

    Returns:
      The header.

    Raises:
      UserError: there is no complete export of this format, or a file is missing or damaged.
    """
    path = folder / HEADER
    if not path.is_file():
        raise UserError(
            f"{folder} holds no complete export (no {HEADER}): give a folder of `c2f export`"
        )
    try:
        header = json.loads(path.read_text())
        version, found, files = header["version"], header["format"], header["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {EXPORT_AGAIN}") from error
    if version != VERSION:
        raise UserError(
            f"{path} has version {version}, and this c2f_jax reads version {VERSION}: install the "
            f"c2f_jax that wrote it, or {EXPORT_AGAIN}"
        )
    if found != format:
        raise UserError(f"{folder} holds {found}, not {format}: export with --format={format}")

    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: copy the whole folder, or {EXPORT_AGAIN}")
        if _sha256(file) != expected["sha256"]:
            raise UserError(
                f"{file} is damaged (its SHA-256 is not that in {HEADER}): copy it again, or "
                f"{EXPORT_AGAIN}"
            )
    return header


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
