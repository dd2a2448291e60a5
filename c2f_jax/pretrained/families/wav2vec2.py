"""wav2vec 2.0, HuBERT and WavLM, as published for Hugging Face's transformers and for fairseq."""

from collections.abc import Mapping

import numpy as np

from c2f_jax.errors import UserError
from c2f_jax.models.layers import BlockStyle
from c2f_jax.pretrained.published_config import (
    block_numbers,
    normalize_flag,
    speech_preprocessing,
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

# The number of heads is not in the tensors; these are the published sizes, width -> heads.
FAIRSEQ_HEADS = {768: 12, 1024: 16, 1280: 16}
# Values of config.json that our network has as constants.
SUPPORTED = {
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "add_adapter": False,
}


def describe_hugging_face(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``Wav2Vec2`` and the preprocessing, from config.json."""
    config = published.config
    normalize = normalize_flag(published.processor.get("do_normalize"), published)

    if config.get("model_type") not in ("wav2vec2", "hubert", "wavlm"):
        raise UserError(
            f"config.json: model_type {config.get('model_type')!r} is not supported; "
            "wav2vec2, hubert and wavlm are"
        )
    # What the network cannot do is refused, not left out.
    for key, supported in SUPPORTED.items():
        if config.get(key, supported) != supported:
            raise UserError(f"config.json: {key}={config[key]!r}; only {supported!r} is supported")

    attributes = {
        "name": "wav2vec2",
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "conv_widths": list(config["conv_dim"]),
        "conv_kernels": list(config["conv_kernel"]),
        "conv_strides": list(config["conv_stride"]),
        "conv_layer_norm": config["feat_extract_norm"] == "layer",
        "conv_bias": bool(config["conv_bias"]),
        "normalize": normalize,
        "pre_norm": bool(config["do_stable_layer_norm"]),
        "position_kernel": config["num_conv_pos_embeddings"],
        "position_groups": config["num_conv_pos_embedding_groups"],
        "position_buckets": 0,
        "position_distance": BlockStyle.position_distance,
    }
    if config["model_type"] == "wavlm":
        attributes["position_buckets"] = config["num_buckets"]
        attributes["position_distance"] = config["max_bucket_distance"]
    return attributes, speech_preprocessing(normalize)


def describe_fairseq(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``Wav2Vec2`` and the preprocessing, from the tensors themselves."""
    settings = published.settings
    task = settings.get("task")  # WavLM's settings have no tasks
    flags = task if isinstance(task, dict) else settings
    normalize = normalize_flag(flags.get("normalize"), published)

    tensors = {
        name.removeprefix(published.prefix): value for name, value in published.tensors.items()
    }
    attributes = _fairseq_attributes(tensors)
    attributes["normalize"] = normalize
    if settings.get("max_distance"):
        attributes["position_distance"] = settings["max_distance"]
    return attributes, speech_preprocessing(normalize)


def _fairseq_attributes(tensors: Mapping[str, np.ndarray]) -> Attributes:
    """Return what the shapes of the tensors say about the network."""
    width = tensors["post_extract_proj.weight"].shape[0]
    if width not in FAIRSEQ_HEADS:
        raise UserError(
            f"a fairseq model of width {width} is not supported; "
            f"widths {', '.join(map(str, FAIRSEQ_HEADS))} are"
        )

    # Kernels of convolutions are (out, in, time).
    convs = "feature_extractor.conv_layers"
    conv_count = len(block_numbers(tensors, r"feature_extractor\.conv_layers\.(\d+)\.0\.weight"))
    kernels = [tensors[f"{convs}.{layer}.0.weight"] for layer in range(conv_count)]
    position = tensors["encoder.pos_conv.0.weight_v"]
    relative = tensors.get("encoder.layers.0.self_attn.relative_attention_bias.weight")
    # Published fairseq models have layer norms in their convolutions exactly where the transformer
    # is pre-norm.
    large = f"{convs}.0.2.1.weight" in tensors

    return {
        "name": "wav2vec2",
        "width": width,
        "depth": len(block_numbers(tensors, r"encoder\.layers\.(\d+)\.fc1\.weight")),
        "heads": FAIRSEQ_HEADS[width],
        "mlp_ratio": tensors["encoder.layers.0.fc1.weight"].shape[0] / width,
        "conv_widths": [kernel.shape[0] for kernel in kernels],
        "conv_kernels": [kernel.shape[2] for kernel in kernels],
        "conv_strides": [5] + [2] * (conv_count - 1),
        "conv_layer_norm": large,
        "conv_bias": f"{convs}.0.0.bias" in tensors,
        "pre_norm": large,
        "position_kernel": position.shape[2],
        "position_groups": width // position.shape[1],
        "position_buckets": 0 if relative is None else relative.shape[0],
        "position_distance": BlockStyle.position_distance,
    }


HUGGING_FACE = Layout(
    name="Hugging Face wav2vec 2.0 / HuBERT / WavLM",
    anchor="feature_projection.projection.weight",
    rules=(
        (r"conv/norm_(scale|bias)", r"feature_extractor.conv_layers.0.layer_norm.\LEAF"),
        ("mask_embedding", "masked_spec_embed?"),
        ("position_conv/kernel", "encoder.pos_conv_embed.conv.weight"),
        ("transformer/relative_positions", "encoder.layers.0.attention.rel_attn_embed.weight"),
        (f"{BLOCK}/self_attention/gate_scale", r"encoder.layers.\1.attention.gru_rel_pos_const"),
        *attention_rules(f"{BLOCK}/self_attention", r"encoder.layers.\1.attention"),
        *block_rules(
            BLOCK,
            r"encoder.layers.\1",
            ("layer_norm", "final_layer_norm"),
            ("feed_forward.intermediate_dense", "feed_forward.output_dense"),
        ),
        *module_rules(
            (r"conv/conv_(\d+)", r"feature_extractor.conv_layers.\1.conv"),
            (r"conv/norm_(\d+)", r"feature_extractor.conv_layers.\1.layer_norm"),
            ("feature_norm", "feature_projection.layer_norm"),
            ("feature_projection", "feature_projection.projection"),
            ("position_conv", "encoder.pos_conv_embed.conv"),
            ("(?:input_norm|transformer/norm)", "encoder.layer_norm"),
            (f"{BLOCK}/self_attention/gate", r"encoder.layers.\1.attention.gru_rel_pos_linear"),
        ),
    ),
    describe=describe_hugging_face,
    unused=(r"(.*\.)?(lm_head|quantizer|project_q|project_hid|projector|classifier)\..*",),
    takes_normalize=True,
)

FAIRSEQ = Layout(
    name="fairseq wav2vec 2.0 / HuBERT / WavLM",
    anchor="post_extract_proj.weight",
    rules=(
        (r"conv/norm_(scale|bias)", r"feature_extractor.conv_layers.0.2.\LEAF"),
        ("mask_embedding", "mask_emb?"),
        ("position_conv/kernel", "encoder.pos_conv.0.weight"),
        (
            "transformer/relative_positions",
            "encoder.layers.0.self_attn.relative_attention_bias.weight",
        ),
        (f"{BLOCK}/self_attention/gate_scale", r"encoder.layers.\1.self_attn.grep_a"),
        *attention_rules(f"{BLOCK}/self_attention", r"encoder.layers.\1.self_attn"),
        *block_rules(
            BLOCK,
            r"encoder.layers.\1",
            ("self_attn_layer_norm", "final_layer_norm"),
            ("fc1", "fc2"),
        ),
        *module_rules(
            (r"conv/conv_(\d+)", r"feature_extractor.conv_layers.\1.0"),
            (r"conv/norm_(\d+)", r"feature_extractor.conv_layers.\1.2.1"),
            ("feature_norm", "layer_norm"),
            ("feature_projection", "post_extract_proj"),
            ("position_conv", "encoder.pos_conv.0"),
            ("(?:input_norm|transformer/norm)", "encoder.layer_norm"),
            (f"{BLOCK}/self_attention/gate", r"encoder.layers.\1.self_attn.grep_linear"),
        ),
    ),
    describe=describe_fairseq,
    unused=(
        r"(.*\.)?(quantizer|project_q|final_proj|proj|target_glu)\..*",
        r"(.*\.)?label_embs_concat",
    ),
    needs_config=False,
    takes_normalize=True,
)
