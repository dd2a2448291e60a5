"""Whisper's encoder, as published for Hugging Face's transformers."""

from c2f_jax.pretrained.published_config import speech_preprocessing
from c2f_jax.pretrained.tensor_names import (
    BLOCK,
    Attributes,
    Layout,
    Published,
    attention_rules,
    block_rules,
    module_rules,
)


def describe(published: Published) -> tuple[Attributes, Attributes]:
    """Return the attributes of ``Whisper`` and the preprocessing."""
    config = published.config
    attributes = {
        "name": "whisper",
        "width": config["d_model"],
        "depth": config["encoder_layers"],
        "heads": config["encoder_attention_heads"],
        "mels": config["num_mel_bins"],
        "mlp_ratio": config["encoder_ffn_dim"] / config["d_model"],
        "positions": config["max_source_positions"],
    }
    return attributes, speech_preprocessing(normalize=False)


HUGGING_FACE = Layout(
    name="Hugging Face Whisper",
    anchor="encoder.embed_positions.weight",
    rules=(
        ("positions", "encoder.embed_positions.weight"),
        *attention_rules(f"{BLOCK}/self_attention", r"encoder.layers.\1.self_attn", key_bias=False),
        *block_rules(
            BLOCK,
            r"encoder.layers.\1",
            ("self_attn_layer_norm", "final_layer_norm"),
            ("fc1", "fc2"),
        ),
        *module_rules(
            ("conv_0", "encoder.conv1"),
            ("conv_1", "encoder.conv2"),
            ("transformer/norm", "encoder.layer_norm"),
        ),
    ),
    describe=describe,
    unused=(r"(.*\.)?(decoder|proj_out)\..*",),
)
