"""Checkpoints as ALBEF, BLIP, SpeechCLIP and fairseq publish them: their tensor names, tiny
shapes."""

import jax
import numpy as np

from c2f_jax.models.factory import create_tower
from c2f_jax.pretrained.networks import bare_tower, tower_shapes
from c2f_jax.pretrained.weights import load_weights, open_card

# Heads are 64 wide in all of them: two heads.
WIDTH, DEPTH, HIDDEN, PATCH = 128, 2, 96, 8
TIMM_BLOCK = {
    "norm1.weight": (WIDTH,),
    "norm1.bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH),
    "attn.qkv.bias": (3 * WIDTH,),
    "attn.proj.weight": (WIDTH, WIDTH),
    "attn.proj.bias": (WIDTH,),
    "norm2.weight": (WIDTH,),
    "norm2.bias": (WIDTH,),
    "mlp.fc1.weight": (HIDDEN, WIDTH),
    "mlp.fc1.bias": (HIDDEN,),
    "mlp.fc2.weight": (WIDTH, HIDDEN),
    "mlp.fc2.bias": (WIDTH,),
}
# timm's name in a block -> OpenAI's.
OPENAI_NAMES = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def albef_shapes(side=32, width=WIDTH, depth=DEPTH, patch=PATCH, momentum=True):
    """Names and shapes of the parameters of ALBEF's and BLIP's retrieval models; their text side is
    cut to its first layer."""
    tokens = (side // patch) ** 2 + 1
    vision = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(depth):
        for name, shape in TIMM_BLOCK.items():
            scaled = tuple(size * width // WIDTH for size in shape)
            vision[f"blocks.{block}.{name}"] = scaled
    text = {
        "embeddings.word_embeddings.weight": (50, width),
        "embeddings.position_ids": (1, 512),
        "encoder.layer.0.attention.self.query.weight": (width, width),
    }
    projection = {"weight": (256, width), "bias": (256,)}
    shapes = {"temp": (), "itm_head.weight": (2, width), "itm_head.bias": (2,)}
    for end in ("", "_m") if momentum else ("",):
        shapes |= {f"visual_encoder{end}.{name}": shape for name, shape in vision.items()}
        shapes |= {f"text_encoder{end}.{name}": shape for name, shape in text.items()}
        for side_name in ("vision", "text"):
            shapes |= {f"{side_name}_proj{end}.{n}": shape for n, shape in projection.items()}
    if momentum:
        shapes |= {"image_queue": (256, 8), "text_queue": (256, 8), "idx_queue": (1, 8)}
        shapes["queue_ptr"] = (1,)
    return shapes


def openai_shapes(side=32):
    """Names and shapes of OpenAI's CLIP, its text side cut to its first layer."""
    shapes = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": ((side // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": (WIDTH, 16),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "positional_embedding": (77, 16),
        "text_projection": (16, 16),
        "logit_scale": (),
        "token_embedding.weight": (50, 16),
        "ln_final.weight": (16,),
        "ln_final.bias": (16,),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (WIDTH,), f"visual.{norm}.bias": (WIDTH,)}
    for block in range(DEPTH):
        for name, shape in TIMM_BLOCK.items():
            for timm, openai in OPENAI_NAMES.items():
                name = name.replace(timm, openai)
            shapes[f"visual.transformer.resblocks.{block}.{name}"] = shape
    shapes["transformer.resblocks.0.attn.in_proj_weight"] = (48, 16)
    return shapes


def speechclip_tensors(hubert, clip):
    """The state dict of SpeechCLIP's parallel model, around its two networks."""
    tensors = {f"audio_encoder.encoder.{name}": value for name, value in hubert.items()}
    tensors |= {f"clip.model.{name}": value for name, value in clip.items()}
    rest = {
        "audio_encoder.weightedsum_layer.weights": (3,),
        "criterion.temperature": (),
        "criterion.eye_mat": (4, 4),
        "parallel_branch.cls": (1, 1, 32),
        "parallel_branch.self_att.model.layers.0.linear1.weight": (64, 32),
        "parallel_branch.linear_proj.weight": (16, 32),
    }
    return tensors | random_tensors(rest)


def random_tensors(shapes, seed=0):
    """float32 arrays by name; norms are near 1, as PyTorch's start."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = np.asarray(0.1 * rng.normal(size=shape), np.float32)
        is_norm = "norm" in name.split(".")[-2:][0] or ".ln_" in name
        tensors[name] = value + 1 if is_norm and name.endswith("weight") else value
    return tensors


def fairseq_tensors(hubert):
    """A transformers HuBERT's tensors under fairseq's names."""
    renamed = {"masked_spec_embed": "mask_emb"}
    rules = (
        ("feature_projection.projection", "post_extract_proj"),
        ("feature_projection.layer_norm", "layer_norm"),
        (
            "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
            "encoder.pos_conv.0.weight_g",
        ),
        (
            "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
            "encoder.pos_conv.0.weight_v",
        ),
        ("encoder.pos_conv_embed.conv", "encoder.pos_conv.0"),
        (".attention.", ".self_attn."),
        ("rel_attn_embed", "relative_attention_bias"),
        ("gru_rel_pos_linear", "grep_linear"),
        ("gru_rel_pos_const", "grep_a"),
        ("feed_forward.intermediate_dense", "fc1"),
        ("feed_forward.output_dense", "fc2"),
    )
    for name in hubert:
        new = renamed.get(name, name)
        for old, replacement in rules:
            new = new.replace(old, replacement)
        if new.startswith("encoder.layers."):
            new = new.replace(".layer_norm.", ".self_attn_layer_norm.")
        if new.startswith("feature_extractor"):
            norm = ".2.1." if "conv_layers.1.layer_norm.weight" in " ".join(hubert) else ".2."
            new = new.replace(".layer_norm.", norm).replace(".conv.", ".0.")
        renamed[name] = new
    tensors = {renamed[name]: value for name, value in hubert.items()}
    return tensors | {
        "final_proj.weight": np.zeros((4, 4), np.float32),
        "label_embs_concat": np.zeros((2, 4), np.float32),
    }


def embeddings(source, inputs):
    """Tokens of the network of converted or published weights."""
    card = open_card(source)
    tower = create_tower(bare_tower(card))
    return jax.jit(tower.apply)(
        {"params": load_weights(source, tower_shapes(bare_tower(card), card["preprocessing"]))},
        *inputs,
    )
