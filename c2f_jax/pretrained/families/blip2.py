"""BLIP-2's image side, as published for Hugging Face's transformers and by LAVIS."""

from collections.abc import Mapping

import numpy as np

from c2f_jax.models.networks.vision_transformer import CLIP_MEAN, CLIP_STD
from c2f_jax.pretrained.families.albef import hugging_face_rules, tensor_sizes, timm_rules
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
    attention_rules,
    block_rules,
    module_rules,
)

# EVA ViT-g without its last block, which BLIP-2 leaves out.
EVA_DEFAULTS: Attributes = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
# LAVIS's files do not say the number of heads; the width of a head is that of EVA ViT-g and BERT.
EVA_HEAD_WIDTH = 88
BERT_HEAD_WIDTH = 64
BERT_EPSILON = 1e-12
LAVIS_QFORMER = r"Qformer\.bert\..*"
VISION_BLOCK = f"vision/{BLOCK}"


def describe_hugging_face(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``Blip2`` and the preprocessing, from config.json."""
    config = published.config
    vision = EVA_DEFAULTS | config.get("vision_config", {})
    qformer = BASE_SIZES | config.get("qformer_config", {})
    preprocessing = image_preprocessing(
        published.processor, vision, CLIP_MEAN, CLIP_STD, squash=True
    )

    attributes = {
        "name": "blip2",
        "vision": _eva(vision, preprocessing),
        "queries": config.get("num_query_tokens", 32),
        "width": qformer["hidden_size"],
        "depth": qformer["num_hidden_layers"],
        "heads": qformer["num_attention_heads"],
        "mlp_ratio": qformer["intermediate_size"] / qformer["hidden_size"],
        "cross_every": qformer.get("cross_attention_frequency", 2),
        "epsilon": qformer.get("layer_norm_eps", BERT_EPSILON),
        "projection": 0,
    }
    if "Blip2ForImageTextRetrieval" in config.get("architectures", []):
        attributes["projection"] = config.get("image_text_hidden_size", 256)
    return attributes, preprocessing


def describe_lavis(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``Blip2`` and the preprocessing, from the tensors themselves."""
    tensors = published.tensors
    vision = _lavis_vision(tensors)
    preprocessing = image_preprocessing({}, vision, CLIP_MEAN, CLIP_STD, squash=True)

    queries = tensors["query_tokens"]  # (1, queries, width)
    layer = r"Qformer\.bert\.encoder\.layer\.(\d+)"
    depth = 1 + max(block_numbers(tensors, rf"{layer}\.attention\.self\.query\.weight"))
    cross = block_numbers(tensors, rf"{layer}\.crossattention\.self\.query\.weight")
    hidden = tensors["Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"].shape[0]
    width = queries.shape[2]

    attributes = {
        "name": "blip2",
        "vision": _eva(vision, preprocessing),
        "queries": queries.shape[1],
        "width": width,
        "depth": depth,
        "heads": width // BERT_HEAD_WIDTH,
        "mlp_ratio": hidden / width,
        "cross_every": cross[1] - cross[0] if len(cross) > 1 else depth,
        "epsilon": BERT_EPSILON,
        "projection": 0,
    }
    # Files of the second stage have no contrastive head.
    if "vision_proj.weight" in tensors:
        attributes["projection"] = tensors["vision_proj.weight"].shape[0]
    return attributes, preprocessing


def _lavis_vision(tensors: Mapping[str, np.ndarray]) -> Attributes:
    """Return what the shapes of LAVIS's tensors say about the ViT, named as in config.json."""
    sizes = EVA_DEFAULTS | tensor_sizes(tensors)
    sizes["num_hidden_layers"] = min(sizes["num_hidden_layers"], EVA_DEFAULTS["num_hidden_layers"])
    sizes["num_attention_heads"] = sizes["hidden_size"] // EVA_HEAD_WIDTH
    return sizes


def _eva(config: Attributes, preprocessing: Attributes) -> Attributes:
    return vision_transformer(config, preprocessing) | {"patch_bias": True, "input_norm": False}


def _qformer_rules(
    bert: str, query_norm: str, projection: str, names: tuple[str, str, str, str]
) -> Rules:
    """Return the rules of the Q-Former.

    Args:
      bert: published name of the Q-Former.
      query_norm: published name of the norm of the queries before the first block.
      projection: published name of the map into the contrastive space.
      names: published names of query, key, value and output in the attention modules.
    """
    layer = rf"{bert}.encoder.layer.\1"
    return (
        ("queries", "query_tokens"),
        *attention_rules(f"{BLOCK}/self_attention", f"{layer}.attention", names),
        *attention_rules(f"{BLOCK}/cross_attention", f"{layer}.crossattention", names),
        *block_rules(
            BLOCK,
            layer,
            ("attention.output.LayerNorm", "output_query.LayerNorm"),
            ("intermediate_query.dense", "output_query.dense"),
        ),
        *module_rules(
            ("input_norm", query_norm),
            ("projection", projection),
            (f"{BLOCK}/cross_attention_norm", f"{layer}.crossattention.output.LayerNorm"),
        ),
    )


HUGGING_FACE = Layout(
    name="Hugging Face BLIP-2",
    anchor="query_tokens",
    rules=(
        *hugging_face_rules("vision/"),
        *_qformer_rules(
            "qformer",
            "qformer.layernorm",
            "vision_projection",
            ("attention.query", "attention.key", "attention.value", "output.dense"),
        ),
    ),
    describe=describe_hugging_face,
    unused=(
        r"(language_model|language_projection|text_projection|itm_head|embeddings)\..*",
        r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*",
        r"(.*\.)?position_ids",
    ),
    excluded=LAVIS_QFORMER,
)

LAVIS = Layout(
    name="LAVIS BLIP-2",
    anchor="query_tokens",
    rules=(
        (f"{VISION_BLOCK}/self_attention/query/bias", r"visual_encoder.blocks.\1.attn.q_bias"),
        (f"{VISION_BLOCK}/self_attention/key/bias", r"visual_encoder.blocks.\1.attn.k_bias?"),
        (f"{VISION_BLOCK}/self_attention/value/bias", r"visual_encoder.blocks.\1.attn.v_bias"),
        *timm_rules("vision/"),
        *module_rules(("vision/transformer/norm", "ln_vision")),
        *_qformer_rules(
            "Qformer.bert",
            "Qformer.bert.embeddings.LayerNorm",
            "vision_proj",
            ("self.query", "self.key", "self.value", "output.dense"),
        ),
    ),
    describe=describe_lavis,
    unused=(
        r"Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings|position_ids).*",
        r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
        r"(Qformer\.cls|text_proj|itm_head|opt_proj|t5_proj|opt_model|t5_model)\..*",
        r"temp",
        # The last block and the head of EVA ViT-g, which BLIP-2 leaves out.
        r"visual_encoder\.(blocks\.39|norm|fc_norm|head)\..*",
    ),
    required=LAVIS_QFORMER,
    needs_config=False,
)
