"""Flickr8k Audio: 8,000 photographs with five spoken captions each.

    c2f data prepare flickr8k_audio --manual-dir=downloads
    c2f convert facebook/hubert-base-ls960 --output=weights/hubert_base
    c2f convert facebook/hubert-large-ll60k --output=weights/hubert_large
    c2f convert Salesforce/blip2-itm-vit-g --output=weights/blip2
    c2f train --config=configs/flickr8k_audio.py:base --workdir=runs/flickr8k_audio_base

The argument names the encoders. ``base``, ``large``: the paper's, HuBERT frozen with a learnt weighted sum of its
layers, and BLIP-2's 32 query tokens of each picture, cached once (0.39 GB). ``base_finetuned``, ``large_finetuned``:
HuBERT's transformer trained too. ``light``: small encoders that start from nothing and need no weights; expect far
lower numbers.

Not run yet. Estimates from XLA's FLOP counts (HuBERT base 95 GFLOP, large 243 GFLOP for 6.4 s; BLIP-2 538 GFLOP a
picture) at 40 % of a GPU's 989 TFLOP/s in bf16, HuBERT alone, a backward pass as two forward ones and one recomputed:
batch 256, 50,000 steps take 50 min frozen and 4 h fine-tuned (base), 2.2 h and 11 h (large, both counting the momentum
model's forward pass once more where HuBERT is trained). Weights, gradients, Adam's two moments and the momentum copy of
a fine-tuned HuBERT take 1.9 GB (base) and 6.3 GB (large) in float32; activations come on top.
``light``: 0.23 TFLOP a step of 96, 12,000 steps, 7.6 h on two cores if they reach 0.1 TFLOP/s, reading not counted;
parameters, Adam's moments, momentum copy and queue take 0.04 GB.
"""

from c2f_jax.config import data_set_config


def get_config(arg="base"):
    """The configuration; ``arg`` is "light", "base", "large", "base_finetuned" or "large_finetuned"."""
    config = data_set_config("flickr8k_audio", arg, light_steps=12_000)
    config.queue_size = 8192 if arg == "light" else 16_384
    return config
