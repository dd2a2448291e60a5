"""Models of transformers, saved as Hugging Face, fairseq and LAVIS publish them, and converted: the
same tokens."""

import json

import numpy as np
import pytest
from helpers.foreign_checkpoints import embeddings, fairseq_tensors

from c2f_jax.errors import UserError
from c2f_jax.pretrained.families import blip2 as blip2_family
from c2f_jax.pretrained.families import wav2vec2 as wav2vec2_family
from c2f_jax.pretrained.weights import convert


def lavis_tensors(blip2):
    """A transformers BLIP-2's tensors under LAVIS's names."""
    tensors = {}
    rules = (
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
        ("vision_model.post_layernorm", "ln_vision"),
        ("vision_model.encoder.layers.", "visual_encoder.blocks."),
        (".layer_norm1.", ".norm1."),
        (".layer_norm2.", ".norm2."),
        (".self_attn.projection.", ".attn.proj."),
        (".self_attn.qkv.", ".attn.qkv."),
        ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
        ("qformer.encoder", "Qformer.bert.encoder"),
        (".attention.attention.", ".attention.self."),
        (".crossattention.attention.", ".crossattention.self."),
        ("vision_projection", "vision_proj"),
        ("text_projection", "text_proj"),
    )
    for name, value in blip2.items():
        if name.startswith("embeddings."):
            name = f"Qformer.bert.{name}"
        for old, new in rules:
            name = name.replace(old, new)
        if name.endswith("attn.qkv.bias"):
            query, _, value = np.split(value, 3)
            tensors[name.replace("qkv.bias", "q_bias")] = query
            name = name.replace("qkv.bias", "v_bias")
        tensors[name] = value
    return tensors | {"temp": np.zeros((), np.float32)}


def reference_models():
    """Tiny models: (name, model, inputs of ours, tokens of theirs)."""
    torch = pytest.importorskip("torch", reason="round trips need the extra `parity`")
    pytest.importorskip("transformers", reason="round trips need the extra `parity`")
    from helpers import parity

    wave, lengths = parity.waveforms(3000, 3000)
    image = parity.images(32)
    with torch.no_grad():
        for name, values in (
            ("hubert", parity.TINY_SPEECH),
            ("hubert-large", parity.TINY_SPEECH | parity.LARGE_KIND),
            ("wav2vec2", parity.TINY_SPEECH),
            ("wavlm", parity.TINY_WAVLM),
        ):
            model = parity.speech(name.removesuffix("-large"), **values)
            yield name, model, (wave, lengths), model(torch.from_numpy(wave)).last_hidden_state
        for name in ("clip", "siglip", "dinov2"):
            model = parity.vision(name, parity.TINY_VISION)
            module, _ = parity.ours(model)
            out = model(parity.pixels(image, module), output_hidden_states=True)
            if name == "clip":
                expected = model.vision_model.post_layernorm(out.hidden_states[-1])
            elif name == "siglip":
                expected = torch.cat([out.pooler_output[:, None], out.last_hidden_state], dim=1)
            else:
                expected = out.last_hidden_state
            yield name, model, (image,), expected
        model = parity.blip2(parity.TINY_BLIP2)
        module, _ = parity.ours(model)
        context = model.vision_model(parity.pixels(image, module)).last_hidden_state
        queries = model.query_tokens.expand(2, -1, -1)
        yield (
            "blip2",
            model,
            (image,),
            model.qformer(query_embeds=queries, encoder_hidden_states=context).last_hidden_state,
        )


def test_transformers_checkpoints_on_disk_give_the_same_embeddings(tmp_path):
    for name, model, inputs, expected in reference_models():
        folder = tmp_path / name
        model.save_pretrained(folder)
        if len(inputs) == 2:
            (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
        if name == "wav2vec2":  # as older ones are published
            import torch

            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        convert([folder], tmp_path / f"{name}-converted")
        found = embeddings(tmp_path / f"{name}-converted", inputs)[0]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, err_msg=name)


def test_fairseq_and_lavis_files_give_the_same_embeddings(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="round trips need the extra `parity`")
    monkeypatch.setitem(wav2vec2_family.FAIRSEQ_HEADS, 32, 2)
    models = {name: rest for name, *rest in reference_models()}
    settings = dict.fromkeys(("hubert", "hubert-large", "wav2vec2"), {"task": {"normalize": False}})
    settings["wavlm"] = {"normalize": False, "max_distance": 12}
    path = tmp_path / "speech.pt"
    for name in settings:
        speech, inputs, expected = models[name]
        tensors = fairseq_tensors({k: v.numpy() for k, v in speech.state_dict().items()})
        torch.save(
            {"model": {k: torch.tensor(v) for k, v in tensors.items()}, "cfg": settings[name]}, path
        )
        card = convert([path], tmp_path / name)
        assert card["layout"].startswith("fairseq") and card["tower"]["pre_norm"] is name.endswith(
            "large"
        )
        np.testing.assert_allclose(
            embeddings(tmp_path / name, inputs)[0], expected.numpy(), atol=1e-4
        )
    torch.save({"model": {k: torch.tensor(v) for k, v in tensors.items()}}, path)
    with pytest.raises(UserError, match="give --normalize=true or --normalize=false"):
        convert([path], tmp_path / "unknown")

    blip2, inputs, expected = models["blip2"]
    # LAVIS has no key biases, and heads of 88 and 64 whose number is not in the file.
    tensors = {k: v.numpy().copy() for k, v in blip2.state_dict().items()}
    for name in tensors:
        if name.endswith("qkv.bias"):
            tensors[name][32:64] = 0
    for head_width in ("EVA_HEAD_WIDTH", "BERT_HEAD_WIDTH"):
        monkeypatch.setattr(blip2_family, head_width, 16)
    tensors = {k: torch.tensor(v) for k, v in lavis_tensors(tensors).items()}
    torch.save({"model": tensors}, tmp_path / "blip2.pth")
    # The first stage is published without its frozen ViT, which has a file and names of its own.
    eva = {k: v for k, v in tensors.items() if k.startswith("visual_encoder.")}
    torch.save(
        {"model": {k: v for k, v in tensors.items() if k not in eva}}, tmp_path / "stage_1.pth"
    )
    eva = {k.removeprefix("visual_encoder."): v for k, v in eva.items()}
    torch.save(eva | {"head.weight": torch.zeros(3, 32)}, tmp_path / "eva_vit_g.pth")
    for number, files in enumerate((["blip2.pth"], ["stage_1.pth", "eva_vit_g.pth"])):
        output = tmp_path / f"lavis{number}"
        card = convert([tmp_path / name for name in files], output)
        assert card["layout"] == "LAVIS BLIP-2" and card["tower"]["projection"] > 0
        assert [source["file"] for source in card["source"]] == files
        # A bias of the keys shifts all logits of a query alike: the reference's own one changes
        # nothing.
        np.testing.assert_allclose(embeddings(output, inputs)[0], expected.numpy(), atol=1e-4)
