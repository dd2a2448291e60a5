"""Published networks against their PyTorch implementations in transformers, from the same random weights."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from c2f_jax.models import create_tower
from c2f_jax.models.layers import relative_buckets
from c2f_jax.models.vision import resize_positions
from c2f_jax.models.whisper import whisper_log_mel
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
XLARGE = LARGE | {"hidden_size": 1280, "num_hidden_layers": 48, "intermediate_size": 5120}
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


def tensors_of(model, gradients=False):
    """Parameters of a PyTorch model, or their gradients, under their published names."""
    names = "model.encoder." if type(model).__name__ == "WhisperEncoder" else ""
    if not gradients:
        return {names + name: value.numpy() for name, value in model.state_dict().items()}
    return {
        names + name: (torch.zeros_like(value) if value.grad is None else value.grad).numpy()
        for name, value in model.named_parameters()
    }


def ours(model, gradients=False, **changes):
    """Our network with the weights of a PyTorch model, or with their gradients in their place: (module, parameters)."""
    tensors = tensors_of(model, gradients)
    layout, prefix = find_layout(tensors)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    tower, preprocessing = describe(layout, tensors, prefix, config, {}, {}, False)
    params = convert_tensors(layout, prefix, tensors, tower_shapes(tower, preprocessing))
    return create_tower(tower | changes), params


def assert_gradients_agree(model, expected, output, seed=1):
    """Gradients of every parameter, of a random linear form of ``expected`` (PyTorch) and ``output(module, params)``.

    The error is relative to the largest entry of the parameter's gradient, or, of one that nearly vanishes, such as
    that of the keys' biases, to a thousandth of the largest of all.
    """
    module, params = ours(model)
    weights = np.random.default_rng(seed).normal(size=expected.shape).astype(np.float32)
    model.zero_grad()
    (expected * torch.from_numpy(weights)).sum().backward()
    theirs = ours(model, gradients=True)[1]
    found = jax.jit(jax.grad(lambda p: jnp.sum(output(module, p) * weights)))(params)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs))
    assert largest > 0
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest), found, theirs)
    report("gradients", max(jax.tree.leaves(errors)))
    assert max(jax.tree.leaves(errors)) < 1e-3, errors


def report(what, error):
    """The largest errors, shown by ``pytest -s``."""
    print(f"{os.environ.get('PYTEST_CURRENT_TEST', '').partition('::')[2]} {what}: {error:.1e}")


def assert_close(found, expected, tolerance=TOLERANCE):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    report("error", np.abs(found - expected).max(initial=0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def assert_hidden_states_agree(found, expected, until=None, tolerance=TOLERANCE):
    """All hidden states; ``until`` bounds the compared time steps of each example."""
    assert len(found) == len(expected)
    for ours_, theirs in zip(found, expected, strict=True):
        for row in range(len(ours_)):
            stop = None if until is None else int(until[row])
            assert_close(ours_[row, :stop], theirs[row, :stop], tolerance)


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


def speech(name, **values):
    kinds = {
        "hubert": (transformers.HubertModel, transformers.HubertConfig),
        "wav2vec2": (transformers.Wav2Vec2Model, transformers.Wav2Vec2Config),
        "wavlm": (transformers.WavLMModel, transformers.WavLMConfig),
    }
    model, config = kinds[name]
    config = config(**values)
    config._attn_implementation = "eager"
    return reference(model(config))


TINY_WAVLM = TINY_SPEECH | {"num_buckets": 8, "max_bucket_distance": 12}
SPEECH_KINDS = [
    pytest.param("hubert", TINY_SPEECH, id="hubert-tiny"),
    pytest.param("hubert", TINY_SPEECH | LARGE_KIND, id="hubert-tiny-large-kind"),
    pytest.param("wav2vec2", TINY_SPEECH, id="wav2vec2-tiny"),
    pytest.param("wavlm", TINY_WAVLM, id="wavlm-tiny"),
    # WavLM large has no biases in its convolutions.
    pytest.param("wavlm", TINY_WAVLM | LARGE_KIND | {"conv_bias": False}, id="wavlm-tiny-large-kind"),
]
BASE_SPEECH = [
    pytest.param("hubert", {}, id="hubert-base", marks=pytest.mark.heavy),
    pytest.param("wavlm", {}, id="wavlm-base", marks=pytest.mark.heavy),
]
SPEECH = [
    *SPEECH_KINDS,
    pytest.param("hubert", {}, id="hubert-base"),
    pytest.param("wavlm", {}, id="wavlm-base"),
    pytest.param("wav2vec2", {}, id="wav2vec2-base", marks=pytest.mark.heavy),
    pytest.param("hubert", LARGE, id="hubert-large", marks=pytest.mark.heavy),
    pytest.param("wav2vec2", LARGE, id="wav2vec2-large", marks=pytest.mark.heavy),
    pytest.param("wavlm", LARGE | {"conv_bias": False}, id="wavlm-large", marks=pytest.mark.heavy),
    pytest.param("hubert", XLARGE, id="hubert-x-large", marks=pytest.mark.heavy),
]


@pytest.mark.parametrize("name, values", SPEECH)
def test_wav2vec2_unpadded(name, values):
    model = speech(name, **values)
    module, params = ours(model)
    wave, lengths = waveforms(6000, 6000)
    with torch.no_grad():
        expected = model(torch.from_numpy(wave), output_hidden_states=True)
    tokens, frames, hidden = jax.jit(module.apply)({"params": params}, wave, lengths)
    assert frames.tolist() == [(6000 - 400) // 320 + 1] * 2
    assert_close(tokens, expected.last_hidden_state)
    # 48 residuals add up to entries beyond 20; float32 alone is 1.0e-4 away from PyTorch in float64 there.
    tolerance = 2e-4 if values == XLARGE else TOLERANCE
    # transformers 5 gives the last hidden state of pre-norm models without their final norm, earlier versions with it.
    last = len(hidden) - module.pre_norm
    assert_hidden_states_agree(hidden[:last], expected.hidden_states[:last], tolerance=tolerance)


def padded_waveforms():
    wave, lengths = waveforms(6000, 4100, size=7000)
    return wave, lengths, torch.from_numpy((np.arange(7000) < lengths[:, None]).astype(np.int64))


@pytest.mark.parametrize("name, values", [*SPEECH_KINDS, *BASE_SPEECH])
def test_wav2vec2_padded(name, values):
    # With a group norm the reference counts the padding as audio, which masked_norm=False repeats.
    model = speech(name, **values)
    module, params = ours(model, masked_norm=False)
    wave, lengths, mask = padded_waveforms()
    with torch.no_grad():
        expected = model(torch.from_numpy(wave), attention_mask=mask, output_hidden_states=True)
    tokens, frames, hidden = jax.jit(module.apply)({"params": params}, wave, lengths)
    assert_hidden_states_agree(hidden[:-1], expected.hidden_states[:-1], until=frames)
    assert_hidden_states_agree([tokens], [expected.last_hidden_state], until=frames)


def test_relative_positions_fall_into_the_rows_of_the_reference():
    # At 30 s, where the distances reach the last row.
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    relative = torch.arange(1500)[None] - torch.arange(1500)[:, None]
    expected = WavLMAttention(16, 2)._relative_positions_bucket(relative)
    np.testing.assert_array_equal(relative_buckets(1500, 320, 800), expected)


def test_masked_norm_makes_features_independent_of_the_padding():
    model = speech("hubert", **TINY_SPEECH)
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


def without_weight_norm(model):
    """The position convolution with its weight as one parameter, as we have it."""
    torch.nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    return model


@pytest.mark.parametrize("name, values", [*SPEECH_KINDS, *BASE_SPEECH])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_wav2vec2_gradients(name, values, padded):
    model = without_weight_norm(speech(name, **values))
    wave, lengths, mask = padded_waveforms() if padded else (*waveforms(6000, 6000), None)
    tokens = model(torch.from_numpy(wave), attention_mask=mask).last_hidden_state
    frames = (lengths - 400) // 320 + 1
    valid = (np.arange(tokens.shape[1]) < frames[:, None])[..., None].astype(np.float32)

    def output(module, params):
        return module.clone(masked_norm=False).apply({"params": params}, wave, lengths)[0] * valid

    assert_gradients_agree(model, tokens * torch.from_numpy(valid), output)


def test_wav2vec2_gradient_of_the_waveform():
    model = speech("hubert", **TINY_SPEECH)
    module, params = ours(model)
    wave, lengths = waveforms(4000, 4000)
    given = torch.from_numpy(wave).requires_grad_()
    model(given).last_hidden_state[..., 0].sum().backward()
    loss = lambda wave: jnp.sum(module.apply({"params": params}, wave, lengths)[0][..., 0])  # noqa: E731
    found, scale = jax.jit(jax.grad(loss))(wave), float(given.grad.abs().max())
    assert_close(found / scale, given.grad / scale)


WHISPERS = {
    "tiny": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48},
    "published-tiny": {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536},
    "base": {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048},
    "large-v3": {
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
    },
}


def whisper(name):
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(**WHISPERS[name], decoder_layers=1, attn_implementation="eager")
    return reference(WhisperEncoder(config))


def whisper_features(model, *waves):
    extractor = transformers.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    return extractor(list(waves), sampling_rate=16_000, return_tensors="pt").input_features


@pytest.mark.parametrize(
    "name", ["tiny", "published-tiny", *(pytest.param(n, marks=pytest.mark.heavy) for n in ("base", "large-v3"))]
)
def test_whisper_padded_to_30_seconds_as_published(name):
    model = whisper(name)
    module, params = ours(model)
    wave, lengths = waveforms(20_000, 12_345)
    with torch.no_grad():
        expected = model(whisper_features(model, wave[0], wave[1, :12_345]), output_hidden_states=True)
    _, frames, hidden = jax.jit(module.clone(pad=True).apply)({"params": params}, wave, lengths)
    assert frames.tolist() == [63, 39]
    assert_hidden_states_agree(hidden, expected.hidden_states)

    # Cut to their length: the same up to the transformer, whatever the padding.
    cut, frames, _ = jax.jit(module.apply)({"params": params}, wave, lengths)
    alone, _, layers = jax.jit(module.apply)({"params": params}, wave[1:, :12_345], lengths[1:])
    np.testing.assert_allclose(layers[0][0, :39], hidden[0][1, :39], atol=1e-5)
    np.testing.assert_allclose(cut[1, :39], alone[0, :39], atol=1e-5)


def test_whisper_spectrogram_without_silence_is_mirrored_at_its_end():
    wave, lengths = waveforms(32_000)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=2)
    expected = extractor(wave[0], sampling_rate=16_000, return_tensors="pt").input_features
    assert_close(whisper_log_mel(wave, lengths, 200), expected.permute(0, 2, 1))


@pytest.mark.parametrize("name", ["tiny", pytest.param("published-tiny", marks=pytest.mark.heavy)])
def test_whisper_gradients(name):
    model = whisper(name)
    model.embed_positions.weight.requires_grad_()  # constant in the reference
    wave, lengths = waveforms(8000, 5000)
    expected = model(whisper_features(model, wave[0], wave[1, :5000])).last_hidden_state
    output = lambda module, params: module.clone(pad=True).apply({"params": params}, wave, lengths)[0]  # noqa: E731
    assert_gradients_agree(model, expected, output)


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


BASE_SIZES = {"clip": {"patch_size": 16}, "siglip": {}, "dinov2": {"image_size": 224}}


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


@pytest.mark.parametrize(
    "name, values",
    [
        *VISION[:3],
        *(pytest.param(name, BASE_SIZES[name], id=f"{name}-base", marks=pytest.mark.heavy) for name in BASE_SIZES),
    ],
)
def test_vision_gradients(name, values):
    model = vision(name, values)
    image = images(model.config.image_size)
    out = model(pixels(image, ours(model)[0]))
    if name == "clip":  # the [CLS] alone is projected
        expected = out.image_embeds[:, None]
    elif name == "siglip":
        expected = torch.cat([out.pooler_output[:, None], out.last_hidden_state], dim=1)
    else:
        expected = out.last_hidden_state
    output = lambda module, params: module.apply({"params": params}, image)[0][:, : expected.shape[1]]  # noqa: E731
    assert_gradients_agree(model, expected, output)


@pytest.mark.parametrize("side", [24, 56])
def test_positions_for_another_resolution_are_interpolated_as_in_the_reference(side):
    model = vision("dinov2", TINY_VISION | {"image_size": 40})
    module, params = ours(model)
    image = images(side)
    with torch.no_grad():
        expected = model(pixels(image, module)).last_hidden_state
    resized = params | {"positions": resize_positions(params["positions"], (side // 8) ** 2 + 1)}
    assert_close(module.apply({"params": resized}, image)[0], expected)


def blip2(values):
    config = transformers.Blip2Config(**values)
    config._attn_implementation = "eager"
    return reference(transformers.Blip2ForImageTextRetrieval(config))


Q_FORMER_BASE = {"vision_config": TINY_VISION, "qformer_config": {"encoder_hidden_size": 32}}
BLIP2 = [
    pytest.param(TINY_BLIP2 | {"image_text_hidden_size": 24}, id="tiny"),
    pytest.param(Q_FORMER_BASE, id="q-former-base"),
    pytest.param({}, id="vit-g", marks=pytest.mark.heavy),
]


def blip2_outputs(model, image, module, **options):
    """The reference's vision side, its Q-Former, and its queries projected into the contrastive (ITC) space."""
    vision_out = model.vision_model(pixels(image, module), **options)
    qformer = model.qformer(
        query_embeds=model.query_tokens.expand(len(image), -1, -1),
        encoder_hidden_states=vision_out.last_hidden_state,
        **options,
    )
    return vision_out, qformer, model.vision_projection(qformer.last_hidden_state)


