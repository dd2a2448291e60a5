"""The quickstart: the embedded spoken scenes, light encoders, two cores.

    c2f train --config=configs/spoken_scenes.py --workdir=runs/spoken_scenes

``--config=configs/spoken_scenes.py:runlocal`` shrinks everything to a run of seconds, for tests.
"""

import ml_collections


def get_config(arg=""):
    """The configuration; ``arg`` is "" or "runlocal"."""
    if arg not in ("", "runlocal"):
        raise ValueError(f"argument {arg!r} after the colon: runlocal or nothing is expected")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 96
    config.steps = 1000
    config.log_every = 20
    config.eval_every = 250
    config.checkpoint_every = 250
    config.queue_size = 1024
    config.token_queue_size = 0
    config.parallel = "pmap"

    config.data = data = ml_collections.ConfigDict()
    data.name = "spoken_scenes"
    data.data_dir = ml_collections.config_dict.placeholder(str)
    data.train_split = "train"
    data.validation_split = "validation"
    data.test_split = "test"
    data.image_size = 64
    data.bucket_seconds = (4.5,)
    data.max_seconds = 5.0
    data.max_bad_share = 0.01
    data.shuffled_share = 0.0
    data.threads = 2
    data.prefetch = 4

    config.model = model = ml_collections.ConfigDict()
    model.embedding_dim = 256
    model.initial_tau = 0.07
    model.dtype = "float32"
    model.attention = "xla"
    model.remat = False
    encoder = {"width": 96, "depth": 4, "heads": 4, "mlp_ratio": 4.0, "dropout_rate": 0.0}
    # Frames every 20 ms and two strided convolutions: a token every 80 ms.
    model.speech = ml_collections.ConfigDict({"name": "log_mel", "mels": 80, "hop": 320, "conv_layers": 2} | encoder)
    model.image = ml_collections.ConfigDict({"name": "vit", "patch": 16} | encoder)
    model.multimodal = ml_collections.ConfigDict(encoder | {"depth": 2})

    config.method = method = ml_collections.ConfigDict()
    method.momentum = 0.99
    method.alpha = 0.4
    method.alpha_ramp_steps = ml_collections.config_dict.placeholder(int)
    method.id_policy = "multi_positive"
    method.sic_weight = 1.0
    method.sim_weight = 1.0
    method.negatives = "global"
    method.min_tau = 0.001
    method.max_tau = 0.5

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.learning_rate = 1e-3
    optimizer.warmup_steps = 100
    optimizer.final_fraction = 0.02
    optimizer.weight_decay = 0.05
    optimizer.b2 = 0.98
    optimizer.clip_norm = 1.0

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.k = 16
    evaluation.score = "joint"
    evaluation.batch_size = 100
    evaluation.pair_batch_size = 256
    evaluation.resamples = 1000

    if arg == "runlocal":
        data.name = "spoken_scenes/tiny"
        config.batch_size = 16
        config.steps = 4
        config.log_every, config.eval_every, config.checkpoint_every = 2, 2, 2
        config.queue_size = 24
        for part in (model.speech, model.image, model.multimodal):
            part.width, part.depth = 32, 1
        evaluation.k, evaluation.batch_size, evaluation.pair_batch_size, evaluation.resamples = 4, 16, 64, 50
    return config
