"""Small galleries, an untrained model that indexes them, and what an index holds."""

import jax
import numpy as np
from helpers.memory_source import png
from helpers.paths import CONFIGS
from ml_collections import ConfigDict
from PIL import Image

from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config
from c2f_jax.inference import TrainedModel
from c2f_jax.training.parallel import replicate

FLAGS = ["--config.eval.batch_size=4", "--config.data.max_seconds=1.0", "--config.eval.k=3"]
QUESTION = 0.3 * np.sin(np.arange(12_000) / 8.5)


def untrained_model(workdir, image_tokens=None):
    """An untrained model, of image tokens in a file if there is one: its answers are by chance."""
    config = load_config(f"{CONFIGS}/spoken_scenes.py:runlocal", FLAGS)
    if image_tokens:
        config.data.image_features = str(image_tokens)
        config.model.image = ConfigDict({"name": "tokens", "width": 32, "heads": 2, "depth": 1})
    experiment = create_experiment(config)
    params = jax.jit(experiment.model.init)(jax.random.key(3), example_batch(experiment.data))
    return TrainedModel(experiment, replicate(params["params"]), 10, workdir, {})


def picture(number, size=(40, 30)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return png(Image.fromarray(pixels))


def make_gallery(folder, count=11):
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02d}.png").write_bytes(picture(number))
    (folder / "03.png").write_bytes(b"damaged")
    return folder


def content(index):
    """Name -> all that is stored of an item, but for the times of its file."""
    found = {}
    for row, item in index.items():
        rows = index.encoded([row])
        parts = rows.embeddings.tobytes(), rows.tokens.tobytes(), rows.thumbnails[0]
        about = {name: v for name, v in item.metadata.items() if name not in ("date", "modified")}
        found[item.name] = *parts, item.content, about, item.notes
    return found
