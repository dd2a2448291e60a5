"""Decoding: every odd but legal file gives the expected array, every bad one an error that names
it."""

import io

import numpy as np
import pytest
import soundfile

from c2f_jax.decoding.audio import decode_audio
from c2f_jax.errors import UserError


def tone(rate, seconds=0.5, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def encode(wave, rate, kind="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind, subtype, tolerance",
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 1e-7),
        ("FLAC", "PCM_16", 1e-4),
        ("WAV", "ULAW", 0.03),
    ],
)
def test_samples_come_back(kind, subtype, tolerance):
    wave = decode_audio(encode(tone(16_000), 16_000, kind, subtype))
    assert wave.dtype == np.float32 and wave.flags.c_contiguous
    np.testing.assert_allclose(wave, tone(16_000), atol=tolerance)


@pytest.mark.parametrize(
    "kind, subtype", [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]
)
def test_compressed_speech_formats(kind, subtype):
    wave = decode_audio(encode(tone(16_000), 16_000, kind, subtype))
    middle = wave[2000:6000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(np.argmax(spectrum) * 16_000 / len(middle) - 440) < 5
    assert abs(len(wave) - 8000) < 2400


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_converted(rate):
    wave = decode_audio(encode(tone(rate), rate, subtype="FLOAT"))
    assert abs(len(wave) - 8000) <= 1
    np.testing.assert_allclose(wave[800:7200], tone(16_000)[800:7200], atol=2e-3)
    assert len(decode_audio(encode(tone(rate), rate), sample_rate=rate)) == int(rate * 0.5)


def test_channels_are_averaged():
    left, right = tone(16_000), 0.1 * tone(16_000, hertz=900)
    wave = decode_audio(encode(np.stack([left, right], 1), 16_000, subtype="FLOAT"))
    np.testing.assert_allclose(wave, (left + right) / 2, atol=1e-6)


def test_audio_from_a_path(tmp_path):
    path = tmp_path / "жаба.wav"
    path.write_bytes(encode(tone(16_000), 16_000))
    np.testing.assert_array_equal(decode_audio(str(path)), decode_audio(path.read_bytes()))


def broken_audio():
    nan = tone(16_000)
    nan[7] = np.nan
    flac = encode(np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000, "FLAC")
    return {
        "text": (b"this is not audio at all", "not readable audio"),
        "nothing": (b"", "empty"),
        "header only": (encode(np.zeros(0), 16_000), "empty"),
        "nan": (encode(nan, 16_000, subtype="FLOAT"), "not numbers"),
        "cut off": (flac[: len(flac) // 2], "cut off|not readable audio"),
    }


@pytest.mark.parametrize("kind", list(broken_audio()))
def test_broken_audio_names_the_item(kind, tmp_path):
    data, reason = broken_audio()[kind]
    with pytest.raises(UserError, match=f"clip 7.*({reason})"):
        decode_audio(data, name="clip 7")
    path = tmp_path / "broken.wav"
    path.write_bytes(data)
    with pytest.raises(UserError, match="broken.wav"):
        decode_audio(str(path))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="gone.wav: cannot be read.*No such file"):
        decode_audio(str(tmp_path / "gone.wav"))
