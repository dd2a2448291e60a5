"""Published networks against their PyTorch implementations in transformers, from the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from c2f_jax.data.images import decode_image
from c2f_jax.models import create_tower
from c2f_jax.models.wav2vec2 import normalise_waveform
from c2f_jax.pretrained.architectures import describe
from c2f_jax.pretrained.names import convert_tensors, find_layout
from c2f_jax.pretrained.weights import tower_shapes

torch = pytest.importorskip("torch", reason="the parity tests need the extra `parity` (torch, transformers)")
transformers = pytest.importorskip("transformers", reason="the parity tests need the extra `parity`")

TOLERANCE = 1e-4
TINY_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LARGE_KIND = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
LARGE = LARGE_KIND | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
TINY_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
    "image_size": 32,
}
TINY_QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
    "vocab_size": 50,
}
TINY_BLIP2 = {"vision_config": TINY_VISION, "qformer_config": TINY_QFORMER, "num_query_tokens": 5}


def reference(model, seed=0):
    """The PyTorch model in evaluation mode, every parameter moved from its initial value, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ours(model, processor=None, **changes):
    """Our network with the weights of a PyTorch model: (module, parameters)."""
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    layout, prefix = find_layout(tensors)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    tower, preprocessing = describe(layout, tensors, prefix, config, processor or {}, {}, False)
    params = convert_tensors(layout, prefix, tensors, tower_shapes(tower, preprocessing))
    return create_tower(tower | changes), params


def assert_close(found, expected, tolerance=TOLERANCE):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def assert_hidden_states_agree(found, expected, until=None):
    """All hidden states; ``until`` bounds the compared time steps of each example."""
    assert len(found) == len(expected)
    for ours_, theirs in zip(found, expected, strict=True):
        for row in range(len(ours_)):
            stop = None if until is None else int(until[row])
            assert_close(ours_[row, :stop], theirs[row, :stop])


def waveforms(*lengths, size=None, seed=0):
    rng, wave = np.random.default_rng(seed), np.zeros((len(lengths), size or max(lengths)), np.float32)
    for row, length in enumerate(lengths):
        wave[row, :length] = 0.3 * rng.normal(size=length) + 0.05
    return wave, np.array(lengths, np.int32)


def images(side, count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def pixels(image, module):
    """What the reference processors make of an image that has the right size already."""
    vision = getattr(module, "vision", module)
    x = (image / 255.0 - np.array(vision.mean)) / np.array(vision.std)
    return torch.from_numpy(x.astype(np.float32).transpose(0, 3, 1, 2))


def hubert(**values):
    return reference(transformers.HubertModel(transformers.HubertConfig(**values, attn_implementation="eager")))


def wav2vec2(**values):
    return reference(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**values, attn_implementation="eager")))


SPEECH = [
    pytest.param(hubert, TINY_SPEECH, id="hubert-tiny"),
    pytest.param(hubert, TINY_SPEECH | LARGE_KIND, id="hubert-tiny-large-kind"),
    pytest.param(wav2vec2, TINY_SPEECH, id="wav2vec2-tiny"),
    pytest.param(hubert, {}, id="hubert-base"),
    pytest.param(hubert, LARGE, id="hubert-large", marks=pytest.mark.heavy),
    pytest.param(wav2vec2, LARGE, id="wav2vec2-large", marks=pytest.mark.heavy),
]


