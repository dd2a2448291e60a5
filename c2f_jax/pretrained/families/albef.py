"""The image side of ALBEF and BLIP, as published by their authors and for transformers."""

from collections.abc import Mapping

import numpy as np

from c2f_jax.models.networks.vision_transformer import CLIP_MEAN, CLIP_STD
from c2f_jax.pretrained.published_config import (
    BASE_SIZES,
    block_numbers,
    image_preprocessing,
    vision_transformer,
)
from c2f_jax.pretrained.tensor_names import (
    BLOCK,
    Attributes,
    Layout,
    Published,
    Rules,
    block_rules,
    fused_attention_rules,
    module_rules,
)

ENCODER = "visual_encoder"
# Not in the tensors: 12 heads for ViT-B, 16 for ViT-L.
HEAD_WIDTH = 64
# BLIP-2's image side has the same names.
BLIP2_QUERIES = "query_tokens"


# What transformers' config.json leaves out; its epsilon is not that of the authors' code, 1e-6.
HUGGING_FACE_DEFAULTS = BASE_SIZES | {
    "patch_size": 16,
    "image_size": 384,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}


def describe(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``VisionTransformer`` and the preprocessing, from the tensors."""
    tensors = {
        name.removeprefix(published.prefix): value for name, value in published.tensors.items()
    }
    config = tensor_sizes(tensors) | {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    config["num_attention_heads"] = config["hidden_size"] // HEAD_WIDTH
    preprocessing = image_preprocessing({}, config, CLIP_MEAN, CLIP_STD, squash=True)
    return _attributes(config, preprocessing), preprocessing


def describe_hugging_face(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``VisionTransformer`` and the preprocessing, from config.json."""
    config = HUGGING_FACE_DEFAULTS | published.config.get("vision_config", {})
    preprocessing = image_preprocessing(
        published.processor, config, CLIP_MEAN, CLIP_STD, squash=True
    )
    return _attributes(config, preprocessing), preprocessing


def _attributes(config: Attributes, preprocessing: Attributes) -> Attributes:
    # What sets this ViT apart from the others'.
    return vision_transformer(config, preprocessing) | {
        "layer_scale": False,
        "cls": True,
        "patch_bias": True,
        "input_norm": False,
        "pooling_head": False,
        "projection": 0,
    }


def tensor_sizes(tensors: Mapping[str, np.ndarray]) -> Attributes:
    """Return what the shapes of timm's tensors say about the ViT, named as in config.json."""
    patch = tensors[f"{ENCODER}.patch_embed.proj.weight"]  # (out, in, row, column)
    # Positions are of a square grid and the [CLS].
    patches = tensors[f"{ENCODER}.pos_embed"].shape[1] - 1
    return {
        "hidden_size": patch.shape[0],
        "intermediate_size": tensors[f"{ENCODER}.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": 1
        + max(block_numbers(tensors, rf"{ENCODER}\.blocks\.(\d+)\.norm1\.weight")),
        "patch_size": patch.shape[2],
        "image_size": round(patches**0.5) * patch.shape[2],
    }


def timm_rules(path: str = "") -> Rules:
    """Return the rules of timm's ViT under the name ``visual_encoder``, but for its final norm.

    Args:
      path: the ViT's path among our parameters, with a slash at its end.
    """
    block, source = f"{path}{BLOCK}", rf"{ENCODER}.blocks.\1"
    return (
        (f"{path}cls", f"{ENCODER}.cls_token"),
        (f"{path}positions", f"{ENCODER}.pos_embed"),
        *fused_attention_rules(
            f"{block}/self_attention", f"{source}.attn.qkv.", f"{source}.attn.proj"
        ),
        *block_rules(block, source, ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")),
        *module_rules((f"{path}patch_embedding", f"{ENCODER}.patch_embed.proj")),
    )


def hugging_face_rules(path: str = "") -> Rules:
    """Return the rules of the ViT that transformers has for BLIP and BLIP-2.

    Args:
      path: the ViT's path among our parameters, with a slash at its end.
    """
    block, source = f"{path}{BLOCK}", r"vision_model.encoder.layers.\1"
    return (
        (f"{path}cls", "vision_model.embeddings.class_embedding"),
        (f"{path}positions", "vision_model.embeddings.position_embedding"),
        *fused_attention_rules(
            f"{block}/self_attention", f"{source}.self_attn.qkv.", f"{source}.self_attn.projection"
        ),
        *block_rules(block, source, ("layer_norm1", "layer_norm2"), ("mlp.fc1", "mlp.fc2")),
        *module_rules(
            (f"{path}patch_embedding", "vision_model.embeddings.patch_embedding"),
            (f"{path}transformer/norm", "vision_model.post_layernorm"),
        ),
    )


PUBLISHED = Layout(
    name="ALBEF / BLIP",
    anchor=f"{ENCODER}.norm.weight",
    rules=(*timm_rules(), *module_rules(("transformer/norm", f"{ENCODER}.norm"))),
    describe=describe,
    # Text side, heads, momentum copies and queues.
    unused=(rf"(?!(.*\.)?{ENCODER}\.).*",),
    # A ViT alone, such as DeiT, may have been trained with colors normalized another way.
    required=r"(.*\.)?text_(encoder|decoder)\..*",
    excluded=BLIP2_QUERIES,
    needs_config=False,
)

HUGGING_FACE = Layout(
    name="Hugging Face BLIP",
    anchor="vision_model.encoder.layers.0.self_attn.qkv.weight",
    rules=hugging_face_rules(),
    describe=describe_hugging_face,
    unused=(r"(?!(.*\.)?vision_model\.).*",),
    excluded=BLIP2_QUERIES,
)
