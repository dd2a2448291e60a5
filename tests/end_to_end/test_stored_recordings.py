"""The recall of a trained model does not depend on how the recordings of the test split are
stored."""

import json

import numpy as np
import pytest
import soxr
from helpers import audio_forms
from helpers.audio_forms import RATE, patched, stored
from helpers.paths import CONFIGS
from PIL import Image

from c2f_jax.config.files import load_config
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.evaluate import evaluate_encoded
from c2f_jax.inference import TrainedModel
from c2f_jax.train import train_and_evaluate

pytestmark = pytest.mark.slow  # about two minutes

PAIRS = 24
FLAGS = (
    *("--config.steps=300", "--config.batch_size=12", "--config.queue_size=12"),
    *("--config.log_every=100", "--config.eval_every=300", "--config.checkpoint_every=300"),
    *("--config.data.bucket_seconds=1.5,", "--config.data.max_seconds=2.0", "--config.eval.k=4"),
    *("--config.method.warm_up_steps=300", "--config.data.validation_split=test"),
    *("--config.data.augment.noise_db=5,40", "--config.data.augment.gain_db=6"),
)


def melody(number):
    """Four tones in noise, which belong to a picture; training and test hear the same."""
    rng = np.random.default_rng(number)
    time = np.arange(round(0.35 * RATE)) / RATE
    tones = [np.sin(2 * np.pi * hertz * time) for hertz in rng.uniform(200, 3000, 4)]
    wave = 0.25 * np.concatenate(tones)
    return wave + rng.normal(0, 0.01, len(wave))


def integers(wave):
    return np.round(wave * 32768).astype(np.int16)


def flac_of_unknown_length(wave):
    data = stored(integers(wave), container="FLAC")
    return data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]


def streamed_wav(wave):
    data = stored(integers(wave))
    return patched(data, data.index(b"data") + 4, "<I", 0)


def opposite(wave):
    return stored(np.stack([integers(wave), -integers(wave)], 1))


def at_rate(wave, rate, container, codec):
    return stored(soxr.resample(wave, RATE, rate), rate, container, codec)


LOSSLESS = {
    "WAV, streamed": streamed_wav,
    "WAV, two channels": lambda wave: stored(np.stack([integers(wave)] * 2, 1)),
    "WAV, opposite phase": opposite,
    "WAV, one channel silent": lambda wave: stored(
        np.stack([integers(wave), 0 * integers(wave)], 1)
    ),
    "WAV, float of 16 bits": lambda wave: stored(
        integers(wave).astype(np.float32), subtype="FLOAT"
    ),
    "WAV, 24 bits": lambda wave: stored(integers(wave).astype(np.int32) << 16, subtype="PCM_24"),
    "FLAC": lambda wave: stored(integers(wave), container="FLAC"),
    "FLAC, unknown length": flac_of_unknown_length,
    **{
        kind: lambda wave, kind=kind: stored(integers(wave), container=kind, subtype="PCM_16")
        for kind in ("AIFF", "AU", "CAF", "W64", "RF64", "NIST", "VOC", "MAT5", "PAF")
    },
}
LOSSY = {
    "WAV, mu-law": lambda wave: stored(wave, subtype="ULAW"),
    "WAV, A-law": lambda wave: stored(wave, subtype="ALAW"),
    "WAV, ADPCM": lambda wave: stored(wave, subtype="IMA_ADPCM"),
    "WAV, 44.1 kHz": lambda wave: at_rate(wave, 44_100, "WAV", "PCM_16"),
    "WAV, 384 kHz": lambda wave: at_rate(wave, 384_000, "WAV", "PCM_16"),
    "WAV, 8 kHz": lambda wave: at_rate(wave, 8_000, "WAV", "PCM_16"),
    "Ogg Vorbis": lambda wave: stored(wave, container="OGG", subtype="VORBIS"),
    "Ogg Opus": lambda wave: at_rate(wave, 48_000, "OGG", "OPUS"),
    "MP3": lambda wave: stored(wave, container="MP3"),
    "MP3, no Xing header": lambda wave: audio_forms.without_header(stored(wave, container="MP3")),
    "MP3, 44.1 kHz": lambda wave: at_rate(wave, 44_100, "MP3", "MPEG_LAYER_III"),
}


def write_split(folder, split, store):
    """Write the recordings of a split in a form, and return its rows."""
    rows = []
    for number in range(PAIRS):
        audio = folder / f"{split}_{number}.sound"
        audio.write_bytes(store(melody(number)))
        rows.append({"image": f"{folder.parent}/{number}.png", "audio": str(audio), "split": split})
    return rows


def write_manifest(folder, rows):
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    rng = np.random.default_rng(0)
    for number in range(PAIRS):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(
            folder / f"{number}.png"
        )
    plain = folder / "plain"
    plain.mkdir()

    def store(wave):
        return stored(integers(wave))

    rows = [*write_split(plain, "train", store), *write_split(plain, "test", store)]
    manifest = write_manifest(plain, rows)
    flags = [*FLAGS, f"--config.data.name={manifest}"]
    config = load_config(f"{CONFIGS / 'spoken_scenes.py'}:runlocal", flags)
    train_and_evaluate(config, folder / "run")
    return folder, TrainedModel.load(str(folder / "run"))


def ranking(model, manifest):
    result = evaluate_encoded(model, model.encode_split(load_pairs(manifest, "test")))
    return result.lists["s2i"].coarse, result.coarse


def recall(lists):
    """Return the share of recordings whose first image is theirs."""
    return float((lists[:, 0] == np.arange(len(lists))).mean())


def test_recall_is_unchanged_in_every_form(trained):
    folder, model = trained
    expected, _ = ranking(model, str(folder / "plain" / "manifest.jsonl"))
    assert recall(expected) > 0.9

    told = {}
    for name, store in {**LOSSLESS, **LOSSY}.items():
        place = folder / name.replace(" ", "_")
        place.mkdir()
        lists, _ = ranking(model, write_manifest(place, write_split(place, "test", store)))
        told[name] = recall(lists)
        if name in LOSSLESS:
            np.testing.assert_array_equal(lists, expected, err_msg=name)
    print(f"R@1 {recall(expected):.3f} as WAV;", told)
    for name, found in told.items():
        assert abs(found - recall(expected)) <= 0.05, (name, told)
