"""What the parity tests share: PyTorch networks with random weights, ours with the same ones, and
comparisons."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from c2f_jax.models.factory import create_tower
from c2f_jax.pretrained.families import find_layout
from c2f_jax.pretrained.networks import tower_shapes
from c2f_jax.pretrained.published_files import describe
from c2f_jax.pretrained.tensor_names import Published, convert_tensors

torch = pytest.importorskip(
    "torch", reason="the parity tests need the extra `parity` (torch, transformers)"
)
transformers = pytest.importorskip(
    "transformers", reason="the parity tests need the extra `parity`"
)

TOLERANCE = 1e-4
TINY_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
TINY_WAVLM = TINY_SPEECH | {"num_buckets": 8, "max_bucket_distance": 12}
LARGE_KIND = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
TINY_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
    "image_size": 32,
}
TINY_QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
    "vocab_size": 50,
}
TINY_BLIP2 = {"vision_config": TINY_VISION, "qformer_config": TINY_QFORMER, "num_query_tokens": 5}


def reference(model, *args, seed=0):
    """``model(*args)``, a PyTorch model in evaluation mode, the same in every run.

    Every parameter is moved from its initial value, so that none is 0 or 1.
    """
    torch.manual_seed(seed)
    model, generator = model(*args), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tensors_of(model, gradients=False):
    """Parameters of a PyTorch model, or their gradients, under their published names."""
    names = "model.encoder." if type(model).__name__ == "WhisperEncoder" else ""
    if not gradients:
        return {names + name: value.numpy() for name, value in model.state_dict().items()}
    return {
        names + name: (torch.zeros_like(value) if value.grad is None else value.grad).numpy()
        for name, value in model.named_parameters()
    }


def ours(model, gradients=False, **changes):
    """Our network with the weights of a PyTorch model, or with their gradients in their place:
    (module, parameters)."""
    tensors = tensors_of(model, gradients)
    layout, prefix = find_layout(tensors)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    normalize = False if layout.takes_normalize else None
    published = Published(tensors, prefix, config, normalize=normalize)
    tower, preprocessing = describe(layout, published)
    params, _ = convert_tensors(layout, prefix, tensors, tower_shapes(tower, preprocessing))
    return create_tower(tower | changes), params


def assert_gradients_agree(model, expected, output, seed=1):
    """Gradients of every parameter, of a random linear form of ``expected`` (PyTorch) and
    ``output(module, params)``.

    The error is relative to the largest entry of the parameter's gradient, or, of one that nearly
    vanishes, such as that of the keys' biases, to a thousandth of the largest of all.
    """
    module, params = ours(model)
    weights = np.random.default_rng(seed).normal(size=expected.shape).astype(np.float32)
    model.zero_grad()
    (expected * torch.from_numpy(weights)).sum().backward()
    theirs = ours(model, gradients=True)[1]
    found = jax.jit(jax.grad(lambda p: jnp.sum(output(module, p) * weights)))(params)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs))
    assert largest > 0
    errors = jax.tree.map(
        lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest), found, theirs
    )
    report("gradients", max(jax.tree.leaves(errors)))
    assert max(jax.tree.leaves(errors)) < 1e-3, errors


def report(what, error):
    """The largest errors, shown by ``pytest -s``."""
    print(f"{os.environ.get('PYTEST_CURRENT_TEST', '').partition('::')[2]} {what}: {error:.1e}")


def assert_close(found, expected, tolerance=TOLERANCE):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    report("error", np.abs(found - expected).max(initial=0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def assert_hidden_states_agree(found, expected, until=None, tolerance=TOLERANCE):
    """All hidden states; ``until`` bounds the compared time steps of each example."""
    assert len(found) == len(expected)
    for ours_, theirs in zip(found, expected, strict=True):
        for row in range(len(ours_)):
            stop = None if until is None else int(until[row])
            assert_close(ours_[row, :stop], theirs[row, :stop], tolerance)


def waveforms(*lengths, size=None, seed=0):
    rng, wave = (
        np.random.default_rng(seed),
        np.zeros((len(lengths), size or max(lengths)), np.float32),
    )
    for row, length in enumerate(lengths):
        wave[row, :length] = 0.3 * rng.normal(size=length) + 0.05
    return wave, np.array(lengths, np.int32)


def images(side, count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def pixels(image, module):
    """What the reference processors make of an image that has the right size already."""
    vision = getattr(module, "vision", module)
    x = (image / 255.0 - np.array(vision.mean)) / np.array(vision.std)
    return torch.from_numpy(x.astype(np.float32).transpose(0, 3, 1, 2))


def speech(name, **values):
    kinds = {
        "hubert": (transformers.HubertModel, transformers.HubertConfig),
        "wav2vec2": (transformers.Wav2Vec2Model, transformers.Wav2Vec2Config),
        "wavlm": (transformers.WavLMModel, transformers.WavLMConfig),
    }
    model, config = kinds[name]
    config = config(**values)
    config._attn_implementation = "eager"
    return reference(model, config)


def vision(name, values):
    kinds = {
        "clip": (transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig),
        "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
        "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config),
    }
    model, config = kinds[name]
    return reference(model, config(**values, attn_implementation="eager"))


def blip2(values):
    config = transformers.Blip2Config(**values)
    config._attn_implementation = "eager"
    return reference(transformers.Blip2ForImageTextRetrieval, config)
