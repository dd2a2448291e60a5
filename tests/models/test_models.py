"""Encoders and the multimodal encoder: shapes, lengths, independence of padding and of the batch,
numpy oracles."""

import functools
import math

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from helpers.rounding import assert_equal_but_for_rounding

from c2f_jax.errors import UserError
from c2f_jax.models import spectrogram
from c2f_jax.models.factory import create_model
from c2f_jax.models.layers import (
    Attention,
    BlockStyle,
    Transformer,
    dense_dot_general,
    dot_product_attention,
    dropout,
)
from c2f_jax.models.log_mel import LogMelSpeechEncoder
from c2f_jax.models.multimodal import MultimodalEncoder
from c2f_jax.models.parameters import momentum_subset
from c2f_jax.models.spectrogram import log_mel
from c2f_jax.models.vit import ViTImageEncoder, patches
from c2f_jax.objectives.keys import Site, fold_keys

TOWER = {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 4.0}
SPEECH = TOWER | {"name": "log_mel", "mels": 8, "hop": 160, "conv_layers": 2}
IMAGE = TOWER | {"name": "vit", "patch": 8, "conv_stem": False, "token_pool": 1}


def noise(seed, *lengths, size=None):
    """Waveforms of these lengths, zero padded to ``size`` or the longest."""
    rng, wave = (
        np.random.default_rng(seed),
        np.zeros((len(lengths), size or max(lengths)), np.float32),
    )
    for row, length in enumerate(lengths):
        wave[row, :length] = rng.normal(size=length) * 0.1
    return wave, np.array(lengths, np.int32)


@pytest.fixture(scope="module")
def tiny():
    """A C2F model, its parameters and a batch of three."""
    model = create_model(SPEECH, IMAGE, TOWER, embedding_dim=6)
    waveform, lengths = noise(0, 8000, 6000, 4321)
    image = np.random.default_rng(1).integers(0, 256, (3, 16, 24, 3)).astype(np.uint8)
    batch = {"waveform": waveform, "speech_lengths": lengths, "image": image}
    return model, jax.jit(model.init)(jax.random.key(0), batch), batch


def test_shapes_types_and_lengths(tiny):
    model, variables, batch = tiny
    speech, image, logits, tau = jax.jit(model.apply)(variables, batch)
    frames = [(samples - 400) // 160 + 1 for samples in batch["speech_lengths"]]
    assert speech.tokens.shape == (3, math.ceil(frames[0] / 4) + 1, 16)
    assert (
        speech.lengths.tolist() == [math.ceil(f / 4) + 1 for f in frames]
        and speech.lengths.dtype == jnp.int32
    )
    assert image.tokens.shape == (3, 2 * 3 + 1, 16) and image.lengths.tolist() == [7, 7, 7]
    for encoded in (speech, image):
        assert encoded.embedding.shape == (3, 6) and encoded.embedding.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(encoded.embedding, axis=1), 1.0, atol=1e-6)
    assert logits.shape == (3, 2) and float(tau) == pytest.approx(0.07)


def test_bfloat16_computes_but_parameters_embeddings_and_logits_are_float32(tiny):
    _, exact_variables, batch = tiny
    model = create_model(SPEECH, IMAGE, TOWER, embedding_dim=6, dtype="bfloat16")
    speech, image, logits, tau = jax.jit(model.apply)(exact_variables, batch)
    assert speech.tokens.dtype == image.tokens.dtype == jnp.bfloat16
    assert {x.dtype for x in (speech.embedding, image.embedding, logits, tau)} == {
        jnp.dtype("float32")
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_log_mel_equals_librosa():
    wave, lengths = noise(2, 5000, 3333)
    features, frames = log_mel(wave, lengths, mels=20, hop=160)
    filters = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=20, dtype=np.float64)
    for row, samples in enumerate(lengths):
        spectrum = librosa.stft(
            wave[row, :samples].astype(np.float64),
            n_fft=400,
            hop_length=160,
            window=np.hanning(400),
            center=False,
        )
        mel = np.log(1e-6 + filters @ np.abs(spectrum) ** 2).T
        expected = (mel - mel.mean(0)) / (mel.std(0) + 0.01)
        assert frames[row] == len(expected)
        np.testing.assert_allclose(features[row, : len(expected)], expected, atol=2e-4)
        assert not np.any(features[row, len(expected) :])


