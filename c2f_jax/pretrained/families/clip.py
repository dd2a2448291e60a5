"""CLIP's image side, as published for Hugging Face's transformers and in OpenAI's names."""

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
    attention_rules,
    block_rules,
    fused_attention_rules,
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
# OpenAI's files do not say the number of heads.
HEAD_WIDTH = 64
# BLIP-2's vision model has names like CLIP's.
BLIP2_QUERIES = "query_tokens"


def describe(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``VisionTransformer`` and the preprocessing."""
    whole = published.config
    config = DEFAULTS | whole.get("vision_config", whole)
    preprocessing = image_preprocessing(
        published.processor, config, CLIP_MEAN, CLIP_STD, squash=False
    )

    attributes = _attributes(config, preprocessing)
    # ``CLIPVisionModel`` is published without it.
    if "visual_projection.weight" in published.tensors:
        attributes["projection"] = whole.get("projection_dim", config["projection_dim"])

    return attributes, preprocessing


def describe_openai(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``VisionTransformer`` and the preprocessing, from the tensors."""
    tensors = {
        name.removeprefix(published.prefix): value for name, value in published.tensors.items()
    }
    patch = tensors["visual.conv1.weight"]  # (out, in, row, column)
    width = patch.shape[0]
    # Positions are of a square grid and the [CLS].
    patches = tensors["visual.positional_embedding"].shape[0] - 1
    blocks = block_numbers(tensors, r"visual\.transformer\.resblocks\.(\d+)\.ln_1\.weight")
    config = DEFAULTS | {
        "hidden_size": width,
        "intermediate_size": tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": 1 + max(blocks),
        "num_attention_heads": width // HEAD_WIDTH,
        "patch_size": patch.shape[2],
        "image_size": round(patches**0.5) * patch.shape[2],
    }
    preprocessing = image_preprocessing({}, config, CLIP_MEAN, CLIP_STD, squash=False)
    return _attributes(config, preprocessing), preprocessing


def _attributes(config: Attributes, preprocessing: Attributes) -> Attributes:
    # What sets CLIP's ViT apart from the others'.
    return vision_transformer(config, preprocessing) | {
        "layer_scale": False,
        "cls": True,
        "patch_bias": False,
        "input_norm": True,
        "pooling_head": False,
        "projection": 0,
    }


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

OPENAI = Layout(
    name="OpenAI CLIP",
    anchor="visual.class_embedding",
    rules=(
        ("cls", "visual.class_embedding"),
        ("positions", "visual.positional_embedding"),
        *fused_attention_rules(
            f"{BLOCK}/self_attention",
            r"visual.transformer.resblocks.\1.attn.in_proj_",
            r"visual.transformer.resblocks.\1.attn.out_proj",
        ),
        *block_rules(
            BLOCK,
            r"visual.transformer.resblocks.\1",
            ("ln_1", "ln_2"),
            ("mlp.c_fc", "mlp.c_proj"),
        ),
        *module_rules(
            ("patch_embedding", "visual.conv1"),
            ("input_norm", "visual.ln_pre"),
            ("transformer/norm", "visual.ln_post"),
        ),
    ),
    describe=describe_openai,
    # The text side, and the map of the [CLS] into the joint space.
    unused=(r"(?!(.*\.)?visual\.).*", r"visual\.proj"),
    needs_config=False,
)
