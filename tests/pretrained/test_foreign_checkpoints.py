"""Whole models of ALBEF, BLIP and SpeechCLIP: what of them is converted, and what is said about the
rest."""

import jax
import numpy as np
import pytest
from helpers.foreign_checkpoints import (
    DEPTH,
    WIDTH,
    albef_shapes,
    openai_shapes,
    random_tensors,
    speechclip_tensors,
)
from safetensors.numpy import save_file

from c2f_jax.errors import UserError
from c2f_jax.main import main
from c2f_jax.models.networks.vision_transformer import CLIP_MEAN
from c2f_jax.pretrained.families import albef, clip, find_layout
from c2f_jax.pretrained.published_files import read_published
from c2f_jax.pretrained.tensor_names import Published
from c2f_jax.pretrained.weights import load_card, load_weights


def test_the_image_side_of_albef_is_converted_and_the_rest_counted(tmp_path, capsys):
    tensors = random_tensors(albef_shapes())
    save_file(tensors, tmp_path / "albef.safetensors")
    output = tmp_path / "albef"
    assert main(["convert", str(tmp_path / "albef.safetensors"), f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "ALBEF / BLIP: " in printed
    assert (
        "left out (tensors): idx_queue 1, image_queue 1, itm_head 2, queue_ptr 1, temp 1, "
        "text_encoder 3, text_encoder_m 3, text_proj 2, text_proj_m 2, text_queue 1, "
        f"vision_proj 2, vision_proj_m 2, visual_encoder_m {6 + 12 * DEPTH}\n" in printed
    )

    card = load_card(output)
    own = [value for name, value in tensors.items() if name.startswith("visual_encoder.")]
    assert card["parameters"] == sum(value.size for value in own)
    assert card["tower"]["heads"] == 2 and card["tower"]["epsilon"] == 1e-6
    assert card["preprocessing"]["resize"] == "squash"
    assert card["preprocessing"]["image_size"] == 32
    np.testing.assert_allclose(card["preprocessing"]["mean"], CLIP_MEAN)
    # The online encoder, not its momentum copy.
    params = load_weights(output)
    block, source = params["transformer"]["block_1"], "visual_encoder.blocks.1."
    key = tensors[source + "attn.qkv.weight"][WIDTH : 2 * WIDTH].T.reshape(WIDTH, 2, 64)
    np.testing.assert_array_equal(block["self_attention"]["key"]["kernel"], key)
    np.testing.assert_array_equal(
        params["transformer"]["norm"]["scale"], tensors["visual_encoder.norm.weight"]
    )


@pytest.mark.parametrize(
    "side, width, depth, heads",
    [(224, 768, 12, 12), (256, 768, 12, 12), (384, 768, 12, 12), (384, 1024, 24, 16)],
)
def test_sizes_of_the_published_image_sides(side, width, depth, heads):
    shapes = albef_shapes(side, width, depth, patch=16)
    # Only the shapes count.
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert find_layout(tensors) == (albef.PUBLISHED, "")
    tower, preprocessing = albef.PUBLISHED.describe(Published(tensors))
    assert (tower["width"], tower["depth"], tower["heads"]) == (width, depth, heads)
    assert tower["patch"] == 16 and preprocessing["image_size"] == side


def test_tensors_of_the_image_side_that_do_not_fit_are_named(tmp_path):
    tensors = random_tensors(albef_shapes())
    tensors["visual_encoder.head.weight"] = np.zeros((3, WIDTH), np.float32)
    del tensors["visual_encoder.blocks.1.norm2.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensors that do not fit: 2\n") as error:
        read_published([tmp_path])
    assert "unused: visual_encoder.head.weight (3, 128)" in str(error.value)
    assert "missing: visual_encoder.blocks.1.norm2.bias" in str(error.value)


def test_a_vit_alone_is_not_taken_for_albef(tmp_path):
    # DeiT and others have the same names; nothing says how their colors are normalized.
    tensors = random_tensors(albef_shapes(momentum=False))
    alone = {
        name.removeprefix("visual_encoder."): value
        for name, value in tensors.items()
        if name.startswith("visual_encoder.")
    }
    save_file(alone, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no known network"):
        read_published([tmp_path])


def test_both_networks_of_speechclip_are_converted(tmp_path, capsys):
    # In place of HuBERT a network of another family: the part says which tensors are read.
    image = random_tensors(openai_shapes())
    speech = {"post_extract_proj.weight": np.zeros((4, 4), np.float32)}
    path = tmp_path / "speechclip.safetensors"
    save_file(speechclip_tensors(speech, image), path)
    for words in ([], ["--normalize=true"]):
        assert main(["convert", str(path), f"--output={tmp_path / 'out'}", *words]) == 2
        assert "give --part=speech for its HuBERT or --part=image" in capsys.readouterr().err
    assert main(["convert", str(path), f"--output={tmp_path / 'clip'}", "--part=image"]) == 0
    printed = capsys.readouterr().out
    assert "OpenAI CLIP: " in printed
    assert (
        "left out (tensors): audio_encoder 2, clip 7, criterion 2, parallel_branch 3, visual 1"
        in printed
    )
    card = load_card(tmp_path / "clip")
    assert card["layout"] == clip.OPENAI.name and card["preprocessing"]["resize"] == "short_side"
    block = load_weights(tmp_path / "clip")["transformer"]["block_1"]
    fused = image["visual.transformer.resblocks.1.attn.in_proj_weight"]
    key = fused[WIDTH : 2 * WIDTH].T.reshape(WIDTH, 2, 64)
    np.testing.assert_array_equal(block["self_attention"]["key"]["kernel"], key)
    assert (
        main(
            ["convert", str(path), f"--output={tmp_path / 'hubert'}", "--part=speech"]
            + ["--normalize=false"]
        )
        == 2
    )
    assert "width 4 is not supported" in capsys.readouterr().err

    # OpenAI's own state dict holds the same network.
    save_file(image, tmp_path / "clip.safetensors")
    _, params = read_published([tmp_path / "clip.safetensors"])
    jax.tree.map(np.testing.assert_array_equal, params, load_weights(tmp_path / "clip"))
    with pytest.raises(UserError, match="clip.safetensors is none of them: leave --part out"):
        read_published([tmp_path / "clip.safetensors"], part="image")