def test_power_spectrum_of_tpus_is_that_of_the_others():
    windows = np.random.default_rng(1).normal(size=(2, 3, 400)).astype(np.float32)
    expected = np.abs(np.fft.rfft(windows.astype(np.float64))) ** 2
    for power in (spectrogram.power_spectrum, spectrogram._power_by_product):
        np.testing.assert_allclose(jax.jit(power)(windows), expected, rtol=1e-4, atol=1e-3)


# Frames of 9000 samples: 54, 27 and 14 after each convolution; the paddings make even and odd
# counts at every stage.
@pytest.mark.parametrize("size", [9000, 9160, 9330, 9480, 9640, 12_345])
def test_log_mel_does_not_depend_on_the_padding(size):
    _, frames = log_mel(*noise(3, 9000))
    padded, padded_frames = log_mel(*noise(3, 9000, 2000, size=size))
    assert padded_frames[0] == frames[0]
    assert_equal_but_for_rounding(
        lambda *inputs: log_mel(*inputs)[0][0], noise(3, 9000), padded[0, : frames[0]]
    )


@pytest.fixture(scope="module")
def speech_encoder():
    encoder = LogMelSpeechEncoder(**TOWER, mels=8, hop=160)
    return jax.jit(encoder.apply), jax.jit(encoder.init)(jax.random.key(1), *noise(3, 9000))


@pytest.mark.parametrize("size", [9160, 9330, 9640, 12_345])
def test_speech_tokens_do_not_depend_on_the_padding(speech_encoder, size):
    apply, variables = speech_encoder
    _, count = apply(variables, *noise(3, 9000))
    padded, counts = apply(variables, *noise(3, 9000, 2000, size=size))
    assert counts[0] == count[0]
    assert_equal_but_for_rounding(
        lambda *inputs: apply(*inputs)[0][0],
        (variables, *noise(3, 9000)),
        padded[0, : count[0]],
    )


def test_match_reads_only_the_valid_tokens(tiny):
    model, variables, batch = tiny
    match = jax.jit(lambda v, s, i: model.apply(v, s, i, method="match"))
    speech = model.apply(
        variables, batch["waveform"], batch["speech_lengths"], method="encode_speech"
    )
    image = model.apply(variables, batch["image"], method="encode_image")
    image = image._replace(lengths=jnp.array([7, 4, 2]))
    scores = match(variables, speech, image)

    def spoil(x):  # other values after each length, and more of them
        tokens = jnp.pad(x.tokens, ((0, 0), (0, 5), (0, 0)))
        valid = jnp.arange(tokens.shape[1])[None] < x.lengths[:, None]
        return x._replace(tokens=jnp.where(valid[:, :, None], tokens, 9.0))

    spoiled = match(variables, spoil(speech), spoil(image))
    assert_equal_but_for_rounding(match, (variables, speech, image), spoiled)
    longer = image._replace(lengths=jnp.array([7, 5, 3]))
    changed = np.abs(match(variables, speech, longer) - scores).max(1) > 1e-6
    assert changed.tolist() == [False, True, True], "only pairs whose own length grew see more"


def test_branches_are_encoders_on_one_trunk_whose_cosines_are_averaged(tiny):
    """Each branch alone is the model without branches that has its parameters."""
    one, _, batch = tiny
    model = create_model(SPEECH, IMAGE, TOWER, embedding_dim=6, branches=3)
    params = model.init(jax.random.key(5), batch)["params"]
    args = {
        "encode_speech": (batch["waveform"], batch["speech_lengths"]),
        "encode_image": (batch["image"],),
    }
    whole = {m: model.apply({"params": params}, *x, method=m) for m, x in args.items()}
    cosines = []
    for branch in range(3):
        ending = f"_{branch}" if branch else ""
        own = dict(params)
        for part in ("speech", "image"):
            encoder = params[f"{part}_encoder"]
            own[f"{part}_encoder"] = encoder | {"transformer": encoder[f"transformer{ending}"]}
            own[f"{part}_projection"] = params[f"{part}_projection{ending}"]
        alone = {m: one.apply({"params": own}, *x, method=m) for m, x in args.items()}
        for name, encoded in alone.items():
            np.testing.assert_allclose(
                np.split(whole[name].tokens, 3, axis=-1)[branch],
                encoded.tokens,
                atol=1e-5,
                err_msg=name,
            )
        cosines.append(alone["encode_speech"].embedding @ alone["encode_image"].embedding.T)
    speech, image = whole["encode_speech"].embedding, whole["encode_image"].embedding
    assert speech.shape == (3, 18) == (3, model.embedding_size)
    np.testing.assert_allclose(speech @ image.T, np.mean(cosines, axis=0), atol=1e-5)
    assert np.std(cosines, axis=0).min() > 1e-4, "branches differ"
    logits = model.apply({"params": params}, *whole.values(), method="match")
    assert logits.shape == (3, 2), "SIM reads the tokens of all branches"


