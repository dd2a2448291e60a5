"""Recordings and pictures as the networks get them, from file to tensor, against the processors of
transformers."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from c2f_jax.decoding.audio import decode_audio
from c2f_jax.decoding.images import decode_image
from c2f_jax.models.networks.wav2vec2 import normalize_waveform
from c2f_jax.pretrained.families import blip2, clip, dinov2, siglip
from c2f_jax.pretrained.published_files import describe
from c2f_jax.pretrained.tensor_names import Published

pytest.importorskip(
    "torch", reason="the parity tests need the extra `parity` (torch, transformers)"
)
transformers = pytest.importorskip(
    "transformers", reason="the parity tests need the extra `parity`"
)


def test_waveform_normalization_matches_the_reference_processor():
    rng, lengths = np.random.default_rng(0), np.array([5000, 3210], np.int32)
    wave = (0.3 * rng.normal(size=(2, 5000)) + 0.05).astype(np.float32) * (
        np.arange(5000) < lengths[:, None]
    )
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor(
        [wave[0], wave[1, :3210]], sampling_rate=16_000, padding=True, return_tensors="np"
    ).input_values
    np.testing.assert_allclose(normalize_waveform(wave, lengths), expected, atol=1e-5)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_matches_the_reference(tmp_path, rate):
    from transformers.audio_utils import load_audio

    wave = 0.1 * np.random.default_rng(rate).normal(size=(rate // 2 + 7, 2))
    soundfile.write(tmp_path / "recording.wav", wave, rate)
    expected = load_audio(
        str(tmp_path / "recording.wav"), sampling_rate=16_000, backend="soundfile"
    )
    found = decode_audio(str(tmp_path / "recording.wav"))
    assert abs(len(found) - len(expected)) <= 1  # the reference rounds the length up
    size = min(len(found), len(expected))
    np.testing.assert_allclose(found[:size], expected[:size], atol=1e-5)


PROCESSORS = [
    pytest.param("CLIPImageProcessorPil", {}, clip.HUGGING_FACE, id="clip"),
    pytest.param("SiglipImageProcessorPil", {}, siglip.HUGGING_FACE, id="siglip"),
    pytest.param(
        "BlipImageProcessorPil",
        {"size": {"height": 224, "width": 224}},
        blip2.HUGGING_FACE,
        id="blip2",
    ),
    pytest.param(
        "BitImageProcessorPil",
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "image_mean": dinov2.IMAGENET_MEAN,
            "image_std": dinov2.IMAGENET_STD,
        },
        dinov2.HUGGING_FACE,
        id="dinov2",
    ),
]


@pytest.mark.parametrize("size", [(320, 240), (200, 331), (640, 427)])
@pytest.mark.parametrize("name, values, layout", PROCESSORS)
def test_image_preprocessing_from_jpeg_to_tensor(tmp_path, name, values, layout, size):
    # As published: the processor's file decides, by way of the card's values, what the network
    # sees.
    processor = getattr(transformers, name)(**values)
    published = json.loads(processor.to_json_string())
    config = {"vision_config": {"image_size": 224}}
    _, how = describe(layout, Published({}, config=config, processor=published))
    rng = np.random.default_rng(sum(size))
    picture = Image.fromarray(rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    picture.save(tmp_path / "picture.jpg", quality=90)
    expected = (
        processor(Image.open(tmp_path / "picture.jpg"), return_tensors="np")
        .pixel_values[0]
        .transpose(1, 2, 0)
    )
    image = decode_image(
        str(tmp_path / "picture.jpg"),
        how["image_size"],
        resize=how["resize"],
        resize_side=how["resize_side"],
    )
    mean, std = np.array(how["mean"]), np.array(how["std"])
    assert image.shape == expected.shape == (224, 224, 3)
    assert np.abs(image / 255.0 - (expected * std + mean)).max() < 1 / 255 + 1e-6
