"""Where each parameter of a network stands in a published file: rules for Hugging Face, fairseq and LAVIS names."""

import re
from dataclasses import dataclass

import jax
import numpy as np

from c2f_jax.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The names that one publisher gives to the tensors of one family.

    Attributes:
      name: what the card calls it.
      anchor: a tensor that every such file holds; what stands before it in its name is the prefix of all names.
      rules: (regular expression over a parameter's path, replacement) in order; the first match whose tensor is there
        counts, for names have changed between versions. A replacement may end in "#0", "#1", "#2" (that third of the
        first axis), and "?" (zeros where it is missing).
      unused: regular expressions of tensors of the same files that the network does not need.
    """

    name: str
    anchor: str
    rules: tuple[tuple[str, str], ...]
    unused: tuple[str, ...] = ()

    def prefix(self, names):
        """The prefix of this layout's names, or None where ``names`` are not of this layout."""
        found = [n for n in names if n == self.anchor or n.endswith(f".{self.anchor}")]
        return min(found, key=len).removesuffix(self.anchor) if found else None


def _attention(path, source, names=("q_proj", "k_proj", "v_proj", "out_proj"), key_bias=True):
    query, key, value, out = (f"{source}.{name}" for name in names)
    return (
        (f"{path}/query/(.*)", rf"{query}.\LEAF"),
        (f"{path}/key/bias", f"{key}.bias" + "?" * (not key_bias)),
        (f"{path}/key/(.*)", rf"{key}.\LEAF"),
        (f"{path}/value/(.*)", rf"{value}.\LEAF"),
        (f"{path}/out/(.*)", rf"{out}.\LEAF"),
    )


def _fused_attention(path, source, out):
    """Query, key and value in one tensor, whose name without "weight" or "bias" is ``source``."""
    parts = enumerate(("query", "key", "value"))
    return (
        *((f"{path}/{part}/(kernel|bias)", rf"{source}\LEAF#{k}") for k, part in parts),
        *_modules((f"{path}/out", out)),
    )


def _modules(*pairs):
    return tuple((f"{path}/([^/]*)", rf"{source}.\LEAF") for path, source in pairs)


def _block_modules(path, source, norms, mlp):
    """Of each block: the norms of its attention and of its MLP, and the two layers of the MLP."""
    parts = zip(
        ("self_attention_norm", "mlp_norm", "mlp_in", "mlp_out"), (*norms, *mlp), strict=True
    )
    return _modules(*((f"{path}/{part}", f"{source}.{name}") for part, name in parts))


BLOCK = r"transformer/block_(\d+)"

WAV2VEC2 = Layout(
    "Hugging Face wav2vec 2.0 / HuBERT / WavLM",
    "feature_projection.projection.weight",
    (
        (r"conv/norm_(scale|bias)", r"feature_extractor.conv_layers.0.layer_norm.\LEAF"),
        ("mask_embedding", "masked_spec_embed?"),
        ("position_conv/kernel", "encoder.pos_conv_embed.conv.weight"),
        ("transformer/relative_positions", "encoder.layers.0.attention.rel_attn_embed.weight"),
        (f"{BLOCK}/self_attention/gate_scale", r"encoder.layers.\1.attention.gru_rel_pos_const"),
        *_attention(f"{BLOCK}/self_attention", r"encoder.layers.\1.attention"),
        *_block_modules(
            BLOCK,
            r"encoder.layers.\1",
            ("layer_norm", "final_layer_norm"),
            ("feed_forward.intermediate_dense", "feed_forward.output_dense"),
        ),
        *_modules(
            (r"conv/conv_(\d+)", r"feature_extractor.conv_layers.\1.conv"),
            (r"conv/norm_(\d+)", r"feature_extractor.conv_layers.\1.layer_norm"),
            ("feature_norm", "feature_projection.layer_norm"),
            ("feature_projection", "feature_projection.projection"),
            ("position_conv", "encoder.pos_conv_embed.conv"),
            ("(?:input_norm|transformer/norm)", "encoder.layer_norm"),
            (f"{BLOCK}/self_attention/gate", r"encoder.layers.\1.attention.gru_rel_pos_linear"),
        ),
    ),
    (r"(.*\.)?(lm_head|quantizer|project_q|project_hid|projector|classifier)\..*",),
)

FAIRSEQ = Layout(
    "fairseq wav2vec 2.0 / HuBERT / WavLM",
    "post_extract_proj.weight",
    (
        (r"conv/norm_(scale|bias)", r"feature_extractor.conv_layers.0.2.\LEAF"),
        ("mask_embedding", "mask_emb?"),
        ("position_conv/kernel", "encoder.pos_conv.0.weight"),
        (
            "transformer/relative_positions",
            "encoder.layers.0.self_attn.relative_attention_bias.weight",
        ),
        (f"{BLOCK}/self_attention/gate_scale", r"encoder.layers.\1.self_attn.grep_a"),
        *_attention(f"{BLOCK}/self_attention", r"encoder.layers.\1.self_attn"),
        *_block_modules(
            BLOCK,
            r"encoder.layers.\1",
            ("self_attn_layer_norm", "final_layer_norm"),
            ("fc1", "fc2"),
        ),
        *_modules(
            (r"conv/conv_(\d+)", r"feature_extractor.conv_layers.\1.0"),
            (r"conv/norm_(\d+)", r"feature_extractor.conv_layers.\1.2.1"),
            ("feature_norm", "layer_norm"),
            ("feature_projection", "post_extract_proj"),
            ("position_conv", "encoder.pos_conv.0"),
            ("(?:input_norm|transformer/norm)", "encoder.layer_norm"),
            (f"{BLOCK}/self_attention/gate", r"encoder.layers.\1.self_attn.grep_linear"),
        ),
    ),
    (r"(.*\.)?(quantizer|project_q|final_proj|proj|target_glu)\..*", r"(.*\.)?label_embs_concat"),
)

WHISPER = Layout(
    "Hugging Face Whisper",
    "encoder.embed_positions.weight",
    (
        ("positions", "encoder.embed_positions.weight"),
        *_attention(f"{BLOCK}/self_attention", r"encoder.layers.\1.self_attn", key_bias=False),
        *_block_modules(
            BLOCK,
            r"encoder.layers.\1",
            ("self_attn_layer_norm", "final_layer_norm"),
            ("fc1", "fc2"),
        ),
        *_modules(
            ("conv_0", "encoder.conv1"),
            ("conv_1", "encoder.conv2"),
            ("transformer/norm", "encoder.layer_norm"),
        ),
    ),
    (r"(.*\.)?(decoder|proj_out)\..*",),
)

_CLIP_NORMS, _CLIP_MLP = ("layer_norm1", "layer_norm2"), ("mlp.fc1", "mlp.fc2")
# What CLIP and SigLIP have in common.
_CLIP_RULES = (
    ("positions", "embeddings.position_embedding.weight"),
    *_attention(f"{BLOCK}/self_attention", r"encoder.layers.\1.self_attn"),
    *_block_modules(BLOCK, r"encoder.layers.\1", _CLIP_NORMS, _CLIP_MLP),
    *_modules(
        ("patch_embedding", "embeddings.patch_embedding"), ("transformer/norm", "post_layernorm")
    ),
)
_CLIP_UNUSED = (
    r"(.*\.)?text_model\..*",
    r"(.*\.)?text_projection\..*",
    r"(.*\.)?logit_(scale|bias)",
    r"(.*\.)?position_ids",
)

CLIP = Layout(
    "Hugging Face CLIP",
    "embeddings.class_embedding",
    (
        ("cls", "embeddings.class_embedding"),
        ("projection/kernel", "visual_projection.weight"),
        *_modules(("input_norm", "pre_layrnorm")),
        *_CLIP_RULES,
    ),
    _CLIP_UNUSED,
)

SIGLIP = Layout(
    "Hugging Face SigLIP",
    "embeddings.patch_embedding.bias",
    (
        ("probe", "head.probe"),
        *_fused_attention("pool_attention", "head.attention.in_proj_", "head.attention.out_proj"),
        *_modules(
            ("pool_norm", "head.layernorm"),
            ("pool_mlp_in", "head.mlp.fc1"),
            ("pool_mlp_out", "head.mlp.fc2"),
        ),
        *_CLIP_RULES,
    ),
    _CLIP_UNUSED,
)

DINOV2 = Layout(
    "Hugging Face DINOv2",
    "embeddings.mask_token",
    (
        ("cls", "embeddings.cls_token"),
        ("positions", "embeddings.position_embeddings"),
        (f"{BLOCK}/self_attention_scale", r"encoder.layer.\1.layer_scale1.lambda1"),
        (f"{BLOCK}/mlp_scale", r"encoder.layer.\1.layer_scale2.lambda1"),
        *_attention(
            f"{BLOCK}/self_attention",
            r"encoder.layer.\1.attention",
            ("attention.query", "attention.key", "attention.value", "output.dense"),
        ),
        *_attention(
            f"{BLOCK}/self_attention",
            r"encoder.layer.\1.attention",
            ("q_proj", "k_proj", "v_proj", "o_proj"),
        ),
        *_block_modules(BLOCK, r"encoder.layer.\1", ("norm1", "norm2"), _CLIP_MLP),
        *_modules(
            ("patch_embedding", "embeddings.patch_embeddings.projection"),
            ("transformer/norm", "layernorm"),
        ),
    ),
    (r"(.*\.)?embeddings\.mask_token", r"classifier\..*"),
)

_VISION = r"vision/" + BLOCK


def _qformer(bert, query_norm, projection, names):
    """``names``: of query, key, value and output in the attention modules."""
    layer = rf"{bert}.encoder.layer.\1"
    return (
        ("queries", "query_tokens"),
        *_attention(f"{BLOCK}/self_attention", f"{layer}.attention", names),
        *_attention(f"{BLOCK}/cross_attention", f"{layer}.crossattention", names),
        *_block_modules(
            BLOCK,
            layer,
            ("attention.output.LayerNorm", "output_query.LayerNorm"),
            ("intermediate_query.dense", "output_query.dense"),
        ),
        *_modules(
            ("input_norm", query_norm),
            ("projection", projection),
            (f"{BLOCK}/cross_attention_norm", f"{layer}.crossattention.output.LayerNorm"),
        ),
    )


BLIP2 = Layout(
    "Hugging Face BLIP-2",
    "query_tokens",
    (
        ("vision/cls", "vision_model.embeddings.class_embedding"),
        ("vision/positions", "vision_model.embeddings.position_embedding"),
        *_fused_attention(
            f"{_VISION}/self_attention",
            r"vision_model.encoder.layers.\1.self_attn.qkv.",
            r"vision_model.encoder.layers.\1.self_attn.projection",
        ),
        *_block_modules(_VISION, r"vision_model.encoder.layers.\1", _CLIP_NORMS, _CLIP_MLP),
        *_modules(
            ("vision/patch_embedding", "vision_model.embeddings.patch_embedding"),
            ("vision/transformer/norm", "vision_model.post_layernorm"),
        ),
        *_qformer(
            "qformer",
            "qformer.layernorm",
            "vision_projection",
            ("attention.query", "attention.key", "attention.value", "output.dense"),
        ),
    ),
    (
        r"(language_model|language_projection|text_projection|itm_head|embeddings)\..*",
        r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*",
        r"(.*\.)?position_ids",
    ),
)

LAVIS = Layout(
    "LAVIS BLIP-2",
    "query_tokens",
    (
        ("vision/cls", "visual_encoder.cls_token"),
        ("vision/positions", "visual_encoder.pos_embed"),
        (f"{_VISION}/self_attention/query/bias", r"visual_encoder.blocks.\1.attn.q_bias"),
        (f"{_VISION}/self_attention/key/bias", r"visual_encoder.blocks.\1.attn.k_bias?"),
        (f"{_VISION}/self_attention/value/bias", r"visual_encoder.blocks.\1.attn.v_bias"),
        *_fused_attention(
            f"{_VISION}/self_attention",
            r"visual_encoder.blocks.\1.attn.qkv.",
            r"visual_encoder.blocks.\1.attn.proj",
        ),
        *_block_modules(_VISION, r"visual_encoder.blocks.\1", ("norm1", "norm2"), _CLIP_MLP),
        *_modules(
            ("vision/patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision/transformer/norm", "ln_vision"),
        ),
        *_qformer(
            "Qformer.bert",
            "Qformer.bert.embeddings.LayerNorm",
            "vision_proj",
            ("self.query", "self.key", "self.value", "output.dense"),
        ),
    ),
    (
        r"Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings|position_ids).*",
        r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
        r"(Qformer\.cls|text_proj|itm_head|opt_proj|t5_proj|opt_model|t5_model)\..*",
        r"temp",
        # The last block and the head of EVA ViT-g, which BLIP-2 leaves out.
        r"visual_encoder\.(blocks\.39|norm|fc_norm|head)\..*",
    ),
)

# LAVIS before Hugging Face BLIP-2: both hold "query_tokens"; what tells them apart is checked in ``find_layout``.
LAYOUTS = (WAV2VEC2, FAIRSEQ, WHISPER, CLIP, SIGLIP, DINOV2, LAVIS, BLIP2)


def find_layout(names):
    """The layout of a file with these tensor names, and the prefix of its names.

    Raises:
      UserError: none fits.
    """
    for layout in LAYOUTS:
        if layout is LAVIS and not any(n.startswith("Qformer.bert.") for n in names):
            continue
        prefix = layout.prefix(names)
        if prefix is not None and not (
            layout in (CLIP, SIGLIP) and "query_tokens" in names
        ):  # a part of BLIP-2
            return layout, prefix
    known = "; ".join(f"{layout.name} ({layout.anchor})" for layout in LAYOUTS)
    shown = ", ".join(sorted(names)[:5])
    raise UserError(f"no known network: its tensors begin with {shown}. Known are: {known}")


def convert_tensors(layout, prefix, tensors, shapes):
    """Parameters of a network from published tensors.

    Args:
      layout: Layout.
      prefix: of its names.
      tensors: name -> array, as published.
      shapes: nested dict of the parameters' shapes (``jax.eval_shape`` of the network's ``init``).

    Returns:
      Nested dict of float32 arrays.

    Raises:
      UserError: lists every missing, unused, misshaped and damaged tensor.
    """
    tensors, used = _fold_weight_norm(tensors), set()
    problems = []

    def convert(path, shape):
        path = "/".join(entry.key for entry in path)
        sources = _sources(layout, path)
        # Heads stand outside the prefix.
        known = [
            (f"{p}{name}", part)
            for name, part, _ in sources
            for p in (prefix, "")
            if f"{p}{name}" in tensors
        ]
        if not known:
            if not any(optional for _, _, optional in sources):
                problems.append(f"missing: {prefix}{sources[0][0]} (for {path})")
            return np.zeros(shape.shape, np.float32)
        name, part = known[0]
        value = np.asarray(tensors[name]).astype(np.float32)
        bad = value.size - np.count_nonzero(np.isfinite(value))
        if bad and name not in used:  # a tensor may hold three parameters
            problems.append(
                f"damaged: {bad} of the {value.size} entries of {name} are NaN or infinite"
            )
        used.add(name)
        try:
            if part:
                value = np.split(value, 3)[int(part)]
            return _arrange(path, value, shape.shape)
        except ValueError:
            problems.append(
                f"misshaped: {name} {tuple(value.shape)} does not fit {path} {tuple(shape.shape)}"
            )
            return np.zeros(shape.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(convert, shapes)
    ignored = [re.compile(pattern) for pattern in layout.unused]
    left = [
        n
        for n in sorted(set(tensors) - used)
        if not any(p.fullmatch(n) or p.fullmatch(n.removeprefix(prefix)) for p in ignored)
    ]
    problems += [f"unused: {name} {tuple(np.shape(tensors[name]))}" for name in left]
    if problems:
        listed = "\n".join(f"  {p}" for p in problems[:40]) + (
            "\n  ..." if len(problems) > 40 else ""
        )
        raise UserError(
            f"the file does not hold the {layout.name} that its configuration describes; tensors that do not "
            f"fit: {len(problems)}\n{listed}"
        )
    return params


def _sources(layout, path):
    """Where a parameter may stand: (name without prefix, third of it or "", whether it may be missing), in order."""
    leaf = {"kernel": "weight", "scale": "weight"}.get(
        path.rpartition("/")[2].removeprefix("norm_"), "bias"
    )
    found = []
    for pattern, replacement in layout.rules:
        match = re.fullmatch(pattern, path)
        if match:
            source = match.expand(replacement.replace(r"\LEAF", leaf))
            name, _, part = source.removesuffix("?").partition("#")
            found.append((name, part, source.endswith("?")))
    if not found:
        raise UserError(f"{layout.name} has no parameter {path}")
    return found


def _arrange(path, value, shape):
    """A published tensor in the axes of the parameter; ValueError where it does not fit."""
    if not path.endswith("kernel"):
        # Published with or without axes of length 1, and biases of attention not divided into heads.
        whole = [n for n in shape if n != 1]
        if [n for n in value.shape if n != 1] not in (
            whole,
            [value.size] if path.endswith("bias") else whole,
        ):
            raise ValueError
        return value.reshape(shape)
    if value.ndim == 3:  # convolution: (out, in, time) -> (time, in, out)
        value = value.transpose(2, 1, 0)
        if value.shape != shape:
            raise ValueError
    elif value.ndim == 4:  # patches: (out, in, row, column) -> (row column in, out)
        value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        if value.shape != shape:
            raise ValueError
    elif value.ndim == 2:  # (out, in) -> (in, out)
        inputs = int(np.prod(shape[:-1])) if path.endswith("/out/kernel") else shape[0]
        if value.shape[1] != inputs:
            raise ValueError
        value = value.T
    return np.ascontiguousarray(value.reshape(shape))


def _fold_weight_norm(tensors):
    """Weights g v / |v| (norm over all axes but the last, time) in place of each pair g, v."""
    folded = dict(tensors)
    for g_name, v_name in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        for name in [n for n in tensors if n.endswith(f".{g_name}")]:
            base = name.removesuffix(g_name)
            if base + v_name not in tensors:
                continue
            g, v = (np.asarray(folded.pop(n)).astype(np.float64) for n in (name, base + v_name))
            axes = tuple(axis for axis in range(v.ndim) if g.shape[axis] == 1)
            folded[f"{base}weight"] = (
                g * v / np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
            ).astype(np.float32)
    return folded
