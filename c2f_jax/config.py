"""Default configuration: light encoders that fit small machines. Files in ``configs/`` change what differs."""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from c2f_jax.data.augment import AugmentConfig


def default_config():
    """All values there are, as a ConfigDict; what they mean stands at ``DataConfig``, ``MethodConfig`` and so on."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 96
    config.steps = 1000
    config.log_every = 20
    config.eval_every = 250
    config.checkpoint_every = 250
    config.queue_size = 1024
    config.token_queue_size = 0
    config.parallel = "pmap"
    config.init_from = placeholder(str)

    config.data = ConfigDict()
    config.data.name = placeholder(str)
    config.data.data_dir = placeholder(str)
    config.data.train_split = "train"
    config.data.validation_split = "validation"
    config.data.test_split = "test"
    config.data.image_size = 64
    config.data.image_resize = "square"
    config.data.image_resize_side = 0
    config.data.speech_features = placeholder(str)
    config.data.image_features = placeholder(str)
    config.data.speech_copies = 0
    config.data.bucket_seconds = (4.5,)
    config.data.max_seconds = 5.0
    config.data.max_bad_share = 0.01
    config.data.shuffled_share = 0.0
    config.data.threads = 2
    config.data.prefetch = 4
    config.data.max_padding = placeholder(float)
    config.data.augment = ConfigDict(dataclasses.asdict(AugmentConfig()))

    encoder = {"width": 96, "depth": 4, "heads": 4, "mlp_ratio": 4.0, "dropout_rate": 0.0, "pooling": "cls"}
    config.model = ConfigDict()
    config.model.embedding_dim = 256
    config.model.branches = 1
    config.model.initial_tau = 0.07
    config.model.dtype = "float32"
    config.model.attention = "xla"
    config.model.remat = False
    config.model.speech = ConfigDict({"name": "log_mel", "mels": 80, "hop": 240, "conv_layers": 3} | encoder)
    config.model.image = ConfigDict(
        {"name": "vit", "patch": 8, "conv_stem": True, "conv_blocks": 0, "token_pool": 2} | encoder
    )
    config.model.multimodal = ConfigDict(encoder | {"depth": 2, "mlp_ratio": 2.0})

    config.method = ConfigDict()
    config.method.momentum = 0.995
    config.method.momentum_half_life = placeholder(int)
    config.method.alpha = 0.4
    config.method.alpha_ramp_steps = placeholder(int)
    config.method.id_policy = "multi_positive"
    config.method.sic_weight = 1.0
    config.method.sim_weight = 1.0
    config.method.negatives = "global"
    config.method.mining_tau = placeholder(float)
    config.method.warm_up_steps = 0
    config.method.min_tau = 0.001
    config.method.max_tau = 0.5

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.02
    config.optimizer.weight_decay = 0.05
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0

    config.eval = ConfigDict()
    config.eval.k = 32
    config.eval.score = "joint"
    config.eval.batch_size = 100
    config.eval.pair_batch_size = 256
    config.eval.resamples = 1000
    return config


# Argument of a data set's configuration: the size of HuBERT, and whether its transformer is trained too.
PUBLISHED_ENCODERS = {
    "base": ("base", False),
    "large": ("large", False),
    "base_finetuned": ("base", True),
    "large_finetuned": ("large", True),
}


def data_set_config(name, encoders, light_steps):
    """A data set of ``c2f data prepare`` with light or published encoders.

    Args:
      name: of the data set.
      encoders: "light", or a key of ``PUBLISHED_ENCODERS``.
      light_steps: steps with light encoders; published ones take 50,000.

    Raises:
      ValueError: no such encoders.
    """
    known = ("light", *PUBLISHED_ENCODERS)
    if encoders not in known:
        raise ValueError(f"argument {encoders!r} after the colon: one of {', '.join(known)} is expected")
    config = default_config()
    config.data.name = name
    config.data.max_seconds = 25.0
    config.eval.k = 128
    if encoders == "light":
        config.steps = light_steps
        config.eval_every = config.checkpoint_every = light_steps // 20
        config.data.image_size = 128
        config.data.bucket_seconds = (8.0,)
        config.data.max_padding = 0.1
    else:
        _set_published_encoders(config, *PUBLISHED_ENCODERS[encoders])
        config.data.image_features = f"runs/features/{name}-blip2"
    return config


def _set_published_encoders(config, size, finetuned):
    """The paper's encoders: HuBERT, and BLIP-2's image side, frozen, its query tokens cached.

    Hyper-parameters of frozen encoders are SpeechCLIP's, of fine-tuned ones ALBEF's. Without fine-tuning HuBERT is
    frozen and a weighted sum of its layers learnt.
    """
    config.batch_size = 256
    config.steps = 50_000
    config.log_every = 100
    config.eval_every = config.checkpoint_every = 2000
    config.data.bucket_seconds = (3.2, 4.8, 6.4)
    config.data.threads = 16
    config.model.dtype = "bfloat16"
    config.model.remat = True
    head = {"width": 768, "heads": 12, "dropout_rate": 0.1, "pooling": "cls"}
    speech = head | {"name": "published", "weights": f"weights/hubert_{size}", "depth": 2}
    if finetuned:  # layer drop and masking are off, and can be given on the command line
        speech |= {"frozen": "conv", "layer": "last"}
        speech["tower"] = {"layer_drop": 0.0, "mask_time": 0.0, "mask_channels": 0.0}
    else:
        speech |= {"frozen": "tower", "layer": "weighted_sum"}
    config.model.speech = ConfigDict(speech)
    image = head | {"name": "published", "weights": "weights/blip2", "frozen": "tower", "depth": 1}
    config.model.image = ConfigDict(image)
    config.model.multimodal = ConfigDict(head | {"depth": 4})
    config.optimizer.learning_rate = 1e-5 if finetuned else 1e-4
    config.optimizer.weight_decay = 0.02 if finetuned else 1e-6
    config.optimizer.warmup_steps = 5000
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.999
    config.eval.batch_size = 32
