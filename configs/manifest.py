"""Your own images and recordings, listed in a manifest (JSONL or CSV); light encoders.

    c2f train --config=manifest:path/to/manifest.jsonl --workdir=runs/mine

A row of the manifest has the keys image, audio, split and more; paths are relative to the manifest.
The splits are train, validation and test; use others with ``--config.data.validation_split=...``.
For longer recordings, set ``--config.data.bucket_seconds=8.0``.
"""

from ml_collections import ConfigDict

from c2f_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration.

    Args:
      arg: path of the manifest, local or gs://.
    """
    if not arg:
        raise ValueError("give the manifest after a colon: manifest:path/to/manifest.jsonl")
    config = default_config()
    config.data.name = arg
    config.data.bucket_seconds = (6.4,)
    config.data.max_seconds = 12.0
    return config
