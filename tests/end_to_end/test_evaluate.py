"""Encoding and ranking a split: the same on one device and on four, in mixed lengths and one
recording at a time."""

import jax
import numpy as np
import pytest
from helpers.memory_source import Memory
from helpers.paths import CONFIGS
from helpers.rounding import assert_equal_but_for_rounding

from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config
from c2f_jax.data.images import decode_image
from c2f_jax.data.items import load_wave
from c2f_jax.evaluate import evaluate_encoded
from c2f_jax.inference import TrainedModel, encode_speech
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
