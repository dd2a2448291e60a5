"""From a published configuration to the attributes of our network and the preprocessing that belongs to it."""

import re

from c2f_jax.errors import UserError
from c2f_jax.models.layers import BlockStyle
from c2f_jax.models.networks.vision_transformer import CLIP_MEAN, CLIP_STD
from c2f_jax.pretrained import names

BICUBIC = 3  # in preprocessor_config.json
HALF = [0.5, 0.5, 0.5]
IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
# Heads are not seen in the tensors; these are the published sizes.
FAIRSEQ_HEADS = {768: 12, 1024: 16, 1280: 16}
BLIP2_DEFAULTS = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
VISION_DEFAULTS = {
    "clip": {
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        "projection_dim": 512,
    },
    "siglip": {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
    "dinov2": {"patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "mlp_ratio": 4},
}
SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
# Values of config.json that our network has as constants.
WAV2VEC2_SUPPORTED = {
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "add_adapter": False,
}
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def describe(layout, tensors, prefix, config, processor, settings, normalise=None):
    """The network and its preprocessing: (attributes for ``models.create_tower``, preprocessing for the card).

    Args:
      layout: ``names.Layout``.
      tensors: name -> array, as published.
      prefix: of the layout's names.
      config: config.json as a dict; {} where the publisher has none (fairseq, LAVIS).
      processor: preprocessor_config.json as a dict, {} where there is none.
      settings: what a fairseq checkpoint says of its training, else {}.
      normalise: the waveform normalisation flag where the files do not say; None otherwise.

    Raises:
      UserError: a value that is needed is not there, or of a kind that is not supported.
    """
    if layout is names.FAIRSEQ:
        task = settings.get("task")  # WavLM's settings have no tasks
        flag = _flag((task if isinstance(task, dict) else settings).get("normalize"), normalise)
        return _fairseq(tensors, prefix, flag, settings.get("max_distance")), _speech(flag)
    if layout is names.LAVIS:
        tower = _lavis(tensors)
        patches = tensors["visual_encoder.pos_embed"].shape[1] - 1
        side = round(patches**0.5) * tower["vision"]["patch"]
        return tower, _image({}, side, CLIP_MEAN, CLIP_STD, squash=True) | {"position_side": side}
    if not config:
        raise UserError(f"{layout.name}: config.json is needed beside the weights")
    if layout is names.WAV2VEC2:
        flag = _flag(processor.get("do_normalize"), normalise)
        return _wav2vec2(config, flag), _speech(flag)
    if layout is names.WHISPER:
        tower = {"name": "whisper", "width": config["d_model"], "depth": config["encoder_layers"]}
        tower |= {"heads": config["encoder_attention_heads"], "mels": config["num_mel_bins"]}
        tower |= {"mlp_ratio": config["encoder_ffn_dim"] / config["d_model"]}
        return tower | {"positions": config["max_source_positions"]}, _speech(False)
    if layout is names.BLIP2:
        return _blip2(config, processor)
    return _vision(layout, tensors, prefix, config, processor)


def _flag(found, given):
    if found is None and given is None:
        raise UserError(
            "whether waveforms are normalised to mean 0 and variance 1 stands neither in the checkpoint nor in a "
            "preprocessor_config.json: give --normalise=true or --normalise=false as the publisher says "
            "(fairseq: base models false, large ones true)"
        )
    if None not in (found, given) and bool(found) != given:
        raise UserError(
            f"--normalise={given} contradicts the publisher's files, which say {bool(found)}: leave it out"
        )
    return bool(given if found is None else found)


def _speech(normalise):
    return {"sample_rate": 16_000, "normalise": normalise}


def _wav2vec2(config, normalise):
    if config.get("model_type") not in ("wav2vec2", "hubert", "wavlm"):
        raise UserError(
            f"config.json: model_type {config.get('model_type')!r}; wav2vec2, hubert and wavlm are supported"
        )
    for key, supported in WAV2VEC2_SUPPORTED.items():
        if config.get(key, supported) != supported:
            raise UserError(f"config.json: {key}={config[key]!r}; only {supported!r} is supported")
    wavlm = config["model_type"] == "wavlm"
    return {
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
        "normalise": normalise,
        "pre_norm": bool(config["do_stable_layer_norm"]),
        "position_kernel": config["num_conv_pos_embeddings"],
        "position_groups": config["num_conv_pos_embedding_groups"],
        "position_buckets": config["num_buckets"] if wavlm else 0,
        "position_distance": config["max_bucket_distance"]
        if wavlm
        else BlockStyle.position_distance,
    }


def _fairseq(tensors, prefix, normalise, position_distance):
    tensors = {n.removeprefix(prefix): v for n, v in tensors.items()}
    width = tensors["post_extract_proj.weight"].shape[0]
    if width not in FAIRSEQ_HEADS:
        raise UserError(
            f"a fairseq model of width {width}: known are {', '.join(map(str, FAIRSEQ_HEADS))}"
        )
    convs = len(_numbers(tensors, r"feature_extractor\.conv_layers\.(\d+)\.0\.weight"))
    kernels = [tensors[f"feature_extractor.conv_layers.{i}.0.weight"] for i in range(convs)]
    position = tensors["encoder.pos_conv.0.weight_v"]
    # Published fairseq models have layer-normed convolutions exactly where the transformer is pre-norm.
    large = "feature_extractor.conv_layers.0.2.1.weight" in tensors
    relative = tensors.get("encoder.layers.0.self_attn.relative_attention_bias.weight")
    return {
        "name": "wav2vec2",
        "width": width,
        "depth": len(_numbers(tensors, r"encoder\.layers\.(\d+)\.fc1\.weight")),
        "heads": FAIRSEQ_HEADS[width],
        "mlp_ratio": tensors["encoder.layers.0.fc1.weight"].shape[0] / width,
        "conv_widths": [k.shape[0] for k in kernels],
        "conv_kernels": [k.shape[2] for k in kernels],
        "conv_strides": [5] + [2] * (convs - 1),
        "conv_layer_norm": large,
        "conv_bias": "feature_extractor.conv_layers.0.0.bias" in tensors,
        "normalise": normalise,
        "pre_norm": large,
        "position_kernel": position.shape[2],
        "position_groups": width // position.shape[1],
        "position_buckets": 0 if relative is None else relative.shape[0],
        "position_distance": position_distance or BlockStyle.position_distance,
    }


def _vision(layout, tensors, prefix, config, processor):
    family = {names.CLIP: "clip", names.SIGLIP: "siglip", names.DINOV2: "dinov2"}[layout]
    top = config
    config = SIZES | VISION_DEFAULTS[family] | config.get("vision_config", config)
    if config.get("use_swiglu_ffn"):
        raise UserError(
            "config.json: DINOv2 with SwiGLU (giant) is not supported; small, base and large are"
        )
    width = config["hidden_size"]
    ratio = config["mlp_ratio"] if family == "dinov2" else config["intermediate_size"] / width
    mean, std = {"clip": (CLIP_MEAN, CLIP_STD), "siglip": (HALF, HALF), "dinov2": IMAGENET}[family]
    preprocessing = _image(
        processor, config.get("image_size", 224), mean, std, squash=family == "siglip"
    )
    tower = {
        "name": "vision_transformer",
        "width": width,
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": ratio,
        "patch": config["patch_size"],
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "activation": _activation(config["hidden_act"]),
        "epsilon": config["layer_norm_eps"],
        "layer_scale": family == "dinov2",
        "cls": family != "siglip",
        "patch_bias": family != "clip",
        "input_norm": family == "clip",
        "pooling_head": f"{prefix}head.probe" in tensors,
        "projection": 0,
    }
    if "visual_projection.weight" in tensors:
        tower["projection"] = top.get("projection_dim", config["projection_dim"])
    return tower, preprocessing | {
        "position_side": _grid(config.get("image_size", 224), config["patch_size"])
    }


def _blip2(config, processor):
    vision, qformer = (
        BLIP2_DEFAULTS | config.get("vision_config", {}),
        SIZES | config.get("qformer_config", {}),
    )
    preprocessing = _image(processor, vision["image_size"], CLIP_MEAN, CLIP_STD, squash=True)
    tower = {
        "name": "blip2",
        "vision": _eva(vision, preprocessing),
        "queries": config.get("num_query_tokens", 32),
        "width": qformer["hidden_size"],
        "depth": qformer["num_hidden_layers"],
        "heads": qformer["num_attention_heads"],
        "mlp_ratio": qformer["intermediate_size"] / qformer["hidden_size"],
        "cross_every": qformer.get("cross_attention_frequency", 2),
        "epsilon": qformer.get("layer_norm_eps", 1e-12),
        "projection": 0,
    }
    if "Blip2ForImageTextRetrieval" in config.get("architectures", []):
        tower["projection"] = config.get("image_text_hidden_size", 256)
    return tower, preprocessing | {
        "position_side": _grid(vision["image_size"], vision["patch_size"])
    }


def _lavis(tensors):
    patch = tensors["visual_encoder.patch_embed.proj.weight"]
    width, queries = patch.shape[0], tensors["query_tokens"]
    hidden = tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0]
    blocks = 1 + max(_numbers(tensors, r"visual_encoder\.blocks\.(\d+)\.norm1\.weight"))
    layers = 1 + max(
        _numbers(tensors, r"Qformer\.bert\.encoder\.layer\.(\d+)\.attention\.self\.query\.weight")
    )
    cross = _numbers(
        tensors, r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.self\.query\.weight"
    )
    inner = tensors["Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"].shape[0]
    eva = BLIP2_DEFAULTS | {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": min(blocks, 39),
        "num_attention_heads": width // 88,  # EVA ViT-g: 16 heads of 88
        "patch_size": patch.shape[2],
    }
    return {
        "name": "blip2",
        "vision": _eva(eva, {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}),
        "queries": queries.shape[1],
        "width": queries.shape[2],
        "depth": layers,
        "heads": queries.shape[2] // 64,  # BERT base: heads of 64
        "mlp_ratio": inner / queries.shape[2],
        "cross_every": cross[1] - cross[0] if len(cross) > 1 else layers,
        "epsilon": 1e-12,
        "projection": tensors["vision_proj.weight"].shape[0]
        if "vision_proj.weight" in tensors
        else 0,
    }


def _eva(config, preprocessing):
    return {
        "name": "vision_transformer",
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "patch": config["patch_size"],
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "activation": _activation(config["hidden_act"]),
        "epsilon": config["layer_norm_eps"],
        "patch_bias": True,
        "input_norm": False,
    }


def _image(processor, size, mean, std, squash):
    """Preprocessing of images: sides in pixels, and how they get there."""

    def side(value, default):
        if isinstance(value, dict):
            value = value.get("shortest_edge", value.get("height"))
        return int(value or default)

    resize = side(processor.get("size"), size)
    if "size" in processor:
        squash = not (isinstance(processor["size"], int) or "shortest_edge" in processor["size"])
    crop = processor.get("do_center_crop", not squash)
    if int(processor.get("resample", BICUBIC)) != BICUBIC:
        raise UserError(
            'preprocessor_config.json: only bicubic resampling is supported; write "resample": 3 there to take it'
        )
    return {
        "image_size": side(processor.get("crop_size"), resize) if crop else resize,
        "resize": "squash" if squash else "short_side",
        "resize_side": resize,
        "resample": "bicubic",
        "mean": list(processor.get("image_mean") or mean),
        "std": list(processor.get("image_std") or std),
    }


def _activation(name):
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: activation {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _grid(image_size, patch):
    return image_size // patch * patch


def _numbers(tensors, pattern):
    """The numbers of the blocks that have a tensor of this name, in order."""
    found = sorted(int(m.group(1)) for m in (re.fullmatch(pattern, name) for name in tensors) if m)
    if not found:
        raise UserError(f"no tensor is named as in {pattern!r}")
    return found
