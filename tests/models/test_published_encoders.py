"""Published networks inside the C2F model: frozen parameters, layers, pooled tokens, cached tokens,
masking."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rounding import assert_equal_but_for_rounding

from c2f_jax.errors import UserError
from c2f_jax.models.factory import create_model, create_tower
from c2f_jax.models.layers import span_mask
from c2f_jax.models.networks.vision_transformer import cubic_weights, resize_positions
from c2f_jax.models.networks.wav2vec2 import normalize_waveform
from c2f_jax.models.parameters import merge_params, split_params
from c2f_jax.models.published import (
    PublishedImage,
    PublishedSpeech,
    TimeConvolutions,
    choose_layer,
    pool_tokens,
)
from c2f_jax.objectives.keys import Site, fold_keys
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.optimizer import OptimizerConfig, create_optimizer
from c2f_jax.training.train_state import create_train_state
from c2f_jax.training.train_step import train_step

TOWER = {
    "name": "wav2vec2",
    "width": 16,
    "depth": 2,
    "heads": 2,
    "conv_widths": [8] * 7,
    "position_kernel": 8,
}
TOWER |= {"position_groups": 2}
VISION = {"name": "vision_transformer", "width": 16, "depth": 2, "heads": 2, "patch": 8}
SPEECH = {"name": "published", "tower": TOWER, "width": 12, "depth": 1, "heads": 2}
IMAGE = SPEECH | {"tower": VISION}
SMALL = {"width": 12, "depth": 1, "heads": 2, "mlp_ratio": 4.0}


def batch(rows=4, samples=4000, side=16, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.linspace(samples, samples * 0.7, rows).astype(np.int32)
    wave = rng.normal(size=(rows, samples)).astype(np.float32) * (
        np.arange(samples) < lengths[:, None]
    )
    image = rng.integers(0, 256, (rows, side, side, 3)).astype(np.uint8)
    return {
        "waveform": wave,
        "speech_lengths": lengths,
        "image": image,
        "image_id": np.arange(rows, dtype=np.int32),
    }


def step(speech, image, steps=1):
    """Train states before and after, and the metrics of the last step."""
    model = create_model(speech, image, SMALL, embedding_dim=8)
    optimizer = create_optimizer(
        OptimizerConfig(
            learning_rate=1e-2, warmup_steps=0, final_fraction=0.0, weight_decay=0.1, b2=0.999
        ),
        10,
    )
    data = batch()
    before = create_train_state(model, optimizer, data, seed=0, queue_size=8, token_queue_size=0)
    run = jax.jit(
        lambda state: train_step(
            state, data, model=model, optimizer=optimizer, method=MethodConfig(alpha_ramp_steps=0)
        )
    )
    state = before
    for _ in range(steps):
        state, metrics = run(state)
    return before, state, {name: float(value.compute()) for name, value in metrics.items()}


def paths(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def frozen():
    return step(SPEECH, IMAGE)


@pytest.fixture(scope="module")
def trained():
    return step(SPEECH | {"frozen": "none"}, IMAGE | {"frozen": "none"})


def test_frozen_towers_have_no_gradient_no_optimiser_state_and_no_momentum_copy(frozen, trained):
    before, after, _ = frozen
    for part in ("params", "momentum_params", "opt_state"):
        assert not any("tower" in path for path in paths(getattr(after, part)))
    assert {name: set(value) for name, value in after.frozen.items()} == {
        "speech_encoder": {"tower"},
        "image_encoder": {"tower"},
    }
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.params, after.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert trained[1].frozen == {} and any(
        "tower" in path for path in paths(trained[1].momentum_params)
    )


def test_a_frozen_tower_changes_neither_the_loss_nor_the_gradient_of_the_rest(frozen, trained):
    assert frozen[2]["loss"] == pytest.approx(trained[2]["loss"], rel=1e-5)
    assert frozen[2]["gradient_norm"] < trained[2]["gradient_norm"]


def test_frozen_convolutions_alone():
    before, after, _ = step(SPEECH | {"frozen": "conv"}, IMAGE)
    assert set(after.frozen["speech_encoder"]["tower"]) == {"conv"}
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    kernels = [
        s.params["speech_encoder"]["tower"]["transformer"]["block_0"]["mlp_in"]["kernel"]
        for s in (before, after)
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-5


def test_given_weights_take_the_place_of_random_ones():
    model = create_model(SPEECH, IMAGE, SMALL, embedding_dim=8)
    optimizer = create_optimizer(OptimizerConfig(), 1000)
    create = lambda **given: create_train_state(  # noqa: E731
        model, optimizer, batch(), seed=0, queue_size=0, token_queue_size=0, **given
    )
    plain = create()
    weights = jax.tree.map(
        lambda x: np.asarray(x) + 1, {"speech_encoder": plain.frozen["speech_encoder"]}
    )
    given = create(weights=weights)
    jax.tree.map(
        np.testing.assert_array_equal, given.frozen["speech_encoder"], weights["speech_encoder"]
    )
    jax.tree.map(
        np.testing.assert_array_equal, given.frozen["image_encoder"], plain.frozen["image_encoder"]
    )
    jax.tree.map(np.testing.assert_array_equal, given.params, plain.params)


def test_weighted_sum_starts_as_the_mean_of_all_layers_and_learns():
    encoder = SPEECH | {"layer": "weighted_sum", "depth": 0}
    model = create_model(encoder, IMAGE, SMALL, embedding_dim=8)
    data = batch()
    params = jax.jit(model.init)(jax.random.key(0), data)["params"]
    assert params["speech_encoder"]["layer_weights"].shape == (3,)
    encode = jax.jit(
        lambda p: model.apply(
            {"params": p}, data["waveform"], data["speech_lengths"], method="encode_speech"
        )
    )
    found = encode(params)
    _, frames, hidden = create_tower(TOWER).apply(
        {"params": params["speech_encoder"]["tower"]}, data["waveform"], data["speech_lengths"]
    )
    mean = sum(hidden) / 3
    assert_equal_but_for_rounding(lambda p: encode(p).tokens[:, 1:], (params,), mean)
    for row, length in enumerate(frames):  # the first token is the mean of the valid ones
        mean_of_valid = found.tokens[row, 1 : length + 1].mean(0)
        np.testing.assert_allclose(found.tokens[row, 0], mean_of_valid, atol=1e-5)
    moved = encode(
        merge_params(params, {"speech_encoder": {"layer_weights": jnp.array([20.0, 0.0, 0.0])}})
    )
    np.testing.assert_allclose(moved.tokens[:, 1:], hidden[0], atol=1e-4)
    grads = jax.grad(lambda p: jnp.sum(encode(p).embedding[:, 0]))(params)
    assert np.abs(grads["speech_encoder"]["layer_weights"]).max() > 1e-6


@pytest.mark.parametrize(
    "layer, caches_all", [("last", False), ("1", False), ("weighted_sum", True)]
)
def test_cached_tokens_give_what_the_network_gives(layer, caches_all):
    model = create_model(SPEECH | {"layer": layer}, IMAGE, SMALL, embedding_dim=8)
    data = batch()
    params = jax.jit(model.init)(jax.random.key(0), data)["params"]
    apply = lambda *inputs: model.apply({"params": params}, *inputs, method="encode_speech")  # noqa: E731
    tower = {"params": params["speech_encoder"]["tower"]}
    tokens, frames, hidden = create_tower(TOWER).apply(
        tower, data["waveform"], data["speech_lengths"]
    )
    cached = jnp.stack(hidden, axis=2) if caches_all else choose_layer(hidden, layer)
    found, expected = apply(cached, frames), apply(data["waveform"], data["speech_lengths"])
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=1e-5)
    del params["speech_encoder"]["tower"]
    np.testing.assert_allclose(apply(cached, frames).embedding, expected.embedding, atol=1e-5)


def test_tokens_of_another_tool_take_no_waveform():
    model = create_model(
        SMALL | {"name": "tokens"}, SMALL | {"name": "tokens"}, SMALL, embedding_dim=8
    )
    data = {
        "speech_tokens": np.ones((2, 5, 7), np.float16),
        "speech_lengths": np.array([5, 3], np.int32),
        "image_tokens": np.ones((2, 4, 9), np.float16),
    }
    variables = jax.jit(model.init)(jax.random.key(0), data)
    speech, image, logits, _ = model.apply(variables, data)
    assert speech.tokens.shape == (2, 6, 12) and speech.lengths.tolist() == [6, 4]
    assert image.tokens.shape == (2, 5, 12) and logits.shape == (2, 2)
    with pytest.raises(UserError, match="reads tokens from a feature cache"):
        model.init(jax.random.key(0), batch())


def test_pooled_tokens_are_means_of_valid_ones():
    tokens = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    pooled, lengths = pool_tokens(tokens, np.array([7, 4]), 3)
    assert pooled.shape == (2, 3, 3) and lengths.tolist() == [3, 2]
    np.testing.assert_allclose(pooled[0, 2], tokens[0, 6], atol=1e-6)
    np.testing.assert_allclose(pooled[1, 0], tokens[1, :3].mean(0), atol=1e-6)
    np.testing.assert_allclose(pooled[1, 1], tokens[1, 3], atol=1e-6)
    assert pool_tokens(tokens, lengths, 1)[0] is tokens


def test_convolutions_over_time_halve_the_tokens_and_ignore_the_padding():
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(size=(2, 13, 8)).astype(np.float32), np.array([13, 6])
    module = TimeConvolutions(2)
    variables = jax.jit(module.init)(jax.random.key(0), x, lengths)
    apply = jax.jit(module.apply)
    found, found_lengths = apply(variables, x, lengths)
    assert found.shape == (2, 4, 8) and found_lengths.tolist() == [4, 2]
    spoilt = np.concatenate([x[1:, :6], np.full((1, 9, 8), 7.0, np.float32)], axis=1)
    second = functools.partial(lambda *inputs: apply(*inputs)[0][1, :2], variables)
    assert_equal_but_for_rounding(
        second, (x, lengths), apply(variables, spoilt, lengths[1:])[0][0, :2]
    )

    params, y = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]),
        x[1, :6].astype(float),
    )
    for block, ends in ((0, [(0, 2), (2, 4), (4, 6)]), (1, [(0, 2), (2, 3)])):
        normed = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        near, kernel = np.pad(normed, ((2, 2), (0, 0))), params[f"conv_{block}"]["kernel"]
        z = np.stack([sum(near[t + k] @ kernel[k] for k in range(5)) for t in range(len(y))])
        y = y + 0.5 * z * (
            1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
        )  # biases are 0 at the start
        y = np.stack([y[first:last].mean(0) for first, last in ends])
    assert_equal_but_for_rounding(second, (x, lengths), y.astype(np.float32))

    keys = jax.random.split(jax.random.key(1), 2)
    rough = TimeConvolutions(2, dropout_rate=0.5)
    assert np.abs(rough.apply(variables, x, lengths, keys)[0] - found).max() > 0.1
    np.testing.assert_array_equal(jax.jit(rough.apply)(variables, x, lengths)[0], found)


def test_the_convolutions_of_an_encoder_stand_before_its_transformer():
    tokens = np.random.default_rng(0).normal(size=(2, 13, 9)).astype(np.float32)
    encoder = PublishedSpeech(width=12, depth=1, heads=2, pool=2, conv_blocks=2)
    variables = jax.jit(encoder.init)(jax.random.key(0), tokens, np.array([13, 6]))
    apply = jax.jit(encoder.apply)
    found, lengths = apply(variables, tokens, np.array([13, 6]))
    assert found.shape == (2, 3, 12) and lengths.tolist() == [3, 2], "a [CLS] and ceil(13 / 8)"
    alone = tokens[1:, :6], np.array([6])
    assert_equal_but_for_rounding(
        lambda *inputs: apply(*inputs)[0][0], (variables, *alone), found[1, :2]
    )


def test_normalized_waveform_ignores_the_padding():
    wave = np.random.default_rng(1).normal(3.0, 2.0, (2, 500)).astype(np.float32)
    found = normalize_waveform(wave, np.array([500, 200]))
    exact = wave[1, :200].astype(np.float64)
    expected = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-7)
    # The float32 sum of 200 values around 3 is off by 200 eps 3 / 2 of their mean at most.
    np.testing.assert_allclose(found[1, :200], expected, atol=5e-5)
    assert not np.any(found[1, 200:])


def test_span_masks_cover_their_share_in_spans_and_belong_to_the_example():
    keys = jax.random.split(jax.random.key(0), 50)
    masks = np.asarray(span_mask(keys, 400, 0.2, 10))
    assert 0.15 < masks.mean() < 0.2, "of 20 %, the overlap is counted once"
    np.testing.assert_array_equal(span_mask(keys[7:9], 400, 0.2, 10), masks[7:9])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], masks[0], [0]]).astype(int)))
    runs = edges[1::2] - edges[::2]
    assert np.all((runs >= 10) | (edges[1::2] == 400)), "a span is ten long unless the end cuts it"
    none = span_mask(keys, 400, 0.2, 10, np.zeros((50, 400), bool))
    assert not np.any(none)


def test_masking_and_layer_drop_act_in_training_only_and_per_example():
    tower = create_tower(
        TOWER | {"mask_time": 0.5, "mask_channels": 0.3, "layer_drop": 0.5, "dropout_rate": 0.1}
    )
    data = batch()
    inputs = data["waveform"], data["speech_lengths"]
    variables = jax.jit(tower.init)(jax.random.key(0), *inputs)
    keys = jax.random.split(jax.random.key(1), 4)
    apply = jax.jit(tower.apply)
    still, training = apply(variables, *inputs)[0], apply(variables, *inputs, keys)[0]
    assert np.abs(still - training).max() > 1e-2
    assert_equal_but_for_rounding(
        lambda *inputs: apply(*inputs, keys[1:3])[0],
        (variables, *(x[1:3] for x in inputs)),
        training[1:3],
    )
    quiet = jax.jit(create_tower(TOWER).apply)
    assert_equal_but_for_rounding(lambda *x: quiet(*x)[0], (variables, *inputs), still)


def test_masked_tokens_say_nothing_in_training_alone():
    tokens = np.random.default_rng(0).normal(size=(2, 6, 9)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    encoder = PublishedImage(width=12, depth=1, heads=2, token_mask=0.5)
    variables = encoder.init(jax.random.key(0), tokens)
    moved = jax.jacobian(
        lambda x: jnp.sum(encoder.apply(variables, x, keys)[0][:, 0] ** 2, axis=-1)
    )(tokens)
    silent = ~np.any(
        np.asarray(moved), axis=(0, 3)
    )  # (n, T): tokens that the [CLS] does not depend on
    np.testing.assert_array_equal(silent, span_mask(fold_keys(keys, Site.TOKEN_MASK), 6, 0.5, 1))
    assert 0 < silent.sum() < silent.size
    whole = PublishedImage(width=12, depth=1, heads=2).apply(variables, tokens)[0]
    np.testing.assert_array_equal(encoder.apply(variables, tokens)[0], whole)


@functools.cache
def hidden_states(seed=0, **changes):
    """The hidden states in training of ``TOWER`` with some attributes changed."""
    data, (apply, variables) = batch(seed=seed), changed_tower(**changes)
    keys = jax.random.split(jax.random.key(1), 4)
    return apply(variables, data["waveform"], data["speech_lengths"], keys)[2]


@functools.cache
def changed_tower(**changes):
    tower, data = create_tower(TOWER | changes), batch()
    init = jax.jit(tower.init)
    return jax.jit(tower.apply), init(jax.random.key(0), data["waveform"], data["speech_lengths"])


def test_layer_drop_alone_skips_blocks():
    # Entries below 5 agree to hundreds of eps, however the compiler joins operations; a block moves
    # them by 0.1 and more.
    for found in hidden_states(layer_drop=1.0):
        np.testing.assert_allclose(found, hidden_states()[0], atol=1e-4)
    some = hidden_states(layer_drop=0.5)
    same = np.array(
        [
            [np.allclose(some[k][row], some[k + 1][row], atol=1e-4) for row in range(4)]
            for k in range(2)
        ]
    )
    assert same.any() and not same.all(), "each example draws for itself"


def test_masks_alone_hide_frames_or_channels():
    # With spans that start everywhere nothing is left of the waveform but its length.
    for changes in ({"mask_time": 10.0}, {"mask_channels": 10.0}):
        found, other = hidden_states(**changes), hidden_states(seed=1, **changes)
        jax.tree.map(np.testing.assert_array_equal, found, other)
    frames = hidden_states(mask_time=0.5, mask_time_length=2)[0]
    assert np.abs(frames - hidden_states()[0]).max() > 1e-2


def test_positions_for_another_resolution():
    row, column = np.mgrid[:8, :8].astype(np.float32)
    grid = np.stack([row, column], -1).reshape(1, 64, 2)
    positions = np.concatenate([np.full((1, 1, 2), 9.0, np.float32), grid], axis=1)
    np.testing.assert_allclose(resize_positions(positions, 65), positions, atol=1e-5)
    larger = resize_positions(positions, 257)
    assert larger.shape == (1, 257, 2) and larger[0, 0].tolist() == [9.0, 9.0]
    # A ramp stays one, half as steep; the kernel with a = -0.75 is exact for every second
    # difference only.
    inner = np.asarray(larger[0, 1:]).reshape(16, 16, 2)[4:12, 4:12, 0]
    np.testing.assert_allclose(inner[2:] - inner[:-2], 1.0, atol=1e-5)
    np.testing.assert_allclose(cubic_weights(8, 5).sum(axis=1), 1.0, atol=1e-6)


def test_split_and_merge_are_inverse():
    tree = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    rest, taken = split_params(tree, [("a", "b"), ("missing", "x")])
    assert rest == {"a": {"d": 2}, "e": 3} and taken == {"a": {"b": {"c": 1}}}
    assert merge_params(rest, taken) == tree
    assert split_params(tree, [("a",)]) == ({"e": 3}, {"a": {"b": {"c": 1}, "d": 2}})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"speech": {"name": "published"}}, r"model\.speech\.name='published' needs `weights`"),
        ({"speech": SPEECH | {"name": "tokens"}}, "takes no `tower`"),
        (
            {"speech": SPEECH | {"tower": VISION}},
            r"model\.speech\.tower\.name='vision_transformer': choose one of wav2vec2",
        ),
        ({"speech": SPEECH | {"tower": TOWER | {"depht": 1}}}, r"tower \(wav2vec2\) has no depht"),
        (
            {"speech": SPEECH | {"frozen": "all"}},
            r"model\.speech\.frozen='all': choose one of tower, none, conv",
        ),
        (
            {"image": IMAGE | {"frozen": "conv"}},
            r"model\.image\.frozen='conv': choose one of tower, none",
        ),
    ],
)
def test_create_model_names_what_is_wrong(change, message):
    with pytest.raises(UserError, match=message):
        create_model(**({"speech": SPEECH, "image": IMAGE, "multimodal": SMALL} | change))


def test_an_unknown_layer_is_named():
    model = create_model(SPEECH | {"layer": "7"}, IMAGE, SMALL)
    with pytest.raises(
        UserError, match="layer='7': must be last, weighted_sum or a number below 3"
    ):
        jax.eval_shape(model.init, jax.random.key(0), batch())
