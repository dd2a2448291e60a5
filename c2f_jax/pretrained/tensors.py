"""Tensors of published files, by name: safetensors, and PyTorch's zip format without running code from it."""

import collections
import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from c2f_jax.errors import UserError

STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "DoubleStorage": np.float64,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def weight_files(source):
    """The weight files of a path as published: a file, or a folder with one, or with shards and their index.

    Raises:
      UserError: nothing there, several to choose from, or a damaged index.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(
            f"{source}: no such file or folder; give published weights, or a hub id such as owner/name"
        )
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (source / name).exists():
            return [source / name]
        index = source / f"{name}.index.json"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{index}: not an index of shards ({error!r}); download it again"
                ) from error
            gone = [shard for shard in shards if not (source / shard).exists()]
            if gone:
                raise UserError(
                    f"{source} lacks {', '.join(gone)}, which {index.name} names: download them too"
                )
            return [source / shard for shard in shards]
    found = sorted(p for p in source.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if len(found) != 1:
        listed = ", ".join(p.name for p in found) or "none"
        raise UserError(
            f"{source}: expected one file that ends in {', '.join(WEIGHT_SUFFIXES)}; found {listed}"
        )
    return found


def read_tensors(path):
    """All tensors of one file: ({name: array}, settings); settings is what a fairseq checkpoint says of its training.

    Raises:
      UserError: not such a file, cut off, or no tensors in it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path), {}
        stored = _load_torch(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except Exception as error:  # each format has its own errors for damaged files
        raise UserError(
            f"{path}: not weights that can be read ({error}); download it again"
        ) from error
    settings = {}
    if isinstance(stored, dict) and isinstance(stored.get("cfg"), dict):
        settings = stored["cfg"]
    for key in ("model", "state_dict"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    tensors = (
        {k: v for k, v in stored.items() if isinstance(v, np.ndarray)}
        if isinstance(stored, dict)
        else {}
    )
    if not tensors:
        raise UserError(f"{path} holds no tensors by name: expected a state dict as published")
    return tensors, settings


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_torch(path):
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not PyTorch's zip format; a file from before PyTorch 1.6 must be loaded and saved once by PyTorch"
        )
    with zipfile.ZipFile(path) as archive:
        root = next(
            (n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl")), None
        )
        if root is None:
            raise UserError(f"{path}: a zip file without data.pkl, not PyTorch's")
        with archive.open(root) as file:
            return _TensorUnpickler(file, archive, root.removesuffix("data.pkl")).load()


class _Ignored:
    """Stands for any object that is not a tensor; made, filled and called without effect."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    __setstate__ = __setitem__ = append = extend = __call__


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; any other class or function becomes ``_Ignored``, nothing is imported."""

    def __init__(self, file, archive, root):
        super().__init__(file, encoding="latin1")
        self._archive, self._root = archive, root

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }.get((module, name), _Ignored)

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage" or isinstance(dtype, type) is False or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        data = np.frombuffer(self._archive.read(f"{self._root}data/{key}"), dtype)
        if len(data) != count:
            raise pickle.UnpicklingError(f"storage {key} has {len(data)} of {count} elements")
        return data


def _rebuild_tensor(storage, offset, size, stride, *_):
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min((offset, *size, *stride), default=0) < 0 or (0 not in size and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    if 0 in size:
        return np.empty(size, storage.dtype)
    steps = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _rebuild_parameter(data, *_):
    return data
