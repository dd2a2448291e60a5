"""DINOv2, as published for Hugging Face's transformers."""

from c2f_jax.errors import UserError
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

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULTS = BASE_SIZES | {
    "patch_size": 14,
    "image_size": 224,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "mlp_ratio": 4,
}


def describe(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``VisionTransformer`` and the preprocessing."""
    whole = published.config
    config = DEFAULTS | whole.get("vision_config", whole)
    if config.get("use_swiglu_ffn"):
        raise UserError(
            "config.json: DINOv2 with SwiGLU (giant) is not supported; small, base and large are"
        )
    preprocessing = image_preprocessing(
        published.processor, config, IMAGENET_MEAN, IMAGENET_STD, squash=False
    )

    # What sets DINOv2's ViT apart from the others'.
    attributes = vision_transformer(config, preprocessing) | {
        "mlp_ratio": config["mlp_ratio"],
        "layer_scale": True,
        "cls": True,
        "patch_bias": True,
        "input_norm": False,
        "pooling_head": False,
        "projection": 0,
    }
    return attributes, preprocessing


HUGGING_FACE = Layout(
    name="Hugging Face DINOv2",
    anchor="embeddings.mask_token",
    rules=(
        ("cls", "embeddings.cls_token"),
        ("positions", "embeddings.position_embeddings"),
        (f"{BLOCK}/self_attention_scale", r"encoder.layer.\1.layer_scale1.lambda1"),
        (f"{BLOCK}/mlp_scale", r"encoder.layer.\1.layer_scale2.lambda1"),
        *attention_rules(
            f"{BLOCK}/self_attention",
            r"encoder.layer.\1.attention",
            ("attention.query", "attention.key", "attention.value", "output.dense"),
        ),
        # Names in other versions.
        *attention_rules(
            f"{BLOCK}/self_attention",
            r"encoder.layer.\1.attention",
            ("q_proj", "k_proj", "v_proj", "o_proj"),
        ),
        *block_rules(BLOCK, r"encoder.layer.\1", ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")),
        *module_rules(
            ("patch_embedding", "embeddings.patch_embeddings.projection"),
            ("transformer/norm", "layernorm"),
        ),
    ),
    describe=describe,
    unused=(r"(.*\.)?embeddings\.mask_token", r"classifier\..*"),
)
