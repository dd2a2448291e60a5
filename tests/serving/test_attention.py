"""The weights of cross-attention, against those computed by hand in float64."""

import jax
import numpy as np

from c2f_jax.matcher import match


def norm(x, p, epsilon):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * p["scale"] + p["bias"]


def dense(x, p, axes=1):
    return np.tensordot(x, p["kernel"], axes) + p["bias"]


def attend(p, x, context):
    q, k, v = (dense(y, p[n]) for y, n in ((x, "query"), (context, "key"), (context, "value")))
    logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights, dense(np.einsum("hts,shd->thd", weights, v), p["out"], 2)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def by_hand(p, depth, speech, image):
    """Mean over heads and blocks of the cross-attention of one pair without padding."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    x, context = dense(speech, p["speech_input"]), dense(image, p["image_input"])
    found = []
    for layer in range(depth):
        b = p["transformer"][f"block_{layer}"]
        y = norm(x, b["self_attention_norm"], 1e-6)
        x = x + attend(b["self_attention"], y, y)[1]
        weights, out = attend(
            b["cross_attention"], norm(x, b["cross_attention_norm"], 1e-6), context
        )
        found.append(weights.mean(0))
        x = x + out
        y = gelu(dense(norm(x, b["mlp_norm"], 1e-6), b["mlp_in"]))
        x = x + dense(y, b["mlp_out"])
    return np.mean(found, 0)


def test_against_float64(model):
    rng = np.random.default_rng(0)
    (frames, width), (patches, image_width) = map(model.token_shape, ("speech", "image"))
    lengths = np.array([frames, 5, 3, frames - 1], np.int32)
    speech = rng.normal(size=(4, frames, width)).astype(np.float32)
    image = rng.normal(size=(4, patches, image_width)).astype(np.float32)
    found = np.asarray(model.attention(speech, lengths, image))
    assert found.shape == (4, frames, patches)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    encoder = model.experiment.model.multimodal_encoder
    for row, length in enumerate(lengths):
        pair = speech[row, :length].astype(np.float64), image[row].astype(np.float64)
        expected = by_hand(model.params["multimodal_encoder"], encoder.depth, *pair)
        np.testing.assert_allclose(found[row, :length], expected, rtol=2e-4, atol=1e-6)


def test_the_normal_pass_does_not_compute_weights(model):
    """Its program has as many exponentials and products as blocks need, and returns logits."""
    tokens = [np.zeros((4, *model.token_shape(kind)), np.float32) for kind in ("speech", "image")]
    lengths = np.full(4, tokens[0].shape[1], np.int32)
    args = model.experiment.model, model.params, tokens[0], lengths, tokens[1]
    text = match.lower(*args).as_text()
    depth = model.experiment.model.multimodal_encoder.depth
    # Two attentions a block, each with one exponential.
    assert text.count("stablehlo.exponential") == 2 * depth


def test_of_an_answer_and_its_query(retrievers, wav, picture):
    for kind, question in (("image", wav()), ("speech", picture(3))):
        retriever = retrievers[kind]
        query = retriever.read(question)
        answer = retriever.answer([query])[0][0]
        weights = retriever.attention(answer.row, query)
        assert weights.ndim == 2 and weights.shape[1] == retriever.model.token_shape("image")[0]
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
