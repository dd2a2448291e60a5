"""Files: one path for each however it is spelled, what tells a change, what can be written."""

import functools
import hashlib
import os
import posixpath
import stat
import tempfile
import unicodedata
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from c2f_jax.errors import UserError

BUCKETS = ("gs", "s3", "az", "hf")  # what etils.epath reads

State = list[int | str]


class Stamp(NamedTuple):
    """What tells whether the content of an item has changed.

    Attributes:
      state: what cannot stay equal when the content changes, cheap to look up; [] if there is no
        such thing.
      content: function that hashes the content, which takes reading it.
    """

    state: State
    content: Callable[[], str]

    def record(self) -> list:
        """Return [state, hash of the content], to store; see `matches`."""
        return [self.state, self.content()]

    def matches(self, recorded: list) -> bool:
        """Return whether the content is that of a record; it is read only if the state differs."""
        state, content = recorded
        return (self.state != [] and self.state == state) or self.content() == content


def file_stamp(path: str) -> Stamp:
    """Return the stamp of a file, local or in a bucket."""
    return Stamp(file_state(path), lambda: content_hash(path))


def file_state(path: str) -> State:
    """Return size, time of modification and time of change of a file.

    The last cannot be set: it tells a file from another of equal size that was unpacked or copied
    over it together with its time.

    Args:
      path: path of the file.

    Returns:
      Three integers; [] for a file that is missing or in a bucket.
    """
    if "://" in path:  # asking a bucket for each file would take too long
        return []
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return []
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def content_hash(data: bytes | str) -> str:
    """Hash encoded bytes, or the file at a path; "" if it cannot be read."""
    if isinstance(data, bytes):
        return hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        if "://" in data:
            from etils import epath

            return content_hash(epath.Path(data).read_bytes())
        if not stat.S_ISREG(os.stat(data).st_mode):  # opening a pipe would wait for a writer
            return ""
        with open(data, "rb") as file:
            return hashlib.file_digest(
                file, functools.partial(hashlib.blake2b, digest_size=16)
            ).hexdigest()
    except Exception:  # each kind of bucket has its own errors
        return ""


def check_scheme(path: str) -> None:
    """Raise UserError for a path that is a URL, unless it is one of a bucket."""
    scheme, separator, _ = path.partition("://")
    if separator and scheme.lower() not in BUCKETS:
        raise UserError(
            f"{path!r} is a URL of {scheme}, which is not read: give the path of a file"
        )


def check_writable(path: str | os.PathLike, option: str, *, folder: bool = False) -> None:
    """Check that an output can be written, before the work of which it is the result.

    Nothing is left behind: a file without a name is made in the folder of the output, or in the
    first one above it that exists.

    Args:
      path: path of the output, local or in a bucket.
      option: what the user calls it, such as "--output".
      folder: whether the output is a folder of files, rather than a file.

    Raises:
      UserError: it cannot be written.
    """
    try:
        if "://" in str(path):
            from etils import epath

            probe = epath.Path(path) / uuid.uuid4().hex if folder else epath.Path(f"{path}.probe")
            probe.write_bytes(b"")
            probe.unlink()
            return
        place = Path(path)
        if not folder and place.exists():
            open(place, "ab").close()
        place = place if folder else place.parent
        while not os.path.lexists(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except ImportError:  # what reads the bucket is not installed
        raise
    except Exception as error:  # each kind of bucket has its own errors
        what = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else f"{error}"
        raise UserError(f"{option}={path} cannot be written ({what}): give another path") from error


def printable(name: str) -> str:
    r"""Return a name with replacement characters for what cannot be written or would move a cursor.

    >>> printable("caf\udce9.png"), printable("a\nb.png")
    ('caf\ufffd.png', 'a\ufffdb.png')
    """
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)


class FileNames:
    """The one path of each file, however it is spelled.

    Spellings of one file are those that lead to it: ``./a.png``, ``x/../a.png``, links, backslashes
    between folders, and letters with accents as one or as two characters.
    """

    def __init__(self) -> None:
        """Start with no file."""
        self._path_of: dict[str, str | None] = {}  # spelling -> path; None for a missing file
        self._first: dict[tuple[int, ...], str] = {}  # file -> its first spelling

    def find(self, spelling: str) -> str | None:
        """Look for a file.

        Args:
          spelling: path as written.

        Returns:
          The path by which this file was first found, or its only form in a bucket; None if there
          is no such file.
        """
        if spelling not in self._path_of:
            self._path_of[spelling] = self._find(spelling)
        return self._path_of[spelling]

    def other_spellings(self) -> dict[str, str]:
        """Return each spelling that is not the path of its file -> that path."""
        return {
            spelling: path
            for spelling, path in self._path_of.items()
            if path is not None and path != spelling
        }

    def _find(self, spelling: str) -> str | None:
        if "://" in spelling:
            scheme, _, rest = spelling.partition("://")
            return f"{scheme}://{posixpath.normpath(rest)}"
        for path in _forms(spelling):
            try:
                about = os.stat(path)
            except (OSError, ValueError):  # ValueError: no name that a file can have
                continue
            if stat.S_ISREG(about.st_mode):
                # Some network file systems use a number again; size and time differ then.
                file = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
                return self._first.setdefault(file, path)
        return None


def _forms(spelling: str) -> Iterator[str]:
    """Yield a path as written, then other forms in which a disk may hold it."""
    yield spelling
    slashes = spelling.strip().replace("\\", "/")
    yield slashes
    for form in ("NFC", "NFD"):
        yield unicodedata.normalize(form, slashes)
