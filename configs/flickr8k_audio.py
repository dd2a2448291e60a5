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

Not run yet. Estimates for ``base``, ``large``, ``base_finetuned`` and ``large_finetuned``, from XLA's FLOP count of a
whole step on 6.4 s of speech, 406, 556, 650 and 1,325 GFLOP a pair, at 40 % of a GPU's 989 TFLOP/s in bf16: batch 256,
50,000 steps take 3.7, 5.0, 5.8 and 11.9 h. Reading must keep up with 1,000, 700, 600 and 300 recordings a second, of
which one core decodes 2,700 as WAV. Parameters, gradients, Adam's two moments, the momentum copy and frozen weights
take 1.5, 2.4, 2.9 and 7.3 GB in float32; activations are counted from the largest arrays: 20 to 30 GB in bf16, in
HuBERT's first convolution and in the multimodal encoder, whose blocks are recomputed in the backward pass.
The cache of BLIP-2's tokens takes 4.3 PFLOP (538 GFLOP a picture), half a minute at 40 % of 495 TFLOP/s (TF32).
``light``: 0.23 TFLOP a step of 96, 12,000 steps, 7.6 h on two cores if they reach 0.1 TFLOP/s, reading not counted;
parameters, Adam's moments, momentum copy and queue take 0.04 GB.
"""

from c2f_jax.config.published import data_set_config


def get_config(arg="base"):
    """The configuration; ``arg`` is "light", "base", "large", "base_finetuned" or "large_finetuned"."""
    config = data_set_config("flickr8k_audio", arg, light_steps=12_000)
    config.queue_size = 8192 if arg == "light" else 16_384
    return config
