"""The quickstart: the embedded spoken scenes, light encoders, two cores.

    c2f train --config=configs/spoken_scenes.py --workdir=runs/spoken_scenes

``--config=configs/spoken_scenes.py:crowded`` goes on from it with scenes of four objects of which a caption tells two:

    c2f train --config=configs/spoken_scenes.py:crowded --workdir=runs/crowded --config.init_from=runs/spoken_scenes

``--config=configs/spoken_scenes.py:simple`` is a run of few minutes with small encoders on scenes of two objects, meant
for ``c2f ablate``. ``--config=configs/spoken_scenes.py:runlocal`` shrinks everything to a run of seconds, for tests.
"""

from c2f_jax.config import default_config


def get_config(arg=""):
    """The configuration; ``arg`` is "", "crowded", "simple" or "runlocal"."""
    if arg not in ("", "crowded", "simple", "runlocal"):
        raise ValueError(
            f"argument {arg!r} after the colon: crowded, simple, runlocal or nothing is expected"
        )
    config = default_config()
    config.data.name = "spoken_scenes"
    # Ten minutes on two cores: plain in-batch steps first, which are cheap, then the whole method.
    config.batch_size = 64
    config.steps = 800
    config.eval_every = config.checkpoint_every = 400
    config.queue_size = 512
    config.data.bucket_seconds = (3.6,)
    config.model.image.depth = 3
    config.model.image.mlp_ratio = 2.0
    config.model.image.conv_blocks = 1
    config.method.momentum = 0.98
    config.method.warm_up_steps = 200
    config.method.alpha_ramp_steps = 300
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 80
    if arg == "crowded":
        config.data.name = "spoken_scenes/crowded"
        config.steps = 900
        config.eval_every = config.checkpoint_every = 300
        config.method.warm_up_steps = 0
        config.method.alpha_ramp_steps = 400
        config.method.mining_tau = 0.1
    if arg == "simple":
        # Small enough for experiments of many runs.
        config.data.name = "spoken_scenes/simple"
        config.steps = 700
        config.eval_every = config.checkpoint_every = 700
        config.data.bucket_seconds = (2.2,)
        config.method.warm_up_steps = 400
        config.method.alpha_ramp_steps = 80
        config.method.mining_tau = 0.2
        config.optimizer.warmup_steps = 40
        for part in (config.model.speech, config.model.image):
            part.width, part.depth = 64, 2
        config.model.multimodal.width = 64
    if arg == "runlocal":
        config.data.name = "spoken_scenes/tiny"
        config.batch_size = 16
        config.steps = 4
        config.log_every, config.eval_every, config.checkpoint_every = 2, 2, 2
        config.queue_size = 24
        config.method.alpha_ramp_steps = 4
        config.method.warm_up_steps = 1
        for part in (config.model.speech, config.model.image, config.model.multimodal):
            part.width, part.depth = 32, 1
        (
            config.eval.k,
            config.eval.batch_size,
            config.eval.pair_batch_size,
            config.eval.resamples,
        ) = 4, 16, 64, 50
    return config
