"""SpokenCOCO with the paper's encoders: HuBERT and BLIP-2's image side.

    c2f convert facebook/hubert-base-ls960 --output=weights/hubert_base
    c2f convert facebook/hubert-large-ll60k --output=weights/hubert_large
    c2f convert Salesforce/blip2-itm-vit-g --output=weights/blip2
    c2f train --config=configs/spoken_coco.py:large --workdir=runs/spoken_coco_large

``base``, ``large``: HuBERT frozen, a learnt weighted sum of its layers. ``base_finetuned``, ``large_finetuned``: its
transformer trained too. BLIP-2's 32 query tokens of each picture are cached once (6.1 GB).

Not run yet. A step costs what it costs in configs/flickr8k_audio.py, where the estimates of time and memory stand; the
cache of BLIP-2's tokens takes 66 PFLOP, 3 minutes at 40 % of 989 TFLOP/s.
"""

from c2f_jax.config import PUBLISHED_SIZES, published_config


def get_config(arg="base"):
    """The configuration; ``arg`` is "base", "large", "base_finetuned" or "large_finetuned"."""
    if arg not in PUBLISHED_SIZES:
        raise ValueError(f"argument {arg!r} after the colon: one of {', '.join(PUBLISHED_SIZES)} is expected")
    config = published_config(*PUBLISHED_SIZES[arg])
    config.data.name = "spoken_coco"
    config.data.image_features = "runs/features/spoken_coco-blip2"
    config.queue_size = 65_536
    config.eval.k = 256
    return config