def test_mean_pooling_puts_the_mean_of_the_valid_tokens_first(tiny):
    cls, variables, batch = tiny
    pooled = create_model(
        *(part | {"pooling": "mean"} for part in (SPEECH, IMAGE, TOWER)), embedding_dim=6
    )
    for method, inputs in (
        ("encode_speech", (batch["waveform"], batch["speech_lengths"])),
        ("encode_image", (batch["image"],)),
    ):
        plain, found = (m.apply(variables, *inputs, method=method) for m in (cls, pooled))
        np.testing.assert_array_equal(found.tokens[:, 1:], plain.tokens[:, 1:])
        for row, length in enumerate(plain.lengths):
            mean = np.asarray(plain.tokens[row, :length], np.float64).mean(0)
            # A float32 sum of 13 tokens below 3 is off by 13 eps 3 at most.
            np.testing.assert_allclose(found.tokens[row, 0], mean, atol=5e-6)
            z = mean @ np.asarray(
                variables["params"][f"{method[7:]}_projection"]["kernel"], np.float64
            )
            np.testing.assert_allclose(found.embedding[row], z / np.linalg.norm(z), atol=1e-5)
    speech = cls.apply(
        variables, batch["waveform"], batch["speech_lengths"], method="encode_speech"
    )
    image = cls.apply(variables, batch["image"], method="encode_image")
    by_cls, by_mean = (m.apply(variables, speech, image, method="match") for m in (cls, pooled))
    assert np.abs(by_cls - by_mean).max() > 1e-4
    padded = speech._replace(
        tokens=jnp.pad(speech.tokens, ((0, 0), (0, 5), (0, 0)), constant_values=9.0)
    )
    np.testing.assert_allclose(
        pooled.apply(variables, padded, image, method="match"), by_mean, atol=1e-5
    )


def test_attention_equals_a_loop_over_valid_positions():
    rng = np.random.default_rng(4)
    x, context, lengths = (
        rng.normal(size=(2, 3, 8)),
        rng.normal(size=(2, 5, 6)),
        np.array([5, 2], np.int32),
    )
    module = Attention(heads=2)
    variables = module.init(jax.random.key(0), *map(jnp.float32, (x, context)), lengths)
    noisy = lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731 - biases start at 0
    variables = jax.tree.map(noisy, variables)
    found = module.apply(variables, *map(jnp.float32, (x, context)), lengths)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    for n in range(2):
        for t in range(3):
            expected = p["out"]["bias"].copy()
            for h in range(2):
                query = x[n, t] @ p["query"]["kernel"][:, h] + p["query"]["bias"][h]
                keys = [
                    context[n, s] @ p["key"]["kernel"][:, h] + p["key"]["bias"][h]
                    for s in range(lengths[n])
                ]
                values = [
                    context[n, s] @ p["value"]["kernel"][:, h] + p["value"]["bias"][h]
                    for s in range(lengths[n])
                ]
                weights = np.array([math.exp(query @ k / math.sqrt(4)) for k in keys])
                expected += (weights / weights.sum()) @ np.array(values) @ p["out"]["kernel"][h]
            np.testing.assert_allclose(found[n, t], expected, atol=2e-5)


