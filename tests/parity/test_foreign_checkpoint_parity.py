"""Checkpoints of ALBEF, BLIP and SpeechCLIP, saved by PyTorch and converted: the same tokens."""

import argparse

import numpy as np
import pytest
from helpers.foreign_checkpoints import (
    DEPTH,
    HIDDEN,
    OPENAI_NAMES,
    PATCH,
    WIDTH,
    albef_shapes,
    embeddings,
    fairseq_tensors,
    openai_shapes,
    random_tensors,
    speechclip_tensors,
)
from helpers.parity import TINY_SPEECH, TINY_VISION, assert_close, images, reference, waveforms
from helpers.parity import speech as speech_model

from c2f_jax.pretrained.families import wav2vec2 as wav2vec2_family
from c2f_jax.pretrained.weights import convert

torch = pytest.importorskip("torch", reason="needs the extra `parity` (torch, transformers)")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# timm's names in a block -> those of torch.nn.TransformerEncoderLayer.
LAYER_NAMES = {
    "attn.qkv.": "self_attn.in_proj_",
    "attn.proj.": "self_attn.out_proj.",
    "mlp.fc1.": "linear1.",
    "mlp.fc2.": "linear2.",
}


def timm_state(tensors, prefix):
    """The blocks under ``prefix`` as state of torch's layers."""
    state = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for theirs, layer in LAYER_NAMES.items():
                name = name.replace(theirs, layer)
            state[name] = torch.as_tensor(value)
    return state


def vit_tokens(image, blocks, activation, epsilon, kernel, bias, cls, positions, norms):
    """The tokens of a pre-norm ViT, by PyTorch's own layers."""
    pixels = (image / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    x = torch.nn.functional.conv2d(pixels, kernel, bias, stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([cls.reshape(1, 1, -1).expand(len(x), 1, -1), x], dim=1) + positions
    before, after = norms
    if before:
        x = torch.nn.functional.layer_norm(x, (WIDTH,), *before, epsilon)
    for number in range(DEPTH):
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, WIDTH // 64, HIDDEN, 0.0, activation, epsilon, batch_first=True, norm_first=True
        )
        layer.load_state_dict(timm_state(blocks, f"blocks.{number}."))
        x = layer(x)
    return torch.nn.functional.layer_norm(x, (WIDTH,), *after, epsilon)


def albef_tokens(tensors, image):
    vit = {
        name.removeprefix("visual_encoder."): torch.tensor(value)
        for name, value in tensors.items()
        if name.startswith("visual_encoder.")
    }
    with torch.no_grad():
        return vit_tokens(
            image,
            vit,
            "gelu",
            1e-6,
            vit["patch_embed.proj.weight"],
            vit["patch_embed.proj.bias"],
            vit["cls_token"],
            vit["pos_embed"],
            (None, (vit["norm.weight"], vit["norm.bias"])),
        )


def openai_tokens(tensors, image):
    vit = {
        name.removeprefix("visual."): torch.tensor(value)
        for name, value in tensors.items()
        if name.startswith("visual.")
    }
    blocks = {}
    for name, value in vit.items():
        for timm, openai in OPENAI_NAMES.items():
            name = name.replace(openai, timm)
        blocks[name.replace("transformer.resblocks.", "blocks.")] = value
    with torch.no_grad():
        return vit_tokens(
            image,
            blocks,
            lambda x: x * torch.sigmoid(1.702 * x),
            1e-5,
            vit["conv1.weight"],
            None,
            vit["class_embedding"],
            vit["positional_embedding"],
            (
                (vit["ln_pre.weight"], vit["ln_pre.bias"]),
                (vit["ln_post.weight"], vit["ln_post.bias"]),
            ),
        )


def tensors_of_torch(tensors):
    return {name: torch.tensor(value) for name, value in tensors.items()}


@pytest.mark.parametrize("side", [32, 48])
def test_albef_and_blip(tmp_path, side):
    tensors = random_tensors(albef_shapes(side))
    checkpoint = {
        "model": tensors_of_torch(tensors),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5}]},
        "config": {"image_res": side, "optimizer": argparse.Namespace(opt="adamW")},
        "epoch": 4,
    }
    torch.save(checkpoint, tmp_path / "checkpoint_best.pth")
    convert([tmp_path / "checkpoint_best.pth"], tmp_path / "out")
    image = images(side)
    assert_close(embeddings(tmp_path / "out", (image,))[0], albef_tokens(tensors, image))


def test_blip_of_transformers(tmp_path):
    vision = TINY_VISION | {"hidden_act": "gelu"}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    text |= {"intermediate_size": 48, "encoder_hidden_size": 32}
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    model = reference(transformers.BlipForImageTextRetrieval, config)
    model.save_pretrained(tmp_path / "blip")
    card = convert([tmp_path / "blip"], tmp_path / "out")
    assert card["layout"] == "Hugging Face BLIP" and "text_encoder" in card["left_out"]

    image = images(32)
    pixels = (image / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        expected = model.vision_model(pixels).last_hidden_state
    assert_close(embeddings(tmp_path / "out", (image,))[0], expected)


class Callback:
    """Lightning stores classes of callbacks and the configuration object."""


def test_speechclip(tmp_path, monkeypatch):
    monkeypatch.setitem(wav2vec2_family.FAIRSEQ_HEADS, 32, 2)
    hubert = speech_model("hubert", **TINY_SPEECH)
    clip = random_tensors(openai_shapes())
    tensors = speechclip_tensors(
        fairseq_tensors({name: value.numpy() for name, value in hubert.state_dict().items()}), clip
    )
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": tensors_of_torch(tensors),
        "callbacks": {Callback: {"best_model_score": torch.tensor(36.0)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": {"config": argparse.Namespace(audio_encoder={"name": "hubert"})},
    }
    path = tmp_path / "epoch_3.ckpt"
    torch.save(checkpoint, path)

    image = images(32)
    convert([path], tmp_path / "image", part="image")
    assert_close(embeddings(tmp_path / "image", (image,))[0], openai_tokens(clip, image))

    wave, lengths = waveforms(3000, 3000)
    card = convert([path], tmp_path / "speech", part="speech", normalize=False)
    assert card["left_out"]["final_proj"] == 1 and card["left_out"]["parallel_branch"] == 3
    with torch.no_grad():
        expected = hubert(torch.from_numpy(wave)).last_hidden_state
    assert_close(embeddings(tmp_path / "speech", (wave, lengths))[0], expected)
