"""Flickr8k's photographs with synthetic speech: a frozen Whisper, frozen image tokens, C2F on top.

    c2f train --config=flickr8k_tts:path/to/data --workdir=runs/flickr8k_tts --by-voice

``path/to/data`` holds three things: the manifest ``flickr8k_tts/manifest.jsonl``, the tokens of the
photographs ``flickr8k_tts/features/effnet_lite0_tokens.npz``, and the published files of Whisper's
encoder in ``weights/whisper-tiny.en-encoder``.

The first run writes Whisper's tokens of all recordings to ``runs/features`` (1.2 GB), and those of
two copies of each training recording with another speed and pitch (0.7 GB each). Later runs read
them. ``--by-voice`` reports voices heard in training and other voices separately.

Expected result: docs/results.md. The speech is synthetic, so the numbers cannot be compared with
those of Flickr8k Audio.
"""

from ml_collections import ConfigDict

from c2f_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration.

    Args:
      arg: folder of the data and the weights.
    """
    if not arg:
        raise ValueError("give the folder after a colon: flickr8k_tts:path/to/data")
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

    # Models trained on so few pairs err differently from seed to seed; their mean errs less.
    config.model.branches = 3
    # With one caption per photograph, 5,253 pairs are memorized without dropout of this size.
    head = {
        "width": 192,
        "heads": 4,
        "mlp_ratio": 3.0,
        "dropout_rate": 0.3,
        "token_dropout": 0.2,
        "token_mask": 0.3,
        "pooling": "mean",  # a [CLS] takes more than twice the steps
    }
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
    config.method.mining_tau = 0.5  # SIM learns nothing from negatives drawn with tau
    config.method.alpha_ramp_steps = 100
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 60
    config.optimizer.weight_decay = 0.1
    config.eval.k = 32
    return config
