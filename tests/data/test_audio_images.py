"""Decoding: every odd but legal file gives the expected array, every bad one an error that names
it."""

import io

import numpy as np
import pytest
import soundfile
from helpers.memory_source import png
from PIL import Image

from c2f_jax.data.audio import decode_audio
from c2f_jax.data.images import decode_image
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
    with pytest.raises(UserError, match="gone.png: cannot be read.*No such file"):
        decode_image(str(tmp_path / "gone.png"), 8)


RAMP = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_comes_back_exactly():
    decoded = decode_image(png(RAMP), 16)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, RAMP)


@pytest.mark.parametrize("height, width", [(20, 60), (60, 20)])
def test_the_center_square_of_the_resized_image_is_kept(height, width):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    resized = np.asarray(resized).astype(int)
    center = resized[:, 10:20] if width > height else resized[10:20]
    assert abs(decode_image(png(pixels), 10) - center).max() <= 1


def test_reduction_averages_rather_than_skips():
    checks = np.indices((128, 128)).sum(0) % 2 * 255
    decoded = decode_image(png(np.repeat(checks[..., None], 3, 2).astype(np.uint8)), 16)
    assert abs(decoded.astype(int) - 128).max() < 12


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    np.testing.assert_array_equal(decode_image(png(RAMP, exif=exif), 16), np.rot90(RAMP, -1))


def test_gray_palette_one_bit_and_cmyk():
    gray = RAMP[..., 0]
    np.testing.assert_array_equal(decode_image(png(gray), 16), np.repeat(gray[..., None], 3, 2))
    palette = Image.fromarray(RAMP).quantize(16)
    np.testing.assert_array_equal(
        decode_image(png(palette), 16), np.asarray(palette.convert("RGB"))
    )
    bits = Image.fromarray(gray > 127)
    assert set(np.unique(decode_image(png(bits), 16))) == {0, 255}
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    np.testing.assert_allclose(
        decode_image(png(red, "JPEG", quality=95), 8)[4, 4], (255, 0, 0), atol=6
    )


def test_sixteen_bit_gray_keeps_its_tones():
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    decoded = decode_image(png(deep), 16)
    np.testing.assert_allclose(decoded[..., 0], deep / 65535 * 255, atol=0.51)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
    options = {}
    if mode == "P":
        clear = Image.fromarray((np.arange(64).reshape(8, 8) % 8 > 3).astype(np.uint8)).convert("P")
        clear.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
        options["transparency"] = 1
    elif mode == "LA":
        clear = clear.convert("LA")
    decoded = decode_image(png(clear, **options), 8)
    assert (decoded[:, :4] == 0).all() and (decoded[:, 4:] == 255).all()


def test_large_jpegs_decode_to_nearly_the_same_at_reduced_scale():
    y, x = np.mgrid[0:1200, 0:1600] / 1200
    photo = (
        np.stack([255 * x / 1.4, 255 * y, 127 + 100 * np.sin(9 * x)], -1)
        .clip(0, 255)
        .astype(np.uint8)
    )
    whole = Image.fromarray(photo).resize(
        (64, 64), Image.Resampling.BICUBIC, box=(200, 0, 1400, 1200)
    )
    decoded = decode_image(png(photo, "JPEG", quality=95), 64)
    assert abs(decoded.astype(int) - np.asarray(whole).astype(int)).mean() < 1.5


def test_a_thin_strip_does_not_explode():
    assert decode_image(png(np.zeros((1, 20_000, 3), np.uint8)), 224).shape == (224, 224, 3)


def test_broken_images_name_the_item(tmp_path, monkeypatch):
    whole = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for data in (b"", b"not an image", whole[: len(whole) // 2]):
        with pytest.raises(UserError, match="photo 3: (not a readable image|the file is empty)"):
            decode_image(data, 8, name="photo 3")
    path = tmp_path / "bad.png"
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="bad.png: not a readable image"):
        decode_image(str(path), 8)
    monkeypatch.setattr("c2f_jax.data.images.MOST_PIXELS", 1000)
    with pytest.raises(UserError, match="photo 3: 64 x 64 pixels"):
        decode_image(whole, 8, name="photo 3")
