"""Encoding and ranking a split: the same on one device and on four, in mixed lengths and one
recording at a time."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers.memory_source import Memory, wav
from helpers.paths import CONFIGS
from helpers.rounding import assert_equal_but_for_rounding
from PIL import Image

from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config
from c2f_jax.data.items import load_wave
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.decoding.images import decode_image
from c2f_jax.errors import UserError
from c2f_jax.evaluate import evaluate_baseline, evaluate_encoded, evaluate_source
from c2f_jax.index import build_index
from c2f_jax.inference import TrainedModel, encode_speech
from c2f_jax.retrieval.evaluation import EvalConfig
from c2f_jax.retrieval.result import EvaluationResult
from c2f_jax.search import Query, search
from c2f_jax.training.parallel import replicate

CONFIG = str(CONFIGS / "spoken_scenes.py")
FLAGS = [
    "--config.eval.batch_size=10",
    "--config.eval.pair_batch_size=30",
    "--config.data.max_seconds=1.0",
]


class Noise(Memory):
    """Recordings of noise from 0.1 to 1.2 s."""

    def wave(self, index):
        return 0.1 * np.random.default_rng(index).standard_normal(self.lengths[index])


@pytest.fixture(scope="module")
def setting():
    experiment = create_experiment(load_config(f"{CONFIG}:runlocal", FLAGS))
    init = jax.jit(experiment.model.init)
    params = init(jax.random.key(3), example_batch(experiment.data))["params"]
    return experiment, params, Noise(np.random.default_rng(5).integers(1600, 19_000, 43))


def model_on(devices, setting):
    experiment, params, _ = setting
    return TrainedModel(experiment, replicate(params, devices), 10, "nowhere", {})


@pytest.fixture(scope="module")
def encoded(setting):
    return model_on(jax.devices()[:1], setting).encode_split(setting[2])


def test_four_devices_rank_as_one(setting, encoded):
    assert jax.local_device_count() == 4
    one, four = model_on(jax.devices()[:1], setting), model_on(None, setting)
    shared = four.encode_split(setting[2])
    np.testing.assert_array_equal(encoded.speech.lengths, shared.speech.lengths)
    valid = np.arange(encoded.speech.tokens.shape[1]) < encoded.speech.lengths[:, None]

    def arrays(split):
        tokens = split.speech.tokens[valid], split.image.tokens
        return tokens, (split.speech.embedding, split.image.embedding)

    def by_one(params):
        model = model_on(jax.devices()[:1], (setting[0], params, setting[2]))
        return arrays(model.encode_split(setting[2]))

    assert_equal_but_for_rounding(by_one, (setting[1],), arrays(shared))
    results = [evaluate_encoded(model, encoded) for model in (one, four)]
    for direction in ("s2i", "i2s"):
        for ranks in ("coarse", "fine", "coarse_rank", "fine_rank"):
            np.testing.assert_array_equal(
                *(getattr(result.lists[direction], ranks) for result in results)
            )
    assert results[0].fine == results[1].fine


def test_embeddings_of_a_run_score_as_the_run(setting, encoded):
    experiment, params, source = setting
    as_usual = dataclasses.replace(experiment, eval=EvalConfig())
    model = TrainedModel(as_usual, replicate(params, jax.devices()[:1]), 10, "nowhere", {})
    baseline = evaluate_baseline(encoded.speech.embedding, encoded.image.embedding, source)
    assert baseline.coarse == evaluate_encoded(model, encoded).coarse
    assert baseline.baseline["speech"]["was_normalized"]


def test_mixed_lengths_give_what_each_recording_gives_alone_in_their_order(setting, encoded):
    experiment, params, source = setting
    np.testing.assert_array_equal(encoded.recordings, np.arange(43))
    np.testing.assert_array_equal(encoded.speech_ids, 100 + np.arange(43) // 2)
    for index in (0, 1, int(source.lengths.argmin()), int(source.lengths.argmax())):
        wave = load_wave(source, index)[:16_000] * np.float32(1 / 32768)
        padded = np.pad(wave, (0, 16_000 - len(wave)))[None]
        alone = encode_speech(experiment.model, params, padded, np.array([len(wave)], np.int32))
        length = int(alone.lengths[0])
        assert encoded.speech.lengths[index] == length
        np.testing.assert_allclose(encoded.speech.embedding[index], alone.embedding[0], atol=1e-5)
        np.testing.assert_allclose(
            encoded.speech.tokens[index, :length], alone.tokens[0, :length], atol=1e-4
        )


def test_items_are_encoded_as_in_a_split(setting, encoded):
    _, _, source = setting
    model = model_on(None, setting)
    waves = [load_wave(source, index)[:16_000] * np.float32(1 / 32768) for index in range(5)]
    speech = model.encode_items("speech", waves)
    assert speech.embedding.shape == (5, model.experiment.model.embedding_size)
    np.testing.assert_allclose(speech.embedding, encoded.speech.embedding[:5], atol=1e-5)
    side = model.experiment.data.image_size
    images = [decode_image(source.image(row), side) for row in range(3)]
    image = model.encode_items("image", images)
    np.testing.assert_allclose(image.embedding, encoded.image.embedding[:3], atol=1e-5)


def other_params(params):
    """Parameters of which one number differs in its last bit."""
    leaves, structure = jax.tree.flatten(params)
    leaves[3] = np.array(leaves[3])
    leaves[3].flat[0] = np.nextafter(leaves[3].flat[0], np.float32(9))
    return jax.tree.unflatten(structure, leaves)


def test_a_model_is_known_by_its_parameters_and_preprocessing_alone(setting):
    experiment, params, _ = setting
    one, four = model_on(jax.devices()[:1], setting), model_on(None, setting)
    assert one.fingerprint == four.fingerprint
    moved = TrainedModel(experiment, replicate(params, None), 99, "elsewhere", {"loss": [[1, 2]]})
    assert moved.fingerprint == one.fingerprint

    others = [TrainedModel(experiment, replicate(other_params(params), None), 10, "nowhere", {})]
    for change in ({"image_size": 72}, {"image_resize": "squash"}, {"max_seconds": 0.9}):
        data = dataclasses.replace(experiment.data, **change)
        changed = dataclasses.replace(experiment, data=data)
        others.append(TrainedModel(changed, one.params, 10, "nowhere", {}))
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_an_index_of_another_model_is_refused(setting, tmp_path):
    """Of equal step and workdir; a moved run may use its own."""
    experiment, params, source = setting
    (tmp_path / "pictures").mkdir()
    for row in range(3):
        (tmp_path / "pictures" / f"{row}.png").write_bytes(source.image(row))
    (tmp_path / "q.wav").write_bytes(wav(source.wave(0)))
    model = model_on(jax.devices()[:1], setting)
    path = tmp_path / "pictures.index"
    build_index(model, path, str(tmp_path / "pictures"))
    query = Query(
        audio=[str(tmp_path / "q.wav")], index=path, output=str(tmp_path / "page.html"), top=2
    )
    search(dataclasses.replace(model, workdir="moved", step=11), query)

    other = dataclasses.replace(model, params=replicate(other_params(params), None))
    with pytest.raises(UserError, match=r"was encoded by nowhere@10 \(parameters [0-9a-f]{16}\)"):
        search(other, query)


def test_a_result_names_its_model_and_data_and_spares_those_of_other_data(setting, tmp_path):
    experiment, params, _ = setting
    model = dataclasses.replace(model_on(jax.devices()[:1], setting), workdir=tmp_path / "run")
    for name, seed in (("x", 0), ("y", 9)):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        rows = []
        for k in range(3):
            Image.new("RGB", (8, 8), (60 * k, seed, 0)).save(folder / f"{k}.png")
            wave = 0.1 * np.random.default_rng(seed + k).standard_normal(3000)
            (folder / f"{k}.wav").write_bytes(wav(wave))
            rows.append({"image": f"{k}.png", "audio": f"{k}.wav", "split": "test"})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "manifest.jsonl").write_text(lines)

    def evaluate(path):
        source = load_pairs(str(path), "test")
        result, page = evaluate_source(model, source, progress=False)
        stored = json.loads(page.with_suffix(".json").read_text())
        assert stored["model"] == model.fingerprint and stored["data"] == source.identity()
        assert EvaluationResult.from_json(stored).data == result.data
        return page.name

    assert evaluate(tmp_path / "x" / "data" / "manifest.jsonl") == "data-test.html"
    other = evaluate(tmp_path / "y" / "data" / "manifest.jsonl")
    assert other.startswith("data-test-") and len(list((tmp_path / "run/eval").glob("*.json"))) == 2
    assert evaluate(tmp_path / "x" / "data" / ".." / "data" / "manifest.jsonl") == "data-test.html"
    shutil.copy(tmp_path / "y/data/manifest.jsonl", tmp_path / "y/data/clean.jsonl")
    assert evaluate(tmp_path / "y" / "data" / "clean.jsonl") == "data-clean-test.html"
