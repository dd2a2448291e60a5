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
    config.data.bucket_seconds = (4.5,)
    config.data.max_seconds = 5.0
    config.data.max_bad_share = 0.01
    config.data.shuffled_share = 0.0
    config.data.threads = 2
    config.data.prefetch = 4
    config.data.max_padding = placeholder(float)
    config.data.augment = ConfigDict(dataclasses.asdict(AugmentConfig()))

    encoder = {"width": 96, "depth": 4, "heads": 4, "mlp_ratio": 4.0, "dropout_rate": 0.0}
    config.model = ConfigDict()
    config.model.embedding_dim = 256
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


def published_config(size="base", finetuned=False):
    """The paper's encoders: HuBERT and BLIP-2's image side (frozen, its query tokens cached).

    Hyper-parameters of frozen encoders are SpeechCLIP's, of fine-tuned ones ALBEF's.

    Args:
      size: of HuBERT, "base" or "large".
      finetuned: train HuBERT's transformer too; otherwise HuBERT is frozen and its layers' weighted sum learnt.
    """
    config = default_config()
    config.batch_size = 256
    config.steps = 50_000
    config.log_every = 100
    config.eval_every = config.checkpoint_every = 2000
    config.data.bucket_seconds = (3.2, 4.8, 6.4)
    config.data.max_seconds = 25.0
    config.data.threads = 16
    config.model.dtype = "bfloat16"
    speech = {"name": "published", "weights": f"weights/hubert_{size}", "width": 768, "depth": 2, "heads": 12}
    speech |= {"mlp_ratio": 4.0, "dropout_rate": 0.1}
    speech |= {"frozen": "conv", "layer": "last"} if finetuned else {"frozen": "tower", "layer": "weighted_sum"}
    config.model.speech = ConfigDict(speech)
    image = {"name": "published", "weights": "weights/blip2", "frozen": "tower", "width": 768, "depth": 1, "heads": 12}
    config.model.image = ConfigDict(image | {"dropout_rate": 0.1})
    config.model.multimodal = ConfigDict({"width": 768, "depth": 4, "heads": 12, "dropout_rate": 0.1})
    config.model.remat = finetuned
    config.method.momentum = 0.995
    config.method.alpha_ramp_steps = None
    config.optimizer.learning_rate = 1e-5 if finetuned else 1e-4
    config.optimizer.weight_decay = 0.02 if finetuned else 1e-6
    config.optimizer.warmup_steps = 5000
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.999
    config.eval.k = 128
    config.eval.batch_size = 32
    return config


PUBLISHED_SIZES = {
    "base": ("base", False),
    "large": ("large", False),
    "base_finetuned": ("base", True),
    "large_finetuned": ("large", True),
}
