"""The feature cache: tokens of a frozen network, computed once, read back by memory mapping.

A cache is a folder with ``card.json`` (where the tokens come from), and shards: ``NAME.npy``, the tokens of some items,
one after the other, float16, and ``NAME.json``, their keys and numbers of tokens, written last. Tokens of another tool
are one .npz file with ``names`` (N,), ``tokens`` (N, P, C) and optionally ``lengths`` (N,), and where there is a card,
it stands beside it as NAME.json.
"""

import functools
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from c2f_jax.errors import UserError


class FeatureCache:
    """Tokens by key.

    Attributes:
      path: of the folder or file.
      card: dict, where the tokens come from; {} for a file without a card.
      shape: what follows the number of tokens: (C,), or (layers, C).
      most_tokens: of any item.
    """

    def __init__(self, path, card, items, shape):
        self.path, self.card, self.shape = str(path), card, tuple(shape)
        self._items = items  # key -> (function that gives the array, first row, rows)
        self.most_tokens = max((rows for _, _, rows in items.values()), default=0)

    def __len__(self):
        return len(self._items)

    def __contains__(self, key):
        return key in self._items

    def tokens(self, key):
        """(T, C) or (T, layers, C) float16 tokens of an item.

        Raises:
          UserError: the cache has no such item.
        """
        if key not in self._items:
            raise UserError(f"no features of {key} in {self.path}")
        array, start, rows = self._items[key]
        return array()[start : start + rows]

    def tokens_of_samples(self, samples):
        """Number of tokens of so many samples.

        Raises:
          UserError: the card does not say how long a token is.
        """
        step = self.card.get("samples_per_token")
        if not step:
            raise UserError(
                f"{self.path}: its card needs samples_per_token, the samples (16 kHz) that a token stands for"
            )
        return -(-samples // int(step))


@functools.lru_cache(maxsize=8)
def _open(path, changed):
    del changed  # a part of the cache key: a folder that has grown is read again
    return _open_file(path) if path.is_file() else _open_folder(path)


def open_features(path):
    """Open a feature cache or a token file.

    Raises:
      UserError: nothing there, or not of the format.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"{path}: there are no features; make them with `c2f features`, or name a .npz file of tokens"
        )
    changed = (
        max((p.stat().st_mtime_ns for p in path.glob("*.json")), default=0) if path.is_dir() else 0
    )
    return _open(path, (changed, path.stat().st_mtime_ns))


def _open_file(path):
    try:
        with np.load(path, allow_pickle=False) as stored:
            names, tokens = stored["names"], stored["tokens"]
            lengths = (
                stored["lengths"] if "lengths" in stored else np.full(len(names), tokens.shape[1])
            )
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a token file ({error}); expected .npz with `names` (N,), `tokens` (N, P, C)"
        ) from error
    if tokens.ndim not in (3, 4) or len(names) != len(tokens) or len(lengths) != len(tokens):
        raise UserError(
            f"{path}: {len(names)} names, {len(lengths)} lengths and tokens of shape {tokens.shape}; expected as many "
            "of each, and tokens (N, P, C)"
        )
    if not len(names) or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise UserError(
            f"{path}: lengths from 1 to {tokens.shape[1]} are expected, and at least one item"
        )
    card = path.with_suffix(".json")
    card = _read_json(card) if card.exists() else {}
    items = {
        str(name): (functools.partial(_row, tokens, row), 0, int(n))
        for row, (name, n) in enumerate(zip(names, lengths, strict=True))
    }
    return FeatureCache(path, card, items, tokens.shape[2:])


def _row(tokens, row):
    return tokens[row]


def _open_folder(path):
    card = _read_json(path / "card.json") if (path / "card.json").exists() else None
    if card is None:
        raise UserError(
            f"{path} is not a feature cache (no card.json): make one with `c2f features`"
        )
    items, shape = {}, None
    for index in sorted(path.glob("*-*.json")):
        shard = _read_json(index)
        array = functools.cache(functools.partial(_map, index.with_suffix(".npy")))
        start = 0
        for key, rows in zip(shard["keys"], shard["lengths"], strict=True):
            items[key] = (array, start, rows)
            start += rows
        shape = shard["shape"]
    if shape is None:
        raise UserError(
            f"{path} holds no finished shard: run `c2f features` again, it goes on where it stopped"
        )
    return FeatureCache(path, card, items, shape)


def _map(path):
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({error}); remove it and its .json, and run `c2f features` again"
        ) from error


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def start_cache(folder, card):
    """Create the folder with its card, or check that a cache there has the same one.

    Raises:
      UserError: a cache of other weights, another layer or preprocessing is there.
    """
    if has_card(folder, card):
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "card.json", json.dumps(card, indent=2).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): a folder is expected") from error


def has_card(folder, card):
    """Whether a cache is there; errors as in ``start_cache``."""
    path = Path(folder) / "card.json"
    if not path.exists():
        return False
    found = _read_json(path)
    differing = [k for k in sorted(found.keys() | card.keys()) if found.get(k) != card.get(k)]
    if differing:
        rows = "\n".join(
            f"  {k}: {found.get(k)!r} there, {card.get(k)!r} wanted" for k in differing
        )
        raise UserError(
            f"{folder} holds features of another kind:\n{rows}\nremove it or name another folder"
        )
    return True


def shard_exists(folder, name, keys):
    """Whether a shard of these items is finished; those that could not be read are not in it.

    Raises:
      UserError: it holds others.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        return False
    others = sorted(set(_read_json(path)["keys"]) - set(keys))
    if others:
        raise UserError(
            f"{folder} holds features of other data, such as {others[0]} in {name}: remove it or name another folder"
        )
    return True


def write_shard(folder, name, items, shape):
    """Write one shard; ``items`` is a list of (key, tokens (T, *shape))."""
    folder = Path(folder)
    tokens = [np.asarray(t, np.float16) for _, t in items]
    data = np.concatenate(tokens) if tokens else np.zeros((0, *shape), np.float16)
    partial = folder / f"{name}.npy.partial"
    with open(partial, "wb") as file:
        np.save(file, data)
    os.replace(partial, folder / f"{name}.npy")
    index = {
        "keys": [k for k, _ in items],
        "lengths": [len(t) for t in tokens],
        "shape": list(shape),
    }
    _write(folder / f"{name}.json", json.dumps(index).encode())


def _write(path, data):
    """Whole or not at all, also when several processes write the same."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