@pytest.mark.parametrize("make, values", SPEECH)
def test_wav2vec2_unpadded(make, values):
    model = make(**values)
    module, params = ours(model)
    wave, lengths = waveforms(6000, 6000)
    with torch.no_grad():
        expected = model(torch.from_numpy(wave), output_hidden_states=True)
    tokens, frames, hidden = jax.jit(module.apply)({"params": params}, wave, lengths)
    assert frames.tolist() == [(6000 - 400) // 320 + 1] * 2
    assert_close(tokens, expected.last_hidden_state)
    # transformers 5 gives the last hidden state of pre-norm models without their final norm, earlier versions with it.
    last = len(hidden) - module.pre_norm
    assert_hidden_states_agree(hidden[:last], expected.hidden_states[:last])


@pytest.mark.parametrize("kind", [{}, LARGE_KIND], ids=["group-norm", "layer-norm"])
def test_wav2vec2_padded(kind):
    # With a group norm the reference counts the padding as audio, which masked_norm=False repeats.
    model = hubert(**TINY_SPEECH, **kind)
    module, params = ours(model, masked_norm=False)
    wave, lengths = waveforms(6000, 4100, size=7000)
    mask = torch.from_numpy((np.arange(7000) < lengths[:, None]).astype(np.int64))
    with torch.no_grad():
        expected = model(torch.from_numpy(wave), attention_mask=mask, output_hidden_states=True)
    tokens, frames, hidden = jax.jit(module.apply)({"params": params}, wave, lengths)
    assert_hidden_states_agree(hidden[:-1], expected.hidden_states[:-1], until=frames)
    assert_hidden_states_agree([tokens], [expected.last_hidden_state], until=frames)


def test_masked_norm_makes_features_independent_of_the_padding():
    model = hubert(**TINY_SPEECH)
    module, params = ours(model)
    apply = jax.jit(module.apply)
    wave, lengths = waveforms(6000, 9000, size=9333)
    padded, frames, _ = apply({"params": params}, wave, lengths)
    with torch.no_grad():
        expected = model(torch.from_numpy(wave[:1, :6000])).last_hidden_state
    assert_close(padded[:1, : frames[0]], expected)
    alone, _, _ = apply({"params": params}, wave[:1, :6000], lengths[:1])
    np.testing.assert_allclose(padded[0, : frames[0]], alone[0], atol=1e-5)
    as_published, _, _ = jax.jit(module.clone(masked_norm=False).apply)({"params": params}, wave, lengths)
    assert np.abs(as_published[0, : frames[0]] - alone[0]).max() > 1e-3, "the reference does depend on it"


@pytest.mark.parametrize("kind", [{}, LARGE_KIND], ids=["group-norm", "layer-norm"])
def test_wav2vec2_gradients(kind):
    model = hubert(**TINY_SPEECH, **kind, mask_time_prob=0.05)
    module, params = ours(model)
    wave, lengths = waveforms(4000, 4000)
    weights = np.random.default_rng(1).normal(size=(2, 12, 32)).astype(np.float32)
    given = torch.from_numpy(wave).requires_grad_()
    (model(given).last_hidden_state * torch.from_numpy(weights)).sum().backward()

    def loss(params, wave):
        return jnp.sum(module.apply({"params": params}, wave, lengths)[0] * weights)

    grads, wave_grad = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, wave)
    assert_close(wave_grad, given.grad, 1e-3)
    for ours_, theirs in (
        (grads["conv"]["conv_0"]["kernel"], model.feature_extractor.conv_layers[0].conv.weight.grad.permute(2, 1, 0)),
        (
            grads["transformer"]["block_0"]["mlp_in"]["kernel"],
            model.encoder.layers[0].feed_forward.intermediate_dense.weight.grad.T,
        ),
        (
            grads["transformer"]["block_1"]["self_attention"]["query"]["kernel"].reshape(32, 32),
            model.encoder.layers[1].attention.q_proj.weight.grad.T,
        ),
    ):
        assert_close(ours_ / np.abs(ours_).max(), theirs / np.abs(ours_).max())