@pytest.mark.parametrize("values", BLIP2)
def test_blip2(values):
    model = blip2(values)
    module, params = ours(model)
    image = images(model.config.vision_config.image_size)
    with torch.no_grad():
        vision_out, qformer, projected = blip2_outputs(model, image, module, output_hidden_states=True)
    _, lengths, hidden = jax.jit(module.clone(projection=0).apply)({"params": params}, image)
    assert lengths.tolist() == [model.config.num_query_tokens] * 2
    assert_hidden_states_agree(hidden, qformer.hidden_states)
    vision_tokens, _, vision_hidden = jax.jit(module.vision.apply)({"params": params["vision"]}, image)
    assert_close(vision_tokens, vision_out.last_hidden_state)
    assert_hidden_states_agree(vision_hidden[:-1], vision_out.hidden_states[:-1])
    assert_close(jax.jit(module.apply)({"params": params}, image)[0], projected)


@pytest.mark.parametrize("values", [BLIP2[0], pytest.param(Q_FORMER_BASE, id="q-former-base", marks=pytest.mark.heavy)])
def test_blip2_gradients(values):
    model = blip2(values)
    image = images(model.config.vision_config.image_size)
    projected = blip2_outputs(model, image, ours(model)[0])[2]
    assert_gradients_agree(model, projected, lambda module, params: module.apply({"params": params}, image)[0])
