"""Places Audio: 400,000 photographs with one spoken caption each.

    c2f data prepare places_audio --manual-dir=downloads
    c2f convert facebook/hubert-base-ls960 --output=weights/hubert_base
    c2f convert facebook/hubert-large-ll60k --output=weights/hubert_large
    c2f convert Salesforce/blip2-itm-vit-g --output=weights/blip2
    c2f train --config=places_audio:base --workdir=runs/places_audio_base

The argument names the encoders, as in ``flickr8k_audio``: ``base``, ``large``,
``base_finetuned``, ``large_finetuned`` (HuBERT and BLIP-2, whose tokens take 20 GB of cache) or
``light`` (no weights).

Expected result: not run yet. A step costs what it costs in ``flickr8k_audio``. The cache of
BLIP-2's tokens takes 217 PFLOP, 18 minutes at 40 % of 495 TFLOP/s (TF32). ``light`` takes five
times as many steps.
"""

from ml_collections import ConfigDict

from c2f_jax.config.published import data_set_config


def get_config(arg: str = "base") -> ConfigDict:
    """Return the configuration.

    Args:
      arg: "light", "base", "large", "base_finetuned" or "large_finetuned".
    """
    config = data_set_config("places_audio", arg, light_steps=60_000)
    config.queue_size = 65_536
    config.data.validation_split, config.data.test_split = "dev_seen", "test_seen"
    return config
