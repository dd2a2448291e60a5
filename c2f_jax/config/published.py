"""Configurations of the published data sets."""

from ml_collections import ConfigDict

from c2f_jax.config.default import default_config

# Argument of a configuration -> the size of HuBERT, and whether its transformer is trained too.
PUBLISHED_ENCODERS = {
    "base": ("base", False),
    "large": ("large", False),
    "base_finetuned": ("base", True),
    "large_finetuned": ("large", True),
}


def data_set_config(name: str, encoders: str, light_steps: int) -> ConfigDict:
    """Return the configuration of a data set made by ``c2f data prepare``.

    Args:
      name: name of the data set.
      encoders: "light", or a key of ``PUBLISHED_ENCODERS``.
      light_steps: steps with light encoders; published encoders take 50,000.

    Raises:
      ValueError: if there are no such encoders.
    """
    known = ("light", *PUBLISHED_ENCODERS)
    if encoders not in known:
        raise ValueError(f"after the colon, {encoders!r} must be one of {', '.join(known)}")
    config = default_config()
    config.data.name = name
    # mining_rows stays what the batch is here: a larger one, on more devices, exchanges no more
    # tokens on each.
    config.data.max_seconds = 25.0
    config.eval.k = 128
    if encoders == "light":
        config.steps = light_steps
        config.eval_every = config.checkpoint_every = light_steps // 20
        config.data.image_size = 128
        config.data.bucket_seconds = (8.0,)
        config.data.max_padding = 0.1
        config.method.mining_rows = config.batch_size
    else:
        _set_published_encoders(config, *PUBLISHED_ENCODERS[encoders])
        config.data.image_features = f"runs/features/{name}-blip2"
    return config


def _set_published_encoders(config: ConfigDict, size: str, finetuned: bool) -> None:
    """Set the encoders of the paper: HuBERT, and the image side of BLIP-2 with cached tokens.

    Without fine-tuning, HuBERT is frozen and a weighted sum of its layers is learned. The
    hyper-parameters of frozen encoders are SpeechCLIP's, those of fine-tuned ones ALBEF's.
    """
    config.batch_size = config.method.mining_rows = 256
    config.steps = 50_000
    config.log_every = 100
    config.eval_every = config.checkpoint_every = 2000
    config.data.bucket_seconds = (3.2, 4.8, 6.4)
    config.data.threads = 16
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.eval.batch_size = 32

    head = {"width": 768, "heads": 12, "dropout_rate": 0.1, "pooling": "cls"}
    speech = head | {"name": "published", "weights": f"weights/hubert_{size}", "depth": 2}
    if finetuned:
        # Layer drop and masking are off; listed here, they can be set on the command line.
        speech |= {"frozen": "conv", "layer": "last"}
        speech["tower"] = {"layer_drop": 0.0, "mask_time": 0.0, "mask_channels": 0.0}
    else:
        speech |= {"frozen": "tower", "layer": "weighted_sum"}
    config.model.speech = ConfigDict(speech)
    image = head | {"name": "published", "weights": "weights/blip2", "frozen": "tower", "depth": 1}
    config.model.image = ConfigDict(image)
    config.model.multimodal = ConfigDict(head | {"depth": 4, "mlp_ratio": 4.0})

    config.optimizer.learning_rate = 1e-5 if finetuned else 1e-4
    config.optimizer.weight_decay = 0.02 if finetuned else 1e-6
    config.optimizer.warmup_steps = 5000
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.999
