"""The feature cache: tokens of a frozen network, computed once, read back by memory mapping.

A cache is a folder with ``card.json``, which says where the tokens come from, and shards:
``NAME.npy``, the tokens of some items, one after the other, float16, and ``NAME.json``, their keys,
numbers of tokens and what tells their files from others, written last. Tokens of another tool are
one .npz file with ``names`` (N,), ``tokens`` (N, P, C) and optionally ``lengths`` (N,); its card,
if there is one, is NAME.json beside it.
"""

import dataclasses
import functools
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from c2f_jax.data.files import Stamp
from c2f_jax.errors import UserError

# Names that older cards, of caches and of converted weights, spell differently.
OLD_SPELLING = {"normalise": "normalize", "licence": "license"}

PathLike = str | os.PathLike
Card = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRows:
    """Where the tokens of an item are.

    Attributes:
      read: function that returns the array that holds them.
      start: their first row in that array.
      count: their number.
      stamp: record of the file that they were made from, see `Stamp`; None if it is unknown.
    """

    read: Callable[[], np.ndarray]
    start: int
    count: int
    stamp: list | None = None


class FeatureCache:
    """Tokens by key.

    Attributes:
      path: path of the folder or file.
      card: where the tokens come from; {} for a file without a card.
      shape: what follows the number of tokens: (C,), or (layers, C).
      most_tokens: largest number of tokens of an item.
    """

    def __init__(
        self, path: PathLike, card: Card, items: Mapping[str, TokenRows], shape: Sequence[int]
    ) -> None:
        """Create a cache; `open_features` reads one from disk.

        Args:
          path: path of the folder or file.
          card: where the tokens come from.
          items: key of an item -> its tokens.
          shape: what follows the number of tokens.
        """
        self.path, self.card, self.shape = str(path), card, tuple(shape)
        self._items = items
        self._checked: dict[str, list] = {}  # key -> state of the file that was found to be right
        self.most_tokens = max((rows.count for rows in items.values()), default=0)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def tokens(self, key: str) -> np.ndarray:
        """Return the tokens of an item.

        Args:
          key: key of the item.

        Returns:
          float16 (T, C) or (T, layers, C).

        Raises:
          UserError: the cache has no such item.
        """
        rows = self._rows(key)
        return rows.read()[rows.start : rows.start + rows.count]

    def check(self, key: str, stamp: Stamp) -> None:
        """Check that the tokens of an item were made from what its file holds.

        A token file of another tool does not say what it was made from.

        Args:
          key: key of the item.
          stamp: stamp of its file.

        Raises:
          UserError: the cache has no such item, or its file has changed since.
        """
        recorded = self._rows(key).stamp
        if recorded is None or (stamp.state and self._checked.get(key) == stamp.state):
            return
        if not stamp.matches(recorded):
            raise UserError(
                f"{self.path} holds features of another {key}, whose file has changed since: run "
                "`c2f features` again"
            )
        self._checked[key] = stamp.state

    def _rows(self, key: str) -> TokenRows:
        if key not in self._items:
            what_to_do = "run `c2f features` again"
            if self.path.endswith(".npz"):
                what_to_do = "add its tokens to the file"
            raise UserError(f"no features of {key} in {self.path}: {what_to_do}")
        return self._items[key]

    def tokens_of_samples(self, samples: int) -> int:
        """Return the number of tokens of a recording.

        Args:
          samples: its length in samples at 16 kHz.

        Returns:
          The number of tokens.

        Raises:
          UserError: the card does not say how long a token is.
        """
        step = self.card.get("samples_per_token")
        if not step:
            raise UserError(
                f"{self.path}: its card needs samples_per_token, the samples (16 kHz) that a token "
                "stands for"
            )
        return -(-samples // int(step))


def open_features(path: PathLike) -> FeatureCache:
    """Open a feature cache or a token file.

    Args:
      path: path of the folder or file.

    Returns:
      The cache.

    Raises:
      UserError: nothing is there, or it has another format.
    """
    where = epath.Path(path).expanduser()
    if not where.exists():
        raise UserError(
            f"{where}: there are no features; make them with `c2f features`, or name a .npz file "
            "of tokens"
        )

    # A cache is kept open; the times of change say whether it is still the same.
    changes = [_change(where)]
    if where.is_dir():
        changes += [_change(file) for file in where.glob("*.json")]
    return _open(where, tuple(sorted(changes)))


def _change(path: epath.Path) -> int:
    """Return the time of the last change of a file or folder, in nanoseconds."""
    return int(1e9 * path.stat().mtime) if _is_remote(path) else os.stat(path).st_mtime_ns


def _is_remote(path: PathLike) -> bool:
    return "://" in os.fspath(path)


@functools.lru_cache(maxsize=8)
def _open(path: epath.Path, changed: tuple[int, ...]) -> FeatureCache:
    del changed  # part of the cache key: a folder that has grown is read again
    return _open_file(path) if path.is_file() else _open_folder(path)


def _open_file(path: epath.Path) -> FeatureCache:
    """Read a .npz file of tokens."""
    try:
        file = io.BytesIO(path.read_bytes()) if _is_remote(path) else path
        with np.load(file, allow_pickle=False) as stored:
            names, tokens = stored["names"], stored["tokens"]
            # Without lengths, all items have as many tokens as the array has room for.
            if "lengths" in stored:
                lengths = stored["lengths"]
            else:
                lengths = np.full(len(names), tokens.shape[1])
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a token file ({error}); it must be .npz with `names` (N,) and `tokens` "
            "(N, P, C)"
        ) from error

    if tokens.ndim not in (3, 4) or len(names) != len(tokens) or len(lengths) != len(tokens):
        raise UserError(
            f"{path}: {len(names)} names, {len(lengths)} lengths and tokens of shape "
            f"{tokens.shape}; there must be as many of each, and tokens must be (N, P, C)"
        )
    if not len(names) or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise UserError(
            f"{path}: lengths must be between 1 and {tokens.shape[1]}, and there must be an item"
        )

    card_path = path.with_suffix(".json")
    card = _read_json(card_path) if card_path.exists() else {}
    items = {}
    for row, (name, count) in enumerate(zip(names, lengths, strict=True)):
        items[str(name)] = TokenRows(functools.partial(_row, tokens, row), 0, int(count))
    return FeatureCache(path, card, items, tokens.shape[2:])


