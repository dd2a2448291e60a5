"""The default configuration."""

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

    encoder = {
        "width": 96,
        "depth": 4,
        "heads": 4,
        "mlp_ratio": 4.0,
        "dropout_rate": 0.0,
        "pooling": "cls",
    }
    config.model = ConfigDict()
    config.model.embedding_dim = 256
    config.model.branches = 1
    config.model.initial_tau = 0.07
    config.model.dtype = "float32"
    config.model.attention = "xla"
    config.model.remat = False
    config.model.speech = ConfigDict(
        {"name": "log_mel", "mels": 80, "hop": 240, "conv_layers": 3} | encoder
    )
    config.model.image = ConfigDict(
        {"name": "vit", "patch": 8, "conv_stem": True, "conv_blocks": 0, "token_pool": 2} | encoder
    )
    config.model.multimodal = ConfigDict(encoder | {"depth": 2, "mlp_ratio": 2.0})

    config.method = ConfigDict()
    config.method.momentum = 0.995
    config.method.alpha = 0.4
    config.method.alpha_ramp_steps = placeholder(int)
    config.method.id_policy = "multi_positive"
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