@pytest.mark.parametrize("with_bias, lengths", [(False, None), (True, None), (True, [5, 2, 1])])
def test_attention_and_its_gradients_equal_those_of_jax(with_bias, lengths):
    rng = np.random.default_rng(7)
    query, bias = (
        rng.normal(size=(3, 4, 2, 8)),
        rng.normal(size=(3, 2, 4, 5)) if with_bias else None,
    )
    key, value = rng.normal(size=(2, 3, 5, 2, 8))
    lengths = None if lengths is None else np.array(lengths, np.int32)
    with jax.enable_x64(True):

        def loss(attend, query, key, value):
            y = attend(query, key, value)
            return jnp.sum(jnp.sin(y)), y

        given = tuple(map(jnp.asarray, (query, key, value)))
        ours = functools.partial(dot_product_attention, bias=bias, lengths=lengths)
        theirs = functools.partial(
            jax.nn.dot_product_attention, bias=bias, key_value_seq_lengths=lengths
        )
        (_, found), grads = jax.value_and_grad(
            functools.partial(loss, ours), (0, 1, 2), has_aux=True
        )(*given)
        (_, expected), wanted = jax.value_and_grad(
            functools.partial(loss, theirs), (0, 1, 2), has_aux=True
        )(*given)
    # The softmax is float32 in both: means of values below 3, with weights right to a few eps.
    np.testing.assert_allclose(found, expected, atol=5e-6)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_attention_to_nothing_is_finite_and_large_logits_do_not_overflow():
    x = 100 * np.random.default_rng(8).normal(size=(2, 3, 1, 4)).astype(np.float32)
    value, grad = jax.value_and_grad(
        lambda x: jnp.sum(dot_product_attention(x, x, x, lengths=jnp.array([0, 3])))
    )(jnp.asarray(x))
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("axis, features", [((2,), (5,)), ((2,), (3, 2)), ((1, 2), (5,))])
def test_dense_products_are_those_of_lax(axis, features):
    rng = np.random.default_rng(9)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    kernel = rng.normal(size=(*[x.shape[a] for a in axis], *features)).astype(np.float32)
    dimensions = ((axis, tuple(range(len(axis)))), ((), ()))
    expected = jax.lax.dot_general(x, kernel, dimensions)
    np.testing.assert_allclose(dense_dot_general(x, kernel, dimensions), expected, atol=1e-5)


def test_patches_are_the_squares_of_the_image_row_by_row():
    image = np.random.default_rng(5).normal(size=(2, 4, 6, 3))
    found = patches(image, 2)
    assert found.shape == (2, 2, 3, 12)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(
                found[:, i, j], image[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1)
            )


def test_image_tokens_belong_to_their_patches():
    # Without blocks a token is a function of its own patch: a change in one square moves that token
    # and no other.
    image = np.random.default_rng(6).integers(0, 256, (1, 16, 24, 3)).astype(np.uint8)
    changed = image.copy()
    changed[:, 8:, 8:16] = 255 - changed[:, 8:, 8:16]
    encoder = ViTImageEncoder(patch=8, width=16, depth=0, conv_stem=False, token_pool=1)
    variables = encoder.init(jax.random.key(0), image)
    moved = encoder.apply(variables, changed)[0] - encoder.apply(variables, image)[0]
    assert (np.abs(moved[0]).max(1) > 1e-6).tolist() == [False] * 5 + [
        True,
        False,
    ]  # [CLS], then 2 x 3 patches


