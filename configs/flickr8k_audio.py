"""Flickr8k Audio: 8,000 photographs with five spoken captions each.

    c2f data prepare flickr8k_audio --manual-dir=downloads
    c2f convert facebook/hubert-base-ls960 --output=weights/hubert_base
    c2f convert facebook/hubert-large-ll60k --output=weights/hubert_large
    c2f convert Salesforce/blip2-itm-vit-g --output=weights/blip2
    c2f train --config=flickr8k_audio:base --workdir=runs/flickr8k_audio_base

The argument names the encoders:

* ``base``, ``large``: the paper's. HuBERT is frozen, with a learned weighted sum of its layers;
  BLIP-2 gives 32 query tokens for each image, which are cached once (0.39 GB).
* ``base_finetuned``, ``large_finetuned``: the same, but HuBERT's transformer is trained too.
* ``light``: small encoders trained from scratch, which need no weights. Expect far lower numbers.

Expected result: not run yet. Cost, estimated from XLA's FLOP count of a whole step on 6.4 s of
speech, at 40 % of a GPU's 989 TFLOP/s in bf16, for 50,000 steps of batch 256:

    argument           GFLOP per pair   hours   recordings per second   GB of parameters and state
    base                    406          3.7           1,000                     1.5
    large                   556          5.0             700                     2.4
    base_finetuned          650          5.8             600                     2.9
    large_finetuned       1,325         11.9             300                     7.3

Reading must keep up with that many recordings; one core decodes 2,700 WAV files per second. The
last column counts parameters, gradients, Adam's two moments, the momentum copy and frozen weights
in float32. Activations, counted from the largest arrays, take another 20 to 30 GB in bf16, in
HuBERT's first convolution and in the multimodal encoder, whose blocks are recomputed in the
backward pass. The cache of BLIP-2's tokens takes 4.3 PFLOP (538 GFLOP per image), half a minute at
40 % of 495 TFLOP/s (TF32).

``light`` takes 0.23 TFLOP for a step of 96 pairs; 12,000 steps take 7.6 h on two cores that reach
0.1 TFLOP/s, without reading. Parameters, Adam's moments, momentum copy and queue take 0.04 GB.
"""

from ml_collections import ConfigDict

from c2f_jax.config.published import data_set_config


def get_config(arg: str = "base") -> ConfigDict:
    """Return the configuration.

    Args:
      arg: "light", "base", "large", "base_finetuned" or "large_finetuned".
    """
    config = data_set_config("flickr8k_audio", arg, light_steps=12_000)
    config.queue_size = 8192 if arg == "light" else 16_384
    return config
