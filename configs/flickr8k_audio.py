"""Flickr8k Audio with the paper's encoders: HuBERT and BLIP-2's image side.

    c2f convert facebook/hubert-base-ls960 --output=weights/hubert_base
    c2f convert facebook/hubert-large-ll60k --output=weights/hubert_large
    c2f convert Salesforce/blip2-itm-vit-g --output=weights/blip2
    c2f train --config=configs/flickr8k_audio.py:base --workdir=runs/flickr8k_audio_base

``base``, ``large``: HuBERT frozen, a learnt weighted sum of its layers. ``base_finetuned``, ``large_finetuned``: its
transformer trained too. BLIP-2's 32 query tokens of each picture are cached once (0.39 GB).

Not run yet. Estimates from XLA's FLOP counts (HuBERT base 95 GFLOP, large 243 GFLOP for 6.4 s; BLIP-2 538 GFLOP a
picture) at 40 % of a GPU's 989 TFLOP/s in bf16, HuBERT alone, a backward pass as two forward ones and one recomputed:
batch 256, 50,000 steps take 50 min frozen and 4 h fine-tuned (base), 2.2 h and 11 h (large, both counting the momentum
model's forward pass once more where HuBERT is trained). Weights, gradients, Adam's two moments and the momentum copy of
a fine-tuned HuBERT take 1.9 GB (base) and 6.3 GB (large) in float32; activations come on top.
"""

from c2f_jax.config import PUBLISHED_SIZES, published_config


def get_config(arg="base"):
    """The configuration; ``arg`` is "base", "large", "base_finetuned" or "large_finetuned"."""
    if arg not in PUBLISHED_SIZES:
        raise ValueError(f"argument {arg!r} after the colon: one of {', '.join(PUBLISHED_SIZES)} is expected")
    config = published_config(*PUBLISHED_SIZES[arg])
    config.data.name = "flickr8k_audio"
    config.data.image_features = "runs/features/flickr8k_audio-blip2"
    config.queue_size = 16_384
    return config
