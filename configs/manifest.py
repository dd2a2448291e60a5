"""Your own pictures and recordings, listed in a manifest (JSONL or CSV: image, audio, split, ...), light encoders.

    c2f train --config=configs/manifest.py:path/to/manifest.jsonl --workdir=runs/mine

Paths in the manifest are relative to it. It needs the splits train, validation and test; name others with
``--config.data.validation_split=...``. Longer recordings: ``--config.data.bucket_seconds='(8.0,)'``.
"""

from c2f_jax.config import default_config


def get_config(arg=""):
    """The configuration; ``arg`` is the path of the manifest, local or gs://."""
    if not arg:
        raise ValueError(
            "the manifest's path is expected after a colon: configs/manifest.py:path/to/manifest.jsonl"
        )
    config = default_config()
    config.data.name = arg
    config.data.bucket_seconds = (6.4,)
    config.data.max_seconds = 12.0
    return config