WHISPERS = [
    pytest.param({"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}, id="tiny"),
    pytest.param(
        {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}, id="base"
    ),
]


def whisper(**values):
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(**values, decoder_layers=1, attn_implementation="eager")
    model = reference(WhisperEncoder(config))
    return model, {f"model.encoder.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("values", WHISPERS)
def test_whisper_padded_to_30_seconds_as_published(values):
    model, tensors = whisper(**values)
    tensors = {name: value.numpy() for name, value in tensors.items()}
    layout, prefix = find_layout(tensors)
    tower, preprocessing = describe(layout, tensors, prefix, model.config.to_dict(), {}, {})
    params = convert_tensors(layout, prefix, tensors, tower_shapes(tower, preprocessing))
    wave, lengths = waveforms(20_000, 12_345)
    extractor = transformers.WhisperFeatureExtractor()
    features = extractor([wave[0], wave[1, :12_345]], sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        expected = model(features, output_hidden_states=True)
    _, frames, hidden = jax.jit(create_tower(tower | {"pad": True}).apply)({"params": params}, wave, lengths)
    assert frames.tolist() == [63, 39]
    assert_hidden_states_agree(hidden, expected.hidden_states)

    # Cut to their length: the same up to the transformer, whatever the padding.
    cut, frames, _ = jax.jit(create_tower(tower).apply)({"params": params}, wave, lengths)
    alone, _, layers = jax.jit(create_tower(tower).apply)({"params": params}, wave[1:, :12_345], lengths[1:])
    np.testing.assert_allclose(layers[0][0, :39], hidden[0][1, :39], atol=1e-5)
    np.testing.assert_allclose(cut[1, :39], alone[0, :39], atol=1e-5)


def vision(name, values):
    kinds = {
        "clip": (transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig),
        "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
        "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config),
    }
    model, config = kinds[name]
    return reference(model(config(**values, attn_implementation="eager")))


VISION = [
    pytest.param("clip", TINY_VISION | {"projection_dim": 24}, id="clip-tiny"),
    pytest.param("siglip", TINY_VISION, id="siglip-tiny"),
    pytest.param("dinov2", TINY_VISION | {"mlp_ratio": 2}, id="dinov2-tiny"),
    pytest.param("clip", {}, id="clip-vit-b-32"),
    pytest.param("clip", {"patch_size": 16}, id="clip-vit-b-16", marks=pytest.mark.heavy),
    pytest.param("siglip", {}, id="siglip-base", marks=pytest.mark.heavy),
    pytest.param("dinov2", {"image_size": 224}, id="dinov2-base", marks=pytest.mark.heavy),
    pytest.param(
        "clip",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 14,
            "projection_dim": 768,
        },
        id="clip-vit-l-14",
        marks=pytest.mark.heavy,
    ),
]


@pytest.mark.parametrize("name, values", VISION)
def test_vision_transformers(name, values):
    model = vision(name, values)
    module, params = ours(model)
    bare = module.clone(projection=0)
    image = images(model.config.image_size)
    with torch.no_grad():
        expected = model(pixels(image, module), output_hidden_states=True)
    tokens, lengths, hidden = jax.jit(bare.apply)({"params": params}, image)
    patches = (model.config.image_size // model.config.patch_size) ** 2
    assert lengths.tolist() == [patches + 1] * 2
    assert_hidden_states_agree(hidden[:-1], expected.hidden_states[:-1])
    if name == "clip":
        with torch.no_grad():
            assert_close(hidden[-1], model.vision_model.post_layernorm(expected.hidden_states[-1]))
        projected, _, _ = jax.jit(module.apply)({"params": params}, image)
        assert_close(projected[:, 0], expected.image_embeds)
    elif name == "siglip":
        assert_close(tokens[:, 0], expected.pooler_output)
        assert_close(tokens[:, 1:], expected.last_hidden_state)
    else:
        assert_close(tokens, expected.last_hidden_state)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_vision_gradients(name):
    model = vision(name, TINY_VISION)
    module, params = ours(model, projection=0)
    image = images(32)
    model(pixels(image, module)).last_hidden_state.square().sum().backward()
    apply = lambda p: module.apply({"params": p}, image)[0]  # noqa: E731
    (patch_grads,) = (
        parameter.grad.permute(2, 3, 1, 0).reshape(-1, 32)
        for path, parameter in model.named_parameters()
        if path.endswith(("patch_embedding.weight", "patch_embeddings.projection.weight"))
    )

    def loss(params):
        if name == "clip":  # its last_hidden_state is before the last norm
            _, state = module.apply({"params": params}, image, capture_intermediates=lambda m, _: m.name == "block_1")
            (last,) = state["intermediates"]["transformer"]["block_1"]["__call__"]
            return jnp.sum(jnp.square(last))
        return jnp.sum(jnp.square(apply(params)[:, int(module.pooling_head) :]))

    found = jax.jit(jax.grad(loss))(params)["patch_embedding"]["kernel"]
    scale = float(np.abs(found).max())
    assert scale > 0
    assert_close(found / scale, patch_grads / scale)


def blip2(values):
    config = transformers.Blip2Config(**values)
    config._attn_implementation = "eager"
    return reference(transformers.Blip2ForImageTextRetrieval(config))


BLIP2 = [
    pytest.param(TINY_BLIP2 | {"image_text_hidden_size": 24}, id="tiny"),
    pytest.param({"vision_config": TINY_VISION, "qformer_config": {"encoder_hidden_size": 32}}, id="q-former-base"),
    pytest.param({}, id="vit-g", marks=pytest.mark.heavy),
]


@pytest.mark.parametrize("values", BLIP2)
def test_blip2(values):
    model = blip2(values)
    module, params = ours(model)
    image = images(model.config.vision_config.image_size)
    with torch.no_grad():
        vision_out = model.vision_model(pixels(image, module), output_hidden_states=True)
        queries = model.query_tokens.expand(2, -1, -1)
        qformer = model.qformer(
            query_embeds=queries, encoder_hidden_states=vision_out.last_hidden_state, output_hidden_states=True
        )
        expected = model.vision_projection(qformer.last_hidden_state)
    tokens, lengths, hidden = jax.jit(module.clone(projection=0).apply)({"params": params}, image)
    assert lengths.tolist() == [model.config.num_query_tokens] * 2
    assert_hidden_states_agree(hidden, qformer.hidden_states)
    vision_tokens, _, vision_hidden = jax.jit(module.vision.apply)({"params": params["vision"]}, image)
    assert_close(vision_tokens, vision_out.last_hidden_state)
    assert_hidden_states_agree(vision_hidden[:-1], vision_out.hidden_states[:-1])
    projected, _, _ = jax.jit(module.apply)({"params": params}, image)
    assert_close(projected, expected)


def test_waveform_normalisation_matches_the_reference_processor():
    wave, lengths = waveforms(5000, 3210)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor(
        [wave[0], wave[1, :3210]], sampling_rate=16_000, padding=True, return_tensors="np"
    ).input_values
    np.testing.assert_allclose(normalise_waveform(wave, lengths), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(320, 240), (200, 331)])
@pytest.mark.parametrize("name", ["CLIPImageProcessorPil", "SiglipImageProcessorPil", "BlipImageProcessorPil"])
def test_image_preprocessing_from_jpeg_to_tensor(tmp_path, name, size):
    processor = getattr(transformers, name)()
    side = processor.size.get("shortest_edge") or processor.size["height"]
    rng = np.random.default_rng(sum(size))
    picture = Image.fromarray(rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    picture.save(tmp_path / "picture.jpg", quality=90)
    expected = processor(Image.open(tmp_path / "picture.jpg"), return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    resize = "short_side" if "shortest_edge" in processor.size else "squash"
    image = decode_image(str(tmp_path / "picture.jpg"), side, resize=resize)
    mean, std = (np.array(getattr(processor, value)) for value in ("image_mean", "image_std"))
    assert np.abs(image / 255.0 - (expected * std + mean)).max() < 1 / 255 + 1e-6