@pytest.mark.parametrize("conv_stem", [False, True])
def test_pooled_image_tokens_are_means_over_squares_of_patches(conv_stem):
    image = np.random.default_rng(8).integers(0, 256, (2, 32, 16, 3)).astype(np.uint8)
    shape = {"patch": 4, "conv_stem": conv_stem, "width": 16, "depth": 0}
    encoder = ViTImageEncoder(**shape, token_pool=1)
    variables = encoder.init(jax.random.key(0), image)
    tokens, lengths = encoder.apply(variables, image)
    pooled, pooled_lengths = ViTImageEncoder(**shape, token_pool=2).apply(variables, image)
    assert tokens.shape == (2, 8 * 4 + 1, 16) and lengths.tolist() == [33, 33]
    assert pooled.shape == (2, 4 * 2 + 1, 16) and pooled_lengths.tolist() == [9, 9]
    np.testing.assert_array_equal(pooled[:, 0], tokens[:, 0])
    grid = np.asarray(tokens[:, 1:]).reshape(2, 8, 4, 16)
    for i in range(4):
        for j in range(2):
            square = grid[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_allclose(pooled[:, 1 + 2 * i + j], square.mean((1, 2)), atol=1e-6)


def test_dropout_masks_belong_to_the_example_whatever_its_batch():
    keys = jax.random.split(jax.random.key(2), 6)
    masks = dropout(jnp.ones((6, 50, 8)), 0.25, keys)
    alone = dropout(jnp.ones((2, 50, 8)), 0.25, keys[3:5])
    np.testing.assert_array_equal(masks[3:5], alone)
    assert np.unique(masks).tolist() == [0.0, np.float32(1 / 0.75)]
    assert abs(np.mean(masks == 0) - 0.25) < 0.03
    assert np.mean(masks[0] != masks[1]) > 0.2, "examples have masks of their own"
    for switched_off in (
        dropout(jnp.ones((6, 2)), 0.25, None),
        dropout(jnp.ones((6, 2)), 0.0, keys),
    ):
        np.testing.assert_array_equal(switched_off, jnp.ones((6, 2)))
    assert fold_keys(None, Site.MLP) is None


def test_every_dropout_site_draws_its_own_mask():
    # A layer that reuses one key would drop the same places twice: fold_in makes each site's keys
    # distinct.
    keys = jax.random.split(jax.random.key(3), 2)
    sites = np.stack(
        [
            jax.random.key_data(fold_keys(fold_keys(keys, Site.BLOCK, a), b))
            for a in range(3)
            for b in (Site.SELF_ATTENTION, Site.CROSS_ATTENTION, Site.MLP)
        ]
    )
    assert len(np.unique(sites.reshape(-1, 2), axis=0)) == 9 * 2


def test_transformer_with_dropout_gives_an_example_the_same_in_any_batch():
    x = np.random.default_rng(7).normal(size=(4, 5, 16)).astype(np.float32)
    module, lengths = (
        Transformer(depth=2, heads=2, dropout_rate=0.3),
        np.array([5, 4, 3, 5], np.int32),
    )
    variables = module.init(jax.random.key(0), x, lengths)
    keys = jax.random.split(jax.random.key(4), 4)
    apply = jax.jit(lambda *inputs: module.apply(*inputs)[0])
    whole, without = apply(variables, x, lengths, keys), apply(variables, x, lengths)
    assert_equal_but_for_rounding(
        lambda variables, x: apply(variables, x, lengths[2:], keys[2:]),
        (variables, x[2:]),
        whole[2:],
    )
    assert np.abs(whole - without).max() > 0.1


def test_momentum_subset_is_both_encoders_and_projections(tiny):
    params = tiny[1]["params"]
    assert set(momentum_subset(params)) == {
        "speech_encoder",
        "image_encoder",
        "speech_projection",
        "image_projection",
    }
    assert set(params) - set(momentum_subset(params)) == {"multimodal_encoder", "temperature"}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"speech": SPEECH | {"name": "hubert_x"}},
            r"model\.speech\.name='hubert_x': choose one of .*log_mel",
        ),
        ({"image": {"width": 16}}, r"model\.image\.name=None: choose one of .*vit"),
        (
            {"image": IMAGE | {"depht": 2}},
            r"model\.image \(vit\) has no depht: its attributes are .*depth",
        ),
        ({"speech": SPEECH | {"dtype": "bfloat16"}}, "has no dtype"),
        ({"multimodal": {"layers": 2}}, r"model\.multimodal .* has no layers"),
        ({"multimodal": {"width": 16, "heads": 3}}, "width 16 is not a multiple of heads 3"),
        ({"multimodal": {"width": 18}}, "width 18 is not a multiple of heads 4"),
        (
            {"speech": {"name": "log_mel", "heads": 5}},
            r"model\.speech: width 96 is not a multiple of heads 5",
        ),
        (
            {"multimodal": {"pooling": "max"}},
            "model.multimodal.pooling='max': choose one of cls, mean",
        ),
        ({"dtype": "float16"}, "model.dtype='float16': choose one of float32, bfloat16"),
        ({"attention": "flash"}, "model.attention='flash': choose one of xla, cudnn"),
    ],
)
def test_create_model_names_what_is_wrong(change, message):
    with pytest.raises(UserError, match=message):
        create_model(**({"speech": SPEECH, "image": IMAGE, "multimodal": TOWER} | change))


def test_create_model_checks_given_heads_against_the_default_width():
    assert create_model(SPEECH, {"name": "vit", "heads": 2}, TOWER).image_encoder.heads == 2


