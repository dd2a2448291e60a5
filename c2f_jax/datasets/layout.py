"""A published data set as its owners lay it out: parts, reader, published sizes."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence

from etils import epath

from c2f_jax.data.audio import read_bytes
from c2f_jax.data.manifest import Listing
from c2f_jax.errors import UserError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


@dataclasses.dataclass(frozen=True)
class Part:
    """A file or folder that a layout needs: any of `names`, in a given folder or one folder further down.

    source is where it is to be had; direct says that this is a link to a file, which a program may fetch.
    """

    what: str
    names: tuple[str, ...]
    source: str
    gigabytes: float | None = None
    direct: bool = True
    optional: bool = False

    def told(self) -> str:
        """What it is called, where it comes from and how large it is, in two lines."""
        size = "size not stated" if self.gigabytes is None else f"{self.gigabytes:g} GB"
        return f"{self.what}: {' or '.join(self.names)}\n    from {self.source} ({size})"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published data set: its parts, its reader, and (pictures, recordings) of each split as published."""

    name: str
    parts: tuple[Part, ...]
    read: Callable[[dict[str, epath.Path]], Listing]
    published: dict[str, tuple[int | None, int | None]]
    homepage: str
    licence: str

    def find(self, folders: Sequence) -> dict[str, epath.Path]:
        """Where each part is that is there: what -> path."""
        found = {}
        for part in self.parts:
            path = _find(folders, part.names)
            if path is not None:
                found[part.what] = path
        return found

    def missing(self, folders: Sequence) -> list[Part]:
        """The parts that are needed and not there."""
        found = self.find(folders)
        return [part for part in self.parts if part.what not in found and not part.optional]

    def listing(self, folders: Sequence) -> Listing:
        """The pairs found in the folders; `UserError` saying what is missing and where to get it."""
        missing = self.missing(folders)
        if missing:
            where = ", ".join(map(str, folders)) or "no folder was given"
            raise UserError(
                f"{self.name} lacks in {where}:\n"
                + "\n".join(f"  {part.told()}" for part in missing)
            )
        return self.read(self.find(folders))


def _find(folders: Sequence, names: Sequence[str]) -> epath.Path | None:
    for folder in map(epath.Path, folders):
        for name in names:
            if (folder / name).exists():
                return folder / name
    for folder in map(epath.Path, folders):
        below = (
            sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
        )
        for name in names:
            for path in below:
                if (path / name).exists():
                    return path / name
    return None


def text_lines(path):
    """(line number, line) of a text file, empty lines left out."""
    try:
        text = read_bytes(str(path)).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from e
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def json_entries(path, key: str) -> list[dict]:
    """The list of dicts under `key` of a JSON file."""
    try:
        entries = json.loads(read_bytes(str(path)))[key]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"{path}: not the JSON that was published ({type(e).__name__}: {e}); get it again"
        ) from e
    return dicts(entries, f"{path}, under {key!r}")


def dicts(values, where: str) -> list[dict]:
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return values
    raise UserError(f"{where}: expected a list of objects; get the file again")


def text_value(entry: dict, key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{where}: expected a text under {key!r}, found {value!r}; get the file again"
        )
    return value


def note_strays(listing: Listing, folder, also_listed: Sequence = ()) -> None:
    """Notes the files below a folder of recordings (on this machine: a bucket is not walked) that nothing names."""
    listed = {row["audio"] for row in listing.rows} | set(map(str, also_listed))
    below = (
        os.path.join(place, name) for place, _, names in os.walk(str(folder)) for name in names
    )
    listing.notes += [
        ("stray file", path, "no recording of the listing") for path in sorted(set(below) - listed)
    ]