def _row(tokens: np.ndarray, row: int) -> np.ndarray:
    return tokens[row]


def _open_folder(path: epath.Path) -> FeatureCache:
    """Read the index of a folder; the tokens are mapped when they are first read."""
    if not (path / "card.json").exists():
        raise UserError(
            f"{path} is not a feature cache (no card.json): make one with `c2f features`"
        )
    card = _read_json(path / "card.json")

    # Shards are read in the order of their names; a later one may hold an item anew.
    items: dict[str, TokenRows] = {}
    shape = None
    for index in sorted(path.glob("*-*.json")):
        shard = _read_json(index)
        read = functools.cache(functools.partial(_map, index.with_suffix(".npy")))
        # Tokens of the items follow each other in one array.
        start = 0
        stamps = shard.get("stamps") or [None] * len(shard["keys"])
        for key, count, stamp in zip(shard["keys"], shard["lengths"], stamps, strict=True):
            items[key] = TokenRows(read, start, count, stamp)
            start += count
        shape = shard["shape"]

    if shape is None:
        raise UserError(
            f"{path} holds no finished shard: run `c2f features` again, it resumes where it stopped"
        )
    return FeatureCache(path, card, items, shape)


def _map(path: epath.Path) -> np.ndarray:
    try:
        if not _is_remote(path):
            return np.load(path, mmap_mode="r")
        # What is in a bucket is mapped from a copy, which the system removes after use.
        with tempfile.NamedTemporaryFile(prefix="c2f-features-", suffix=".npy") as copy:
            copy.write(path.read_bytes())
            copy.flush()
            return np.load(copy.name, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({error}); remove it and its .json, and run `c2f features` again"
        ) from error


