"""CLIP's image side, as published for Hugging Face's transformers."""

from c2f_jax.models.networks.vision_transformer import CLIP_MEAN, CLIP_STD
from c2f_jax.pretrained.published_config import (
    BASE_SIZES,
    image_preprocessing,
    vision_transformer,
)
from c2f_jax.pretrained.tensor_names import (
    BLOCK,
    Attributes,
    Layout,
    Published,
    attention_rules,
    block_rules,
    module_rules,
)

DEFAULTS = BASE_SIZES | {
    "patch_size": 32,
    "image_size": 224,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
    "projection_dim": 512,
}
# SigLIP has these too.
TRANSFORMER_RULES = (
    ("positions", "embeddings.position_embedding.weight"),
    *attention_rules(f"{BLOCK}/self_attention", r"encoder.layers.\1.self_attn"),
    *block_rules(
        BLOCK, r"encoder.layers.\1", ("layer_norm1", "layer_norm2"), ("mlp.fc1", "mlp.fc2")
    ),
    *module_rules(
        ("patch_embedding", "embeddings.patch_embedding"), ("transformer/norm", "post_layernorm")
    ),
)
TEXT_SIDE = (
    r"(.*\.)?text_model\..*",
    r"(.*\.)?text_projection\..*",
    r"(.*\.)?logit_(scale|bias)",
    r"(.*\.)?position_ids",
)
# BLIP-2's vision model has names like CLIP's.
BLIP2_QUERIES = "query_tokens"


def describe(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``VisionTransformer`` and the preprocessing."""
    whole = published.config
    config = DEFAULTS | whole.get("vision_config", whole)
    preprocessing = image_preprocessing(
        published.processor, config, CLIP_MEAN, CLIP_STD, squash=False
    )

    # What sets CLIP's ViT apart from the others'.
    attributes = vision_transformer(config, preprocessing) | {
        "layer_scale": False,
        "cls": True,
        "patch_bias": False,
        "input_norm": True,
        "pooling_head": False,
        "projection": 0,
    }
    # ``CLIPVisionModel`` is published without it.
    if "visual_projection.weight" in published.tensors:
        attributes["projection"] = whole.get("projection_dim", config["projection_dim"])

    return attributes, preprocessing


HUGGING_FACE = Layout(
    name="Hugging Face CLIP",
    anchor="embeddings.class_embedding",
    rules=(
        ("cls", "embeddings.class_embedding"),
        ("projection/kernel", "visual_projection.weight"),
        *module_rules(("input_norm", "pre_layrnorm")),
        *TRANSFORMER_RULES,
    ),
    describe=describe,
    unused=TEXT_SIDE,
    excluded=BLIP2_QUERIES,
)
