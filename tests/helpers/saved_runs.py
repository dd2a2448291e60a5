"""Workdirs with a checkpoint that no training has made: loading one needs no data set."""

import jax
import numpy as np

from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config, save_config
from c2f_jax.training.checkpoints import Checkpoints
from c2f_jax.training.optimizer import create_optimizer
from c2f_jax.training.train_state import create_train_state

# An encoder of 16 channels on a published network of other sizes.
ENCODER = {"name": "published", "frozen": "none", "width": 16, "depth": 1, "heads": 2}


def tiny_config(*flags, **encoders):
    """The run of seconds, on recordings of at most one second.

    ``speech`` and ``image`` are the attributes of a published network, in place of a light
    encoder."""
    flags = ["--config.data.max_seconds=1.0", "--config.data.bucket_seconds=(1.0,)", *flags]
    config = load_config("spoken_scenes:runlocal", flags)
    for part, tower in encoders.items():
        with config.model.unlocked():
            config.model[part] = ENCODER | {"tower": tower}
    return config


def save_run(folder, config, step=4):
    """Save a run whose parameters are random, biases too; its folder."""
    experiment = create_experiment(config)
    state = create_train_state(
        experiment.model,
        create_optimizer(experiment.optimizer, experiment.steps),
        example_batch(experiment.data),
        seed=0,
        queue_size=0,
        token_queue_size=0,
        momentum_model=False,
    )
    rng = np.random.default_rng(0)

    def move(x):
        return x + 0.05 * rng.standard_normal(x.shape).astype(np.float32)

    state = state.replace(params=jax.tree.map(move, jax.device_get(state.params)))
    save_config(config, folder)
    checkpoints = Checkpoints(folder)
    checkpoints.save(step, state, {"history": {}}, wait=True)
    checkpoints.close()
    return folder
