"""The files of a gallery: which of a folder are taken, and which are not and why."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from c2f_jax.data.files import printable
from c2f_jax.decoding.images import SUFFIXES
from c2f_jax.errors import UserError

# What each kind of item is stored in. The content decides whether a file can be read.
MEDIA_SUFFIXES = {
    "image": tuple(SUFFIXES),
    "speech": (
        *(".wav", ".wave", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2"),
        *(".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".m4a", ".aac", ".amr", ".3gp", ".wma"),
        *(".webm", ".mka"),
    ),
}
MOST_NAMED = 20  # in one line


@dataclasses.dataclass(frozen=True)
class MediaFolder:
    """The files of a folder and of those below it.

    Attributes:
      paths: those to read, sorted.
      left_out: lines that count and name the others.
    """

    paths: list[str]
    left_out: list[str]


def list_media(folder: str | PathLike[str], kind: str) -> MediaFolder:
    """List the images or the recordings below a folder.

    Hidden files and folders are left out, and of several links to a file all but one.

    Args:
      folder: path of the folder, local or gs://.
      kind: "image" or "speech".

    Returns:
      The files.

    Raises:
      UserError: there is no such folder, or no such file in it.
    """
    root = _path(folder)
    if not root.is_dir():
        raise UserError(f"{printable(str(root))} is not a folder")
    others: dict[str, list[str]] = collections.defaultdict(list)
    files = list(_files(root, others, {_identity(root)}))

    # A file is taken by its own name rather than by that of a link.
    taken, seen = [], set()
    for path in sorted(files, key=lambda path: (_is_link(path), str(path))):
        if path.suffix.lower() not in MEDIA_SUFFIXES[kind]:
            others["types"].append(path.suffix.lower())
            continue
        identity = _identity(path)
        if identity in seen:
            others["more links to one file"].append(_below(path, root))
            continue
        if identity is not None:
            seen.add(identity)
        taken.append(str(path))

    lines = _lines(others)
    if not taken:
        what = {"image": "image", "speech": "recording"}[kind]
        found = "".join(f"\n  {line}" for line in lines)
        raise UserError(f"{printable(str(root))} contains no {what} that can be read{found}")
    return MediaFolder(sorted(taken), lines)


def shortlist(names: Iterable[str]) -> str:
    """Return names in one line, and how many more there are.

    >>> shortlist(map(str, range(22))).endswith("18, 19 and 2 more")
    True
    """
    names = [printable(name) for name in names]
    line = ", ".join(names[:MOST_NAMED])
    return line if len(names) <= MOST_NAMED else f"{line} and {len(names) - MOST_NAMED:,} more"


def count_suffixes(suffixes: Iterable[str]) -> str:
    """Return how many files have each suffix.

    >>> count_suffixes([".mov", "", ".mov"])
    '2 .mov, 1 without a suffix'
    """
    counts = collections.Counter(suffixes).most_common()
    return ", ".join(f"{n:,} {printable(suffix) or 'without a suffix'}" for suffix, n in counts)


def _lines(others: dict[str, list[str]]) -> list[str]:
    """Count and name what is left out, by reason."""
    lines = []
    for reason, names in others.items():
        if reason == "types":
            lines.append(f"left out: {len(names):,} files of other types: {count_suffixes(names)}")
        else:
            lines.append(f"left out: {len(names):,} {reason}: {shortlist(sorted(names))}")
    return lines


def _path(folder: str | PathLike[str]) -> Any:
    """Return a path that can be listed, local or in a bucket."""
    if "://" not in str(folder):
        return Path(folder)
    from etils import epath

    return epath.Path(folder)


def _files(folder: Any, others: dict[str, list[str]], seen: set) -> Iterator[Any]:
    """Yield all files below a folder, and add to ``others`` what is passed over.

    Args:
      folder: the folder.
      others: reason -> names.
      seen: identities of the folders above and before this one.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda path: (_is_link(path), path.name))
    except OSError as error:
        reason = f"folders that cannot be opened ({error.strerror or error})"
        others[reason].append(str(folder))
        return
    for path in entries:
        if path.name.startswith("."):
            others["hidden files and folders"].append(path.name)
        elif not _is_folder(path):
            yield path
        elif (identity := _identity(path)) is not None and identity in seen:
            others["links to folders that are listed anyway"].append(str(path))
        else:
            seen.add(identity)
            yield from _files(path, others, seen)


def _below(path: Any, root: Any) -> str:
    return str(path.relative_to(root))


def _is_folder(path: Any) -> bool:
    # That of pathlib raises where permissions are missing.
    return os.path.isdir(path) if isinstance(path, Path) else path.is_dir()


def _is_link(path: Any) -> bool:
    return isinstance(path, Path) and path.is_symlink()


def _identity(path: Any) -> tuple[int, int] | None:
    """Return what is equal for all links to a file or folder; None if there is no telling."""
    if not isinstance(path, Path):
        return None
    try:
        about = os.stat(path)
    except OSError:  # a link to nowhere; reading it says so
        return None
    return (about.st_dev, about.st_ino) if about.st_ino else None
