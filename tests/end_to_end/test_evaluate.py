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
from c2f_jax.evaluate import (
    evaluate_baseline,
    evaluate_by_voice,
    evaluate_encoded,
    evaluate_source,
)
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


def test_a_checkpoint_that_is_not_the_best_does_not_replace_the_result_of_the_best(
    setting, tmp_path, caplog
):
    best = dataclasses.replace(model_on(jax.devices()[:1], setting), workdir=tmp_path)
    other = dataclasses.replace(best, step=2, is_best=False)
    pages = [evaluate_source(model, setting[2], progress=False)[1] for model in (best, other)]
    assert pages[1].name == pages[0].name.replace(".html", "-step2.html")
    stored = [json.loads(page.with_suffix(".json").read_text())["step"] for page in pages]
    assert stored == [10, 2] and not caplog.records

    # The same checkpoint by other options: what is replaced is said.
    changed = dataclasses.replace(best.experiment.eval, k=7)
    experiment = dataclasses.replace(best.experiment, eval=changed)
    evaluate_source(dataclasses.replace(best, experiment=experiment), setting[2], progress=False)
    assert "is replaced: its result is of other k" in caplog.text


def test_voices_of_another_data_set_of_the_same_label_stay(setting, tmp_path):
    model = dataclasses.replace(model_on(jax.devices()[:1], setting), workdir=tmp_path / "run")
    for number, name in enumerate(("x", "y")):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        rows = []
        for k in range(4):
            Image.new("RGB", (8, 8), (60 * k, number, 0)).save(folder / f"{k}.png")
            wave = 0.1 * np.random.default_rng(k).standard_normal(3000 + number)
            (folder / f"{k}.wav").write_bytes(wav(wave))
            row = {"image": f"{k}.png", "audio": f"{k}.wav", "speaker": "ab"[k % 2]}
            rows += [row | {"split": "test"}] + [row | {"split": "train"}] * (k % 2)
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = dataclasses.replace(model.experiment.data, name=str(folder / "manifest.jsonl"))
        experiment = dataclasses.replace(model.experiment, data=data)
        on_data = dataclasses.replace(model, experiment=experiment)
        for _ in range(2):
            found = evaluate_by_voice(on_data, load_pairs(data.name, "test"))
            assert found.keys() == {"heard", "unheard"}
    stored = [
        json.loads(path.read_text()) for path in (tmp_path / "run/eval").glob("*voices*.json")
    ]
    sets = {voices["heard"]["data_set"].split("/")[-3] for voices in stored}
    assert len(stored) == 2 and sets == {"x", "y"}


def test_what_is_left_out_is_named_in_the_table_and_on_the_page(setting, tmp_path):
    model = dataclasses.replace(model_on(jax.devices()[:1], setting), workdir=tmp_path / "run")
    rows = []
    for k in range(100):
        Image.new("RGB", (8, 8), (2 * k, 0, 0)).save(tmp_path / f"{k}.png")
        wave = 0.1 * np.random.default_rng(k).standard_normal(3000)
        (tmp_path / f"{k}.wav").write_bytes(wav(wave))
        row = json.dumps({"image": f"{k}.png", "audio": f"{k}.wav", "split": "test"})
        rows.append((row if k != 5 else row[:30]) + "\n")
    (tmp_path / "8.png").unlink()
    (tmp_path / "9.png").write_bytes(b"<script>")
    (tmp_path / "m.jsonl").write_text("".join(rows))
    source = load_pairs(str(tmp_path / "m.jsonl"), "test", max_bad_share=0.1)
    result, page = evaluate_source(model, source, progress=False)
    for told in (result.table(), page.read_text()):
        for part in ("m.jsonl:6: not JSON", "8.png: no such file", "9.png: "):
            assert part in told
    assert "left out, since they cannot be used: 3" in result.table()
    many = dataclasses.replace(result, bad_items={f"\x1b{k}": "gone" for k in range(23)})
    assert "and 3 more" in many.table() and "\x1b" not in many.table()


def test_a_workdir_that_cannot_be_written_is_told_before_anything_is_encoded(setting, tmp_path):
    (tmp_path / "eval").write_text("a file")
    model = dataclasses.replace(model_on(jax.devices()[:1], setting), workdir=tmp_path)
    source = Memory([800])  # too short to be encoded with anything
    for evaluate in (evaluate_source, evaluate_by_voice):
        with pytest.raises(UserError, match=f"--workdir={tmp_path}/eval cannot be written"):
            evaluate(model, source)
    images = Query(images=[str(tmp_path / "none.png")], output=tmp_path / "eval" / "x.html")
    with pytest.raises(UserError, match="--output=.*cannot be written"):
        search(model, images)
