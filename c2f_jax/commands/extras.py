"""Which extra of the package a missing module belongs to."""

# Top-level module -> the extra that installs it; setup.py lists the same packages.
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
    "tensorboard": "train",
    "tensorflow": "train",
    "tensorflow_datasets": "train",
    "tqdm": "train",
    "espeakng_loader": "speech",
    "huggingface_hub": "hub",
}


def missing_extra(command: str, error: ModuleNotFoundError) -> str | None:
    """Return the line that names the extra a command needs.

    Args:
      command: the command as typed, such as "c2f train".
      error: what the failed import raised.

    Returns:
      One line for the user, or None if the module belongs to no extra.
    """
    module = (error.name or "").partition(".")[0]
    extra = EXTRA_OF_MODULE.get(module)
    if extra is None:
        return None
    return f"{command} needs the extra `{extra}`: pip install 'c2f_jax[{extra}]'"
