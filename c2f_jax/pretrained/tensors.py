"""Tensors of published files, by name.

Reads safetensors, and PyTorch's zip format without running code from it.
"""

import collections
import hashlib
import json
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

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
WHOLE_MODELS = ("model.safetensors", "pytorch_model.bin")


def weight_files(source: str | Path) -> list[Path]:
    """Return the weight files of a published file or folder.

    Args:
      source: a file, or a folder with one, or with shards and their index.

    Raises:
      UserError: nothing there, several to choose from, or a damaged index.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(
            f"{source}: no such file or folder; give published weights, "
            "or a hub id such as owner/name"
        )

    for name in WHOLE_MODELS:
        if (source / name).exists():
            return [source / name]
        index = source / f"{name}.index.json"
        if index.exists():
            return _shards(index)

    found = sorted(path for path in source.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{source}: must hold one file that ends in {', '.join(WEIGHT_SUFFIXES)}; "
            f"found {listed}"
        )
    return found


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read all tensors of one file.

    Returns:
      name -> array, and the settings, what a fairseq checkpoint says about its training.

    Raises:
      UserError: another kind of file, one that is cut off, or one without tensors.
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
            f"{path}: cannot be read as weights ({error}); download it again"
        ) from error

    settings, tensors = {}, {}
    if isinstance(stored, dict):
        if isinstance(stored.get("cfg"), dict):
            settings = stored["cfg"]
        # Checkpoints of training wrap the tensors once or twice.
        for key in ("model", "state_dict"):
            if isinstance(stored.get(key), dict):
                stored = stored[key]
        tensors = {name: value for name, value in stored.items() if isinstance(value, np.ndarray)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name: must be a state dict as published")
    return tensors, settings


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(index: Path) -> list[Path]:
    """Return the files that an index of shards names."""
    folder = index.parent
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{index}: not an index of shards ({error!r}); download it again"
        ) from error

    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}, which {index.name} names: download them too"
        )
    return [folder / shard for shard in shards]


def _load_torch(path: Path) -> Any:
    """Return what a file in PyTorch's zip format holds, tensors as arrays."""
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not PyTorch's zip format; a file from before PyTorch 1.6 must be loaded "
            "and saved once by PyTorch"
        )
    with zipfile.ZipFile(path) as archive:
        roots = [n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl")]
        if not roots:
            raise UserError(f"{path}: a zip file without data.pkl, not PyTorch's")
        with archive.open(roots[0]) as file:
            return _TensorUnpickler(file, archive, roots[0].removesuffix("data.pkl")).load()


class _Ignored:
    """Stand-in for any object that is not a tensor; calling it has no effect."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "_Ignored":
        return self

    __setstate__ = __setitem__ = append = extend = __call__


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers.

    Any other class or function becomes ``_Ignored``: nothing is imported.
    """

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file, encoding="latin1")
        self._archive, self._root = archive, root
        # Tied weights are several tensors of one storage.
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what a global of the pickle stands for."""
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        return known.get((module, name), _Ignored)

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Return the flat array of a storage."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, type) or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        if key not in self._storages:
            content = self._archive.read(f"{self._root}data/{key}")
            self._storages[key] = np.frombuffer(content, dtype)
        data = self._storages[key]
        if len(data) != count:
            raise pickle.UnpicklingError(f"storage {key} has {len(data)} of {count} elements")
        return data


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    """Return a view of a storage, as PyTorch's function of this name."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    negative = min((offset, *size, *stride)) < 0
    # Strides come from the file: a view beyond the storage would read foreign memory.
    if negative or (0 not in size and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    if 0 in size:
        return np.empty(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _rebuild_parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data
