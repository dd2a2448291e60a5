"""The quickstart: embedded spoken scenes, light encoders, six minutes on two cores.

    c2f train --config=spoken_scenes --workdir=runs/spoken_scenes

Speech to image on the test split: R@1 65 coarse, 500 images (docs/results.md).

The argument chooses another run:

* ``crowded`` continues with scenes of four objects, of which the caption describes two:

    c2f train --config=spoken_scenes:crowded --workdir=runs/crowded \\
        --config.init_from=runs/spoken_scenes

* ``simple`` takes a few minutes, with small encoders on scenes of two objects, for ``c2f ablate``.
* ``runlocal`` shrinks everything to a run of seconds, for tests.
"""

from ml_collections import ConfigDict

from c2f_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration.

    Args:
      arg: "", "crowded", "simple" or "runlocal".
    """
    if arg not in ("", "crowded", "simple", "runlocal"):
        raise ValueError(
            f"after the colon, {arg!r} must be crowded, simple or runlocal; or leave it out"
        )
    config = default_config()
    config.data.name = "spoken_scenes"
    config.data.bucket_seconds = (3.6,)
    config.batch_size = 64
    config.steps = 800
    config.eval_every = config.checkpoint_every = 400
    config.queue_size = 512
    config.model.image.depth = 3
    config.model.image.mlp_ratio = 2.0
    config.model.image.conv_blocks = 1
    config.method.momentum = 0.98
    config.method.warm_up_steps = 200  # in-batch steps, which are cheap, before the whole method
    config.method.alpha_ramp_steps = 300
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 80
    change = {"crowded": _crowded, "simple": _simple, "runlocal": _runlocal}.get(arg)
    if change is not None:
        change(config)
    return config


def _crowded(config: ConfigDict) -> None:
    """Continue from a trained model, with more objects than a caption describes."""
    config.data.name = "spoken_scenes/crowded"
    config.steps = 900
    config.eval_every = config.checkpoint_every = 300
    config.method.warm_up_steps = 0
    config.method.alpha_ramp_steps = 400
    config.method.mining_tau = 0.1


def _simple(config: ConfigDict) -> None:
    """Make a run small enough for experiments of many runs."""
    config.data.name = "spoken_scenes/simple"
    config.data.bucket_seconds = (2.2,)
    config.steps = 700
    config.eval_every = config.checkpoint_every = 700
    config.method.warm_up_steps = 400
    config.method.alpha_ramp_steps = 80
    config.method.mining_tau = 0.2
    config.optimizer.warmup_steps = 40
    for part in (config.model.speech, config.model.image):
        part.width, part.depth = 64, 2
    config.model.multimodal.width = 64


def _runlocal(config: ConfigDict) -> None:
    """Shrink everything to a run of seconds."""
    config.data.name = "spoken_scenes/tiny"
    config.batch_size = 16
    config.steps = 4
    config.log_every = config.eval_every = config.checkpoint_every = 2
    config.queue_size = 24
    config.method.alpha_ramp_steps = 4
    config.method.warm_up_steps = 1
    for part in (config.model.speech, config.model.image, config.model.multimodal):
        part.width, part.depth = 32, 1
    config.eval.k = 4
    config.eval.batch_size = 16
    config.eval.pair_batch_size = 64
    config.eval.resamples = 50
