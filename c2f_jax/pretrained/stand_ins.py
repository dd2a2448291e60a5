"""Cards of the published networks that the shipped configurations name, without their weights.

With them a run can be compiled on a machine that has no weights.
"""

import dataclasses
from pathlib import Path
from typing import Any

from c2f_jax.pretrained.families import blip2, wav2vec2
from c2f_jax.pretrained.tensor_names import Published

# The sizes of facebook/hubert-base-ls960 and hubert-large-ll60k, as their config.json has them.
_HUBERT = {
    "model_type": "hubert",
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
}
HUBERT_BASE = _HUBERT | {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "conv_bias": False,
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
}
HUBERT_LARGE = _HUBERT | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
_EMPTY = Published({}, config={}, processor={}, settings={}, normalize=None)


def stand_in_card(weights: str | Path) -> dict[str, Any] | None:
    """Return the card that the weights of a folder would have.

    Args:
      weights: a folder that need not exist, such as "weights/hubert_large".

    Returns:
      The card; None if its name is not that of a network known here.
    """
    describe = {
        "hubert_base": lambda: _hubert(HUBERT_BASE, normalize=False),
        "hubert_large": lambda: _hubert(HUBERT_LARGE, normalize=True),
        "blip2": lambda: blip2.describe_hugging_face(_EMPTY),
    }.get(Path(weights).name)
    if describe is None:
        return None
    tower, preprocessing = describe()
    return {"tower": tower, "preprocessing": preprocessing}


def _hubert(config: dict[str, Any], normalize: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    processor = {"do_normalize": normalize}
    published = dataclasses.replace(_EMPTY, config=config, processor=processor)
    return wav2vec2.describe_hugging_face(published)
