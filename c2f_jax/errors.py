"""Mistakes that a user can fix, and the extras of the package."""

# Top-level module -> the extra that installs it; setup.py lists the packages.
EXTRA_OF_MODULE = {
    "absl": "train",
    "array_record": "train",
    "clu": "train",
    "etils": "train",
    "grain": "train",
    "importlib_resources": "train",
    "librosa": "train",
    "matplotlib": "train",
    "ml_collections": "train",
    "orbax": "train",
    "PIL": "train",
    "safetensors": "train",
    "scipy": "train",
    "soundfile": "train",
    "soxr": "train",
    "tensorflow_datasets": "train",
    "tqdm": "train",
    "tensorboard": "tensorboard",
    "tensorflow": "tensorboard",
    "espeakng_loader": "speech",
    "av": "av",
    "huggingface_hub": "hub",
    "jax2onnx": "onnx",
    "libtpu": "tpu",
    "gcsfs": "gcs",
    "lancedb": "index",
    "pyarrow": "index",
    "pillow_heif": "heif",
    "anywidget": "notebook",
    "mteb": "mteb",
    "fastapi": "serve",
    "python_multipart": "serve",
    "uvicorn": "serve",
}


class UserError(ValueError):
    """A mistake in a path, an option or a data file, described so that the reader can fix it.

    The message names the thing, says what is wrong and what to do. The command line prints it
    without a traceback.
    """


class BadFileError(UserError):
    """A file of a data set that cannot be used.

    Attributes:
      kind: why, in a word or two, for counting.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def missing_extra(what: str, error: ImportError) -> str | None:
    """Return the line that names the extra which something needs.

    Args:
      what: a command or a public name, such as "c2f train".
      error: what the failed import raised.

    Returns:
      One line for the user, or None if the module is in no extra.

    >>> missing_extra("c2f train", ModuleNotFoundError(name="tensorflow_datasets.core"))
    "c2f train needs the extra `train`: pip install 'c2f_jax[train]'"
    """
    # fsspec names in its text alone what it needs for gs://.
    name = error.name or ("gcsfs" if "install gcsfs" in str(error) else "")
    extra = EXTRA_OF_MODULE.get(name.partition(".")[0])
    if extra is None:
        return None
    return f"{what} needs the extra `{extra}`: pip install 'c2f_jax[{extra}]'"
