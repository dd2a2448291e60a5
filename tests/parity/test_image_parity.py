"""Published image networks against their PyTorch implementations in transformers, from the same
random weights."""

import jax
import pytest
from helpers.parity import (
    TINY_BLIP2,
    TINY_VISION,
    assert_close,
    assert_gradients_agree,
    assert_hidden_states_agree,
    blip2,
    images,
    ours,
    pixels,
    torch,
    vision,
)

from c2f_jax.models.networks.vision_transformer import resize_positions

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
        *(
            pytest.param(name, BASE_SIZES[name], id=f"{name}-base", marks=pytest.mark.heavy)
            for name in BASE_SIZES
        ),
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

    def output(module, params):
        return module.apply({"params": params}, image)[0][:, : expected.shape[1]]

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


Q_FORMER_BASE = {"vision_config": TINY_VISION, "qformer_config": {"encoder_hidden_size": 32}}
BLIP2 = [
    pytest.param(TINY_BLIP2 | {"image_text_hidden_size": 24}, id="tiny"),
    pytest.param(Q_FORMER_BASE, id="q-former-base"),
    pytest.param({}, id="vit-g", marks=pytest.mark.heavy),
]


def blip2_outputs(model, image, module, **options):
    """The reference's vision side, its Q-Former, and its queries projected into the contrastive
    (ITC) space."""
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
        vision_out, qformer, projected = blip2_outputs(
            model, image, module, output_hidden_states=True
        )
    _, lengths, hidden = jax.jit(module.clone(projection=0).apply)({"params": params}, image)
    assert lengths.tolist() == [model.config.num_query_tokens] * 2
    assert_hidden_states_agree(hidden, qformer.hidden_states)
    vision_tokens, _, vision_hidden = jax.jit(module.vision.apply)(
        {"params": params["vision"]}, image
    )
    assert_close(vision_tokens, vision_out.last_hidden_state)
    assert_hidden_states_agree(vision_hidden[:-1], vision_out.hidden_states[:-1])
    assert_close(jax.jit(module.apply)({"params": params}, image)[0], projected)


@pytest.mark.parametrize(
    "values", [BLIP2[0], pytest.param(Q_FORMER_BASE, id="q-former-base", marks=pytest.mark.heavy)]
)
def test_blip2_gradients(values):
    model = blip2(values)
    image = images(model.config.vision_config.image_size)
    projected = blip2_outputs(model, image, ours(model)[0])[2]
    assert_gradients_agree(
        model, projected, lambda module, params: module.apply({"params": params}, image)[0]
    )
