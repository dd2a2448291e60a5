"""The data sets of the field, prepared by `c2f data prepare`, with light encoders.

    c2f data prepare flickr8k_audio --manual-dir=downloads
    c2f train --config=configs/published.py:flickr8k_audio --workdir=runs/flickr8k_audio

The argument is flickr8k_audio, spoken_coco or places_audio. With published encoders these are the benchmarks of the
field; with the light ones, which start from nothing, expect far lower numbers.
"""

from c2f_jax.config import default_config

# Data set: steps, the queue, the splits that choose the checkpoint and that are reported.
DATA_SETS = {
    "flickr8k_audio": (12_000, 8192, "validation", "test"),
    "spoken_coco": (60_000, 65_536, "validation", "test"),
    "places_audio": (60_000, 65_536, "dev_seen", "test_seen"),
}


def get_config(arg=""):
    """The configuration; ``arg`` is the name of the data set."""
    if arg not in DATA_SETS:
        raise ValueError(f"one of {', '.join(DATA_SETS)} is expected after a colon; got {arg!r}")
    config = default_config()
    config.data.name = arg
    config.steps, config.queue_size, config.data.validation_split, config.data.test_split = DATA_SETS[arg]
    config.eval_every = config.checkpoint_every = config.steps // 20
    config.data.image_size = 128
    config.data.bucket_seconds = (8.0,)
    config.data.max_padding = 0.1
    config.data.max_seconds = 25.0
    config.eval.k = 128
    return config
