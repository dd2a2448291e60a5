"""Published speech networks against their PyTorch implementations in transformers, from the same
random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parity import (
    LARGE_KIND,
    TINY_SPEECH,
    TINY_WAVLM,
    TOLERANCE,
    assert_close,
    assert_gradients_agree,
    assert_hidden_states_agree,
    ours,
    reference,
    speech,
    torch,
    transformers,
    waveforms,
)

from c2f_jax.models.layers import relative_buckets
from c2f_jax.models.networks.whisper import whisper_log_mel

LARGE = LARGE_KIND | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
XLARGE = LARGE | {"hidden_size": 1280, "num_hidden_layers": 48, "intermediate_size": 5120}
SPEECH_KINDS = [
    pytest.param("hubert", TINY_SPEECH, id="hubert-tiny"),
    pytest.param("hubert", TINY_SPEECH | LARGE_KIND, id="hubert-tiny-large-kind"),
    pytest.param("wav2vec2", TINY_SPEECH, id="wav2vec2-tiny"),
    pytest.param("wavlm", TINY_WAVLM, id="wavlm-tiny"),
    # WavLM large has no biases in its convolutions.
    pytest.param(
        "wavlm", TINY_WAVLM | LARGE_KIND | {"conv_bias": False}, id="wavlm-tiny-large-kind"
    ),
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
    # 48 residuals add up to entries beyond 20; float32 alone is 1.0e-4 away from PyTorch in float64
    # there.
    tolerance = 2e-4 if values == XLARGE else TOLERANCE
    # transformers 5 gives the last hidden state of pre-norm models without their final norm,
    # earlier versions with it.
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
    as_published, _, _ = jax.jit(module.clone(masked_norm=False).apply)(
        {"params": params}, wave, lengths
    )
    assert np.abs(as_published[0, : frames[0]] - alone[0]).max() > 1e-3, (
        "the reference does depend on it"
    )


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
    "tiny": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
    },
    "published-tiny": {
        "d_model": 384,
        "encoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
    },
    "base": {
        "d_model": 512,
        "encoder_layers": 6,
        "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
    },
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

    config = transformers.WhisperConfig(
        **WHISPERS[name], decoder_layers=1, attn_implementation="eager"
    )
    return reference(WhisperEncoder, config)


def whisper_features(model, *waves):
    extractor = transformers.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    return extractor(list(waves), sampling_rate=16_000, return_tensors="pt").input_features


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "published-tiny",
        *(pytest.param(n, marks=pytest.mark.heavy) for n in ("base", "large-v3")),
    ],
)
def test_whisper_padded_to_30_seconds_as_published(name):
    model = whisper(name)
    module, params = ours(model)
    wave, lengths = waveforms(20_000, 12_345)
    with torch.no_grad():
        expected = model(
            whisper_features(model, wave[0], wave[1, :12_345]), output_hidden_states=True
        )
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

    def output(module, params):
        return module.clone(pad=True).apply({"params": params}, wave, lengths)[0]

    assert_gradients_agree(model, expected, output)
