"""SigLIP's image side, as published for Hugging Face's transformers."""

from c2f_jax.pretrained.families import clip
from c2f_jax.pretrained.published_config import (
    BASE_SIZES,
    image_preprocessing,
    vision_transformer,
)
from c2f_jax.pretrained.tensor_names import (
    Attributes,
    Layout,
    Published,
    fused_attention_rules,
    module_rules,
)

MEAN = STD = (0.5, 0.5, 0.5)
DEFAULTS = BASE_SIZES | {
    "patch_size": 16,
    "image_size": 224,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}


def describe(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``VisionTransformer`` and the preprocessing."""
    whole = published.config
    config = DEFAULTS | whole.get("vision_config", whole)
    preprocessing = image_preprocessing(published.processor, config, MEAN, STD, squash=True)

    # What sets SigLIP's ViT apart from the others'.
    attributes = vision_transformer(config, preprocessing) | {
        "layer_scale": False,
        "cls": False,
        "patch_bias": True,
        "input_norm": False,
        "pooling_head": f"{published.prefix}head.probe" in published.tensors,
        "projection": 0,
    }
    return attributes, preprocessing


HUGGING_FACE = Layout(
    name="Hugging Face SigLIP",
    anchor="embeddings.patch_embedding.bias",
    rules=(
        ("probe", "head.probe"),
        *fused_attention_rules(
            "pool_attention", "head.attention.in_proj_", "head.attention.out_proj"
        ),
        *module_rules(
            ("pool_norm", "head.layernorm"),
            ("pool_mlp_in", "head.mlp.fc1"),
            ("pool_mlp_out", "head.mlp.fc2"),
        ),
        *clip.TRANSFORMER_RULES,
    ),
    describe=describe,
    unused=clip.TEXT_SIDE,
    excluded=clip.BLIP2_QUERIES,
)