@pytest.mark.parametrize("style", [BlockStyle(), BlockStyle(pre_norm=False, position_buckets=8)])
def test_a_loop_over_blocks_equals_one_after_the_other(style):
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(3, 6, 8)), jnp.float32)
    lengths = jnp.array([6, 2, 5])
    keys = jax.random.split(jax.random.key(2), 3)

    def stack(remat):
        return Transformer(3, 2, dropout_rate=0.3, style=style, layer_drop=0.3, remat=remat)

    params = stack(False).init(jax.random.key(0), x, lengths, keys)["params"]
    assert jax.tree.structure(params) == jax.tree.structure(
        stack(True).init(jax.random.key(0), x, lengths, keys)["params"]
    )

    def values(remat, params, x):
        def total(params, x):
            tokens, hidden = stack(remat).apply({"params": params}, x, lengths, keys)
            return jnp.sum(jnp.sin(tokens)) + sum(jnp.sum(y**2) for y in hidden), hidden

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)

    assert "scan" in str(jax.make_jaxpr(functools.partial(values, True))(params, x))
    assert_equal_but_for_rounding(
        functools.partial(values, False),
        (params, x),
        jax.jit(functools.partial(values, True))(params, x),
    )


def pair_of_tokens(count=3):
    rng = np.random.default_rng(5)
    speech = jnp.asarray(rng.normal(size=(count, 6, 5)), jnp.float32)
    image = jnp.asarray(rng.normal(size=(count, 4, 7)), jnp.float32)
    return speech, jnp.array([6, 1, 4][:count]), image, jnp.full(count, 4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_what_pairs_share_may_be_computed_apart(depth, pooling):
    """Prepared recordings and images match as pairs do, and as a stack of general blocks does."""
    encoder = MultimodalEncoder(8, depth, 2, pooling=pooling)
    pair = speech, speech_lengths, image, image_lengths = pair_of_tokens()
    params = encoder.init(jax.random.key(1), *pair)["params"]
    apply = functools.partial(encoder.apply, {"params": params})
    expected = apply(*pair)
    prepared = apply(speech, speech_lengths, method="prepare_speech")
    keys_values = apply(image, method="prepare_image")
    assert keys_values.shape == (3, 4, 16 * depth)
    crossed = jnp.array([0, 1, 2, 2]), jnp.array([0, 1, 2, 0])
    logits = apply(
        prepared[crossed[0]],
        speech_lengths[crossed[0]],
        keys_values[crossed[1]],
        image_lengths[crossed[1]],
        method="match_prepared",
    )
    np.testing.assert_allclose(logits[:3], expected, atol=1e-6)
    other = apply(speech[2:], speech_lengths[2:], image[:1], image_lengths[:1])
    np.testing.assert_allclose(logits[3:], other, atol=1e-6)

    general = Transformer(depth, 2, mlp_ratio=2.0, cross_attention=True)
    dense = {name: params[name] for name in ("speech_input", "image_input", "match_head")}
    x, context = (
        part @ dense[f"{name}_input"]["kernel"] + dense[f"{name}_input"]["bias"]
        for name, part in (("speech", speech), ("image", image))
    )
    x, _ = general.apply({"params": params["transformer"]}, x, speech_lengths, None, context)
    first = x[:, 0]
    if pooling == "mean":
        first = jnp.stack(
            [row[:length].mean(0) for row, length in zip(x, speech_lengths, strict=True)]
        )
    np.testing.assert_allclose(
        first @ dense["match_head"]["kernel"] + dense["match_head"]["bias"], expected, atol=1e-5
    )


@pytest.mark.parametrize("depth", [2, 4])  # more than two are a loop
def test_recomputed_multimodal_blocks_have_the_same_gradients(depth):
    pair = pair_of_tokens()
    keys = jax.random.split(jax.random.key(2), 3)
    plain = MultimodalEncoder(8, depth, 2, dropout_rate=0.3)
    params = plain.init(jax.random.key(1), *pair)["params"]

    def gradients(encoder, params):
        total = lambda params: jnp.sum(jnp.sin(encoder.apply({"params": params}, *pair, keys)))  # noqa: E731
        return jax.value_and_grad(total)(params)

    again = MultimodalEncoder(8, depth, 2, dropout_rate=0.3, remat=True)
    written = str(jax.make_jaxpr(functools.partial(gradients, again))(params))
    assert "remat" in written and ("scan" in written) == (depth > 2)
    assert_equal_but_for_rounding(
        functools.partial(gradients, plain),
        (params,),
        jax.jit(functools.partial(gradients, again))(params),
    )
