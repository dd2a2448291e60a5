"""A run in MSEB's own tasks and runner scores as in ours."""

import importlib.util
import itertools

import jax
import numpy as np
import pytest
from helpers.odd_recordings import OddRecordings
from helpers.pages import python_blocks
from helpers.paths import CONFIGS, ROOT

from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config
from c2f_jax.errors import UserError
from c2f_jax.evaluate import evaluate_encoded
from c2f_jax.harnesses.mseb import MsebEncoder
from c2f_jax.inference import TrainedModel
from c2f_jax.training.parallel import replicate

pytestmark = [
    pytest.mark.slow,  # MSEB imports TensorFlow, PyTorch and Beam
    pytest.mark.skipif(
        importlib.util.find_spec("mseb") is None,
        reason="mseb is not installed: pip install mseb, with Python 3.12, or its source in "
        "PYTHONPATH",
    ),
]
FLAGS = ["--config.eval.batch_size=10", "--config.data.max_seconds=1.0"]


@pytest.fixture(scope="module")
def mseb():
    """MSEB's modules, its flags parsed; on Python 3.11 with the one function that it lacks."""

    def batched(values, size):
        values = iter(values)
        while part := tuple(itertools.islice(values, size)):
            yield part

    if not hasattr(itertools, "batched"):
        itertools.batched = batched
    from absl import flags
    from mseb import encoder, leaderboard, runner, types
    from mseb.tasks.retrievals.image_to_speech import flickr8k as to_speech
    from mseb.tasks.retrievals.speech_to_image import flickr8k as to_image

    flags.FLAGS(["test"], known_only=True)
    modules = {"encoder": encoder, "leaderboard": leaderboard, "runner": runner, "types": types}
    tasks = {"s2i": to_image.Flickr8kImageRetrieval, "i2s": to_speech.Flickr8kSpeechRetrieval}
    return type("Modules", (), modules | {"tasks": tasks})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model."""
    experiment = create_experiment(load_config(f"{CONFIGS}/spoken_scenes.py:runlocal", FLAGS))
    init = jax.jit(experiment.model.init)
    params = init(jax.random.key(3), example_batch(experiment.data))["params"]
    return TrainedModel(experiment, replicate(params, None), 10, tmp_path_factory.mktemp("run"), {})


@pytest.fixture
def encoder(model, monkeypatch):
    monkeypatch.setattr(TrainedModel, "load", lambda workdir, step: model)
    return MsebEncoder(model.workdir)


@pytest.fixture(scope="module")
def source():
    return OddRecordings()


@pytest.fixture
def folder(source, tmp_path):
    """Flickr8k as MSEB lays it out."""
    waves, images = tmp_path / "flickr_audio" / "wavs", tmp_path / "Images"
    waves.mkdir(parents=True)
    images.mkdir()
    pairs, captions = "", "image,caption\n"
    for row, image in enumerate(source.image_index):
        (waves / f"{row:03}.wav").write_bytes(source.file(row))
        pairs += f"{row:03}.wav {image:03}.png #{row % 2}\n"
        captions += f'{image:03}.png,"caption {row}"\n'
    names = [f"{row:03}.png" for row in range(source.num_images)]
    for row, name in enumerate(names):
        (images / name).write_bytes(source.image(row))
    (tmp_path / "captions.txt").write_text(captions)
    (tmp_path / "flickr_audio" / "wav2capt.txt").write_text(pairs)
    (tmp_path / "flickr_audio" / "wav2spk.txt").write_text(pairs.replace(".png", ""))
    (tmp_path / "Flickr_8k.testImages.txt").write_text("\n".join(names))
    return tmp_path


@pytest.mark.parametrize("direction", ["s2i", "i2s"])
def test_a_run_scores_as_ours(mseb, model, encoder, source, folder, direction, capsys):
    from absl import flags

    flags.FLAGS.dataset_basepath = str(folder)
    flags.FLAGS.task_cache_basepath = str(folder / f"cache-{direction}")
    runner = mseb.runner.DirectRunner(batch_size=5, encoder=encoder)
    task = mseb.tasks[direction]()
    task.setup(runner=runner)
    (result,) = mseb.leaderboard.run_benchmark("c2f_jax", runner, task)
    theirs = {score.metric: score.value for score in result.scores}

    encoded = model.encode_split(source)
    metrics = evaluate_encoded(model, encoded).coarse.direction(direction)
    assert theirs["EM"] == pytest.approx(metrics["R@1"].value / 100)
    assert theirs["RecallAt10"] == pytest.approx(metrics["R@10"].value / 100)
    assert 0 < theirs["RecallAt10"] < 1 and theirs["NoResultRate"] == 0
    width = model.experiment.model.embedding_size
    assert theirs["mean_encoding_size_bytes"] == 4 * width

    shown = capsys.readouterr().out
    assert shown.count("over-long") == 1  # when it is first met
    encoder.say_notes()
    over_long = int((source.num_samples > 16_000).sum())
    assert f"note: over-long, {over_long}, " in capsys.readouterr().out


def test_the_documented_program_runs(mseb, model, folder, monkeypatch, capsys):
    from absl import flags

    monkeypatch.setattr(TrainedModel, "load", lambda workdir, step: model)
    program = {"__name__": "block"}
    exec(python_blocks(ROOT / "docs/harnesses.md", "py")[2], program)  # noqa: S102
    flags.FLAGS.run = str(model.workdir)
    flags.FLAGS.dataset_basepath = str(folder)
    flags.FLAGS.task_cache_basepath = str(folder / "cache")
    program["main"](None)
    assert '"metric": "MRR"' in capsys.readouterr().out


def test_sounds_of_any_form(mseb, encoder):
    types = mseb.types
    wave = np.sin(np.arange(8000) / 9).astype(np.float32) / 2
    forms = wave, np.round(32768 * wave).astype(np.int16), np.stack([wave, wave])
    sounds = [
        types.Sound(form, types.SoundContextParams(str(k), 16_000, 8000))
        for k, form in enumerate(forms)
    ]
    first, *others = encoder.encode(sounds)
    assert first.embedding.shape[0] == 1 and first.timestamps.tolist() == [[0.0, 0.5]]
    for other in others:
        np.testing.assert_allclose(other.embedding, first.embedding, atol=1e-3)


def test_what_cannot_be_encoded_is_refused(mseb, encoder):
    types = mseb.types
    text = types.Text("a dog", types.TextContextParams("t"))
    with pytest.raises(UserError, match="a batch of Text: c2f_jax encodes sounds, or images"):
        encoder.encode([text])
    gray = types.Image(np.zeros((4, 5)), types.ImageContextParams("gray.png", 4, 5, 1))
    with pytest.raises(UserError, match="gray.png: float64 of shape .4, 5. is no image"):
        encoder.encode([gray])


def test_it_has_what_the_base_class_has(mseb, encoder):
    of_base = {name for name in dir(mseb.encoder.MultiModalEncoder) if not name.startswith("_")}
    assert of_base <= set(dir(encoder))
