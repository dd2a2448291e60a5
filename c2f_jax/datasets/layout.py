"""How a published data set is laid out on disk: its parts, its reader, its published sizes."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from etils import epath

from c2f_jax.data.listing import Listing
from c2f_jax.decoding.audio import read_bytes
from c2f_jax.errors import UserError

PathLike = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Part:
    """A file or folder that a layout needs.

    Attributes:
      what: what it holds.
      names: what it may be called, in a given folder or one folder further down.
      source: where to get it.
      gigabytes: size of the download; None if it is not stated.
      direct: whether `source` is a link to a file, which a program may fetch.
      optional: whether the data set can be read without it.
    """

    what: str
    names: tuple[str, ...]
    source: str
    gigabytes: float | None = None
    direct: bool = True
    optional: bool = False

    def describe(self) -> str:
        """Describe the part in two lines: names, source and size."""
        size = "size not stated" if self.gigabytes is None else f"{self.gigabytes:g} GB"
        return f"{self.what}: {' or '.join(self.names)}\n    from {self.source} ({size})"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published data set.

    Attributes:
      name: name of the data set.
      parts: what has to be downloaded.
      read: reader of the parts: what -> path of each part, to the pairs.
      published: split -> (images, recordings) as published; None where not stated.
      homepage: page of the owners.
      license: license of the data, in words.
    """

    name: str
    parts: tuple[Part, ...]
    read: Callable[[dict[str, epath.Path]], Listing]
    published: Mapping[str, tuple[int | None, int | None]]
    homepage: str
    license: str

    def find(self, folders: Sequence[PathLike]) -> dict[str, epath.Path]:
        """Look for the parts.

        Args:
          folders: folders of what was downloaded.

        Returns:
          what -> path of each part that was found.
        """
        found = {}
        for part in self.parts:
            path = _find(folders, part.names)
            if path is not None:
                found[part.what] = path
        return found

    def missing(self, folders: Sequence[PathLike]) -> list[Part]:
        """List the parts that are needed and are not in the folders."""
        found = self.find(folders)
        return [part for part in self.parts if part.what not in found and not part.optional]

    def listing(self, folders: Sequence[PathLike]) -> Listing:
        """Read the pairs that the folders hold.

        Args:
          folders: folders of what was downloaded.

        Returns:
          The pairs, and what is odd about them.

        Raises:
          UserError: a part is missing (the message says where to get it) or cannot be read.
        """
        missing = self.missing(folders)
        if missing:
            where = ", ".join(map(str, folders)) or "no folder was given"
            parts = "\n".join(f"  {part.describe()}" for part in missing)
            raise UserError(f"{self.name}: parts are missing in {where}:\n{parts}")
        return self.read(self.find(folders))


def _find(folders: Sequence[PathLike], names: Sequence[str]) -> epath.Path | None:
    """Find the first of the names in the folders, or else one folder further down."""
    paths = [epath.Path(folder) for folder in folders]
    for folder in paths:
        for name in names:
            if (folder / name).exists():
                return folder / name

    for folder in paths:
        if not folder.exists():
            continue
        below = sorted(path for path in folder.iterdir() if path.is_dir())
        for name in names:
            for path in below:
                if (path / name).exists():
                    return path / name
    return None


def text_lines(path: PathLike) -> list[tuple[int, str]]:
    """Read a text file.

    Args:
      path: path of the file.

    Returns:
      (line number, line) of each line that is not empty.

    Raises:
      UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        text = read_bytes(str(path)).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from e
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def json_entries(path: PathLike, key: str) -> list[dict]:
    """Read a list of objects from a JSON file.

    Args:
      path: path of the file.
      key: key of the list in the object that the file holds.

    Returns:
      The objects.

    Raises:
      UserError: the file cannot be read, or holds no such list.
    """
    try:
        entries = json.loads(read_bytes(str(path)))[key]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"{path}: not the JSON that was published ({type(e).__name__}: {e}); download it again"
        ) from e
    return dict_list(entries, f"{path}, under {key!r}")


def dict_list(values: object, where: str) -> list[dict]:
    """Check that a value read from JSON is a list of objects.

    Args:
      values: the value.
      where: what the error message calls it.

    Returns:
      The value.

    Raises:
      UserError: it is not.
    """
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return values
    raise UserError(f"{where}: must be a list of objects; download the file again")


def text_value(entry: Mapping, key: str, where: str) -> str:
    """Take a string from an object read from JSON.

    Args:
      entry: the object.
      key: key of the string.
      where: what the error message calls the object.

    Returns:
      The string.

    Raises:
      UserError: it is missing or empty, or no string.
    """
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{where}: {key!r} must be a non-empty string, not {value!r}; download the file again"
        )
    return value


def note_strays(listing: Listing, folder: PathLike, unused: Iterable[PathLike] = ()) -> None:
    """Note the files in a folder of recordings that nothing refers to.

    Only a local folder is searched: listing a bucket would take too long.

    Args:
      listing: the listing, which gets the notes.
      folder: folder of the recordings.
      unused: recordings that are listed, but belong to no split.
    """
    listed = {row["audio"] for row in listing.rows}
    listed.update(map(str, unused))

    found: set[str] = set()
    for place, _, names in os.walk(str(folder)):
        found.update(os.path.join(place, name) for name in names)
    for path in sorted(found - listed):
        listing.note("stray file", path, "not in the listing")
