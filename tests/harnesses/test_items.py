"""Arrays of samples are heard as the files that hold them."""

import io

import numpy as np
import pytest
import soundfile

from c2f_jax.datasets.config import DataConfig
from c2f_jax.decoding.audio import to_pcm16
from c2f_jax.errors import BadFileError
from c2f_jax.items import read_item, wave_file

DATA = DataConfig(name="any", max_seconds=1.0)


def tone(rate, seconds=0.5):
    return 0.4 * np.sin(2 * np.pi * 300 * np.arange(round(rate * seconds)) / rate)


def heard(samples, rate=16_000):
    return read_item(DATA, "speech", wave_file(samples, rate, "it"), "it")


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int16", "int32"])
def test_any_type_of_number(kind):
    scale = {"int16": 2**15, "int32": 2**31}.get(kind, 1)
    samples = (scale * tone(16_000)).astype(kind)
    rounding = 1e-3 if kind == "float16" else 2e-4
    item = heard(samples)
    np.testing.assert_allclose(item.array, tone(16_000), atol=rounding)
    assert not item.notes and not item.converted
    played, _ = soundfile.read(io.BytesIO(item.thumbnail), dtype="int16")
    np.testing.assert_array_equal(played, to_pcm16(item.array))


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_first_or_last(axis):
    both = np.stack([tone(16_000), 0.5 * tone(16_000)], axis)
    item = heard(both)
    np.testing.assert_allclose(item.array, 0.75 * tone(16_000), atol=1e-4)
    assert item.converted == [("stereo", "2 channels")]


def test_other_rates_and_lengths_are_said():
    item = heard(tone(8000, 2.5), 8000)
    assert item.array.shape == (16_000,)
    inside = slice(1000, 15_000)
    np.testing.assert_allclose(item.array[inside], tone(16_000, 1.0)[inside], atol=0.01)
    assert item.converted == [("other sample rate", "8,000 Hz")]
    assert item.notes == [("over-long", "2.5 s; the first 1 s are heard")]


@pytest.mark.parametrize("samples", [np.zeros(9, np.int64), np.zeros(9, bool), np.zeros((2, 2, 9))])
def test_what_is_no_recording_is_refused(samples):
    with pytest.raises(BadFileError, match="it: .* is no recording"):
        wave_file(samples, 16_000, "it")


def test_samples_that_are_not_finite_and_short_ones_are_refused():
    for samples, message in ((np.full(900, np.nan), "not numbers"), (tone(16_000)[:399], "399")):
        with pytest.raises(BadFileError, match=message):
            heard(samples)


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.01])
def test_silence_around_the_sound_is_cut_but_for_a_tenth_of_a_second(noise):
    """Noise of a room, 32 to 42 dB below the tone, is silence as well; a soft middle is kept."""
    rng = np.random.default_rng(0)
    sound = np.concatenate([tone(16_000, 0.2), 0.002 * tone(16_000, 0.2), tone(16_000, 0.2)])
    samples = np.concatenate([np.zeros(8000), sound, np.zeros(16_000)])
    samples += noise * rng.standard_normal(len(samples))
    item = heard(samples)
    assert item.start == pytest.approx(0.4, abs=0.03)
    assert len(item.array) == pytest.approx(len(sound) + 3200, abs=800)
    first = round(16_000 * item.start)
    np.testing.assert_allclose(item.array, samples[first : first + len(item.array)], atol=1e-4)
    assert item.notes == [("silence cut", "0.4 s before and 0.9 s after the sound")]
    assert item.metadata["seconds"] == 2.1
    whole = read_item(DATA, "speech", wave_file(samples, 16_000, "it"), "it", cut_silence=False)
    assert len(whole.array) == 16_000 and whole.start == 0


@pytest.mark.parametrize(
    "samples", [tone(16_000), np.zeros(8000), np.full(8000, 0.3), tone(16_000, 0.03)]
)
def test_where_there_is_no_silence_around_or_nothing_else_all_is_kept(samples):
    item = heard(samples)
    assert len(item.array) == len(samples)
    assert "silence cut" not in dict(item.notes)