def with_current_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a card, names in the old spelling replaced; an ``object_pairs_hook``."""
    return {OLD_SPELLING.get(name, name): value for name, value in pairs}


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(), object_pairs_hook=with_current_names)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def start_cache(folder: PathLike, card: Card) -> None:
    """Create the folder with its card, or check that the existing cache has the same card.

    Args:
      folder: path of the cache.
      card: where its tokens come from.

    Raises:
      UserError: the existing cache is of other weights, another layer or preprocessing, or the
        folder cannot be written.
    """
    if has_card(folder, card):
        return
    place = epath.Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write(place / "card.json", json.dumps(card, indent=2).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): name a folder") from error


def has_card(folder: PathLike, card: Card) -> bool:
    """Check whether a cache is there.

    Args:
      folder: path of the cache.
      card: where its tokens must come from.

    Returns:
      Whether there is a cache.

    Raises:
      UserError: a cache of other weights, another layer or preprocessing is there.
    """
    path = epath.Path(folder) / "card.json"
    if not path.exists():
        return False
    found = _read_json(path)

    differences = []
    for name in sorted(found.keys() | card.keys()):
        if found.get(name) != card.get(name):
            differences.append(f"  {name}: {found.get(name)!r} there, {card.get(name)!r} wanted")
    if differences:
        raise UserError(
            "\n".join(
                [
                    f"{folder} holds features of another kind:",
                    *differences,
                    "remove it or name another folder",
                ]
            )
        )
    return True


def shard_exists(folder: PathLike, name: str, stamps: Mapping[str, Stamp]) -> bool:
    """Check whether a shard is finished, and of these items.

    Args:
      folder: path of the cache.
      name: name of the shard.
      stamps: key -> stamp of each of its items.

    Returns:
      Whether it holds them all, or knows that they could not be read; False also if files have
      changed, or other items belong to it.

    Raises:
      UserError: nothing in it is of these items.
    """
    path = epath.Path(folder) / f"{name}.json"
    if not path.exists():
        return False
    shard = _read_json(path)
    if "stamps" not in shard:  # by another version: it does not say what it was made from
        recorded = dict.fromkeys(shard["keys"])
    else:
        recorded = dict(zip(shard["keys"], shard["stamps"], strict=True)) | shard["left_out"]

    same = []
    for key, record in recorded.items():
        if key in stamps and (record is None or stamps[key].matches(record)):
            same.append(key)
    if recorded and not same:
        what = min(recorded)
        raise UserError(
            f"{folder} holds features of other data, such as {what} in {name}: remove it or name "
            "another folder"
        )
    if "stamps" not in shard:
        return len(same) == len(recorded)
    return len(same) == len(recorded) == len(stamps)


def remove_shards(folder: PathLike, prefix: str, count: int) -> None:
    """Remove the shards from a number on: the items of what was a larger split.

    Args:
      folder: path of the cache.
      prefix: what their names begin with, before the number.
      count: number of shards that there should be.
    """
    for index in epath.Path(folder).glob(f"{prefix}[0-9]*.json"):
        number = index.stem.removeprefix(prefix)
        if number.isdigit() and int(number) >= count:
            index.unlink()
            index.with_suffix(".npy").unlink(missing_ok=True)


def write_shard(
    folder: PathLike,
    name: str,
    items: Sequence[tuple[str, np.ndarray]],
    shape: Sequence[int],
    records: Mapping[str, list] | None = None,
) -> None:
    """Write a shard.

    Args:
      folder: path of the cache.
      name: name of the shard.
      items: (key, tokens (T, *shape)) of each item.
      shape: what follows the number of tokens.
      records: key -> record of the file of each item, and of those that could not be read; see
        `Stamp.record`. None to keep none, so that the tokens are never compared with files.
    """
    place = epath.Path(folder)
    tokens = [np.asarray(t, np.float16) for _, t in items]
    data = np.concatenate(tokens) if tokens else np.zeros((0, *shape), np.float16)

    # The index comes last: a shard without one is not finished.
    if _is_remote(place):
        array = io.BytesIO()
        np.save(array, data)
        (place / f"{name}.npy").write_bytes(array.getvalue())
    else:
        partial = place / f"{name}.npy.partial"
        with open(partial, "wb") as file:
            np.save(file, data)
        os.replace(partial, place / f"{name}.npy")

    keys = [key for key, _ in items]
    index: dict[str, Any] = {
        "keys": keys,
        "lengths": [len(t) for t in tokens],
        "shape": list(shape),
    }
    if records is not None:
        index["stamps"] = [records[key] for key in keys]
        index["left_out"] = {key: records[key] for key in records.keys() - set(keys)}
    _write(place / f"{name}.json", json.dumps(index).encode())


def _write(path: epath.Path, data: bytes) -> None:
    """Write a file completely or not at all, even if several processes write it at once."""
    if _is_remote(path):  # an object of a bucket is replaced as a whole
        path.write_bytes(data)
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
