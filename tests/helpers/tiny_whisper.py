"""A tiny Whisper encoder as it would be published: its config.json and its tensors."""

import numpy as np

WHISPER = {
    "model_type": "whisper",
    "d_model": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "num_mel_bins": 80,
    "max_source_positions": 50,
}


def whisper_tensors(seed=0):
    """A tiny Whisper encoder under its published names."""
    shapes = {
        "conv1.weight": (8, 80, 3),
        "conv1.bias": (8,),
        "conv2.weight": (8, 8, 3),
        "conv2.bias": (8,),
        "embed_positions.weight": (50, 8),
        "layer_norm.weight": (8,),
        "layer_norm.bias": (8,),
    }
    for layer in range(2):
        block = {f"self_attn.{p}_proj.weight": (8, 8) for p in "qkv"} | {
            "self_attn.out_proj.weight": (8, 8)
        }
        block |= {f"self_attn.{p}_proj.bias": (8,) for p in ("q", "v", "out")}
        block |= {
            f"{n}.{leaf}": (8,)
            for n in ("self_attn_layer_norm", "final_layer_norm")
            for leaf in ("weight", "bias")
        }
        block |= {"fc1.weight": (12, 8), "fc1.bias": (12,), "fc2.weight": (8, 12), "fc2.bias": (8,)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(seed)
    return {
        f"model.encoder.{name}": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
