"""Flickr8k's photographs with synthetic speech: a frozen Whisper and frozen image tokens, C2F trained on top.

    c2f train --config=configs/flickr8k_tts.py:path/to/data --workdir=runs/flickr8k_tts --by-voice

``path/to/data`` holds three things: ``flickr8k_tts/manifest.jsonl``, the photographs' tokens in
``flickr8k_tts/features/effnet_lite0_tokens.npz``, and the published files of Whisper's encoder in
``weights/whisper-tiny.en-encoder``.
The first run writes Whisper's tokens of all recordings to ``runs/features`` (1.2 GB), and those of two copies of each
training recording at other speeds and pitches (0.7 GB each); later runs read them.
``--by-voice`` reports voices heard in training and others apart. The speech is synthetic: numbers cannot be compared
with those of Flickr8k Audio.
"""

from ml_collections import ConfigDict

from c2f_jax.config import default_config


def get_config(arg=""):
    """The configuration; ``arg`` is the folder of the data and the weights."""
    if not arg:
        raise ValueError("a folder is expected after a colon: configs/flickr8k_tts.py:path/to/data")
    config = default_config()
    config.data.name = f"{arg}/flickr8k_tts/manifest.jsonl"
    config.data.image_features = f"{arg}/flickr8k_tts/features/effnet_lite0_tokens.npz"
    config.data.speech_features = "runs/features/flickr8k_tts-whisper_tiny_en"
    config.data.speech_copies = 2
    config.data.augment.speed = 0.2
    config.data.bucket_seconds = (3.6, 6.4)
    config.data.max_seconds = 12.0
    config.batch_size = 128
    config.steps = 1050
    config.log_every = 20
    config.eval_every = config.checkpoint_every = 350
    config.queue_size = 1024

    config.model.branches = (
        3  # models of so few pairs err differently from seed to seed: their mean cosine errs less
    )
    # One caption a photograph is little: 5,253 pairs are learnt by heart without dropout of this size.
    head = {
        "width": 192,
        "heads": 4,
        "mlp_ratio": 3.0,
        "dropout_rate": 0.3,
        "token_dropout": 0.2,
        "token_mask": 0.3,
    }
    head |= {"pooling": "mean"}  # a [CLS] takes more than twice the steps
    speech = {
        "name": "published",
        "weights": f"{arg}/weights/whisper-tiny.en-encoder",
        "frozen": "tower",
    }
    config.model.speech = ConfigDict(
        speech | {"layer": "last", "pool": 4, "conv_blocks": 2, "depth": 1} | head
    )
    config.model.image = ConfigDict({"name": "tokens", "depth": 1} | head)
    config.model.multimodal = ConfigDict(
        {"width": 128, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "dropout_rate": 0.2}
    )

    config.method.momentum = 0.98
    config.method.warm_up_steps = 700
    config.method.mining_tau = 0.5  # SIM learns nothing from the negatives that tau draws
    config.method.alpha_ramp_steps = 100
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 60
    config.optimizer.weight_decay = 0.1
    config.eval.k = 32
    return config
