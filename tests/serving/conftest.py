"""A server of a tiny untrained model, whose answers are by chance."""

import io

import jax
import numpy as np
import pytest
import soundfile
from helpers.memory_source import png
from helpers.paths import CONFIGS
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")

from c2f_jax.config.experiment import create_experiment, example_batch  # noqa: E402
from c2f_jax.config.files import load_config  # noqa: E402
from c2f_jax.index import build_index  # noqa: E402
from c2f_jax.inference import TrainedModel  # noqa: E402
from c2f_jax.retriever import Retriever  # noqa: E402
from c2f_jax.serving.limits import Limits  # noqa: E402
from c2f_jax.serving.service import Service  # noqa: E402
from c2f_jax.training.parallel import replicate  # noqa: E402

FLAGS = ["--config.eval.batch_size=4", "--config.data.max_seconds=1.0", "--config.eval.k=3"]
LIMITS = Limits(body_bytes=200_000, seconds=5.0, upload_seconds=1.0, queue=64)


def make_wav(seconds=0.75, level=0.3):
    samples = level * np.sin(np.arange(round(16_000 * seconds)) / 8.5)
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def make_png(number, size=(40, 30)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return png(Image.fromarray(pixels))


@pytest.fixture(scope="session")
def wav():
    return make_wav


@pytest.fixture(scope="session")
def picture():
    return make_png


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    experiment = create_experiment(load_config(f"{CONFIGS}/spoken_scenes.py:runlocal", FLAGS))
    params = jax.jit(experiment.model.init)(jax.random.key(3), example_batch(experiment.data))
    workdir = tmp_path_factory.mktemp("run")
    return TrainedModel(experiment, replicate(params["params"]), 10, workdir, {})


@pytest.fixture(scope="session")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number:02d}.png").write_bytes(make_png(number))
    return folder


@pytest.fixture(scope="session")
def retrievers(model, gallery, tmp_path_factory):
    images, speech = Retriever(model), Retriever(model)
    images.gallery = build_index(model, tmp_path_factory.mktemp("index") / "images", gallery)
    recordings = tmp_path_factory.mktemp("recordings")
    for number in range(4):
        (recordings / f"{number}.wav").write_bytes(make_wav(0.4 + number / 10))
    speech.gallery = build_index(
        model, tmp_path_factory.mktemp("index") / "speech", recordings, kind="speech"
    )
    return {"image": images, "speech": speech}


@pytest.fixture(scope="session")
def service(retrievers):
    found = Service(retrievers, LIMITS)
    found.warm_up()
    return found
