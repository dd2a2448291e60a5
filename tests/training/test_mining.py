"""Hard negatives as the step mines them: pools, the same on any number of devices, temperature,
sides of the pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from c2f_jax.models.c2f import Encoded
from c2f_jax.objectives import row_keys, sample_hard_negatives, similarity_logits
from c2f_jax.objectives.collectives import all_gather, axis_index
from c2f_jax.objectives.embedding_queue import create_queue, enqueue
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.negative_pool import mine_negatives, negative_pool, with_momentum_tokens
from c2f_jax.training.pairs import Directions, Pair, Rows
from c2f_jax.training.train_step import make_pairs

NO_LOGITS = Directions(jnp.zeros((8, 8)), jnp.zeros((8, 8)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def mine(pool, devices, token_queue, speech, image, ids):
    """Hard-negative images of each global row, as train_step mines them: (columns, ids, tokens,
    scores, legal)."""

    def on_device(speech, image, ids):
        axis = "devices"
        index = axis_index(axis) * ids.shape[0] + jnp.arange(ids.shape[0])
        rows = Rows(ids, index, row_keys(jax.random.key(5), index))
        logits = Directions(
            s2i=similarity_logits(speech.embedding, all_gather(image.embedding, axis), 0.2),
            i2s=similarity_logits(image.embedding, all_gather(speech.embedding, axis), 0.2),
        )
        found = negative_pool(token_queue, rows, Pair(speech, image), logits, 0.2, pool, axis)
        scores, images = found.logits.s2i, found.candidates.image
        columns, legal = sample_hard_negatives(rows.keys, scores, ids, found.ids, found.valid)
        return columns, found.ids[columns], images.tokens[columns], scores, legal

    split = lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:])  # noqa: E731
    found = jax.vmap(on_device, axis_name="devices")(*jax.tree.map(split, (speech, image, ids)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def random_encoded(rng, rows, length):
    z = rng.normal(size=(rows, 6)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return Encoded(
        *map(
            jnp.asarray,
            (z, rng.normal(size=(rows, length, 3)).astype(np.float32), np.full(rows, length)),
        )
    )


def eight_rows():
    index = jnp.arange(8)
    return Rows(index, index, row_keys(jax.random.key(1), index))


@pytest.fixture(scope="module")
def mining():
    """A token queue of 11 slots, 7 written, with speech of 6 tokens; a batch of 8 from a shorter
    bucket, 4 tokens."""
    rng = np.random.default_rng(9)
    old_speech, old_image = random_encoded(rng, 7, 6), random_encoded(rng, 7, 5)
    rows = {
        "id": jnp.arange(7) % 4, "speech": old_speech.embedding, "image": old_image.embedding,
        "speech_tokens": old_speech.tokens, "speech_lengths": old_speech.lengths,
        "image_tokens": old_image.tokens, "image_lengths": old_image.lengths,
    }  # fmt: skip
    return (
        enqueue(create_queue(11, rows), rows),
        random_encoded(rng, 8, 4),
        random_encoded(rng, 8, 5),
    )


@pytest.mark.parametrize("pool, width", [("global", 8), ("queue", 19)])
def test_mined_negatives_are_the_same_on_any_number_of_devices(mining, pool, width):
    ids = jnp.array([0, 1, 1, 2, 3, 4, 0, 5])
    one = mine(pool, 1, *mining, ids)
    columns, negative_ids, _, scores, legal = map(np.asarray, one)
    assert scores.shape == (8, width) and legal.all() and not (negative_ids == ids).any()
    assert len(np.unique(columns)) > 2 and (columns >= 8).any() == (pool == "queue")
    for devices in (2, 4):
        for a, b in zip(mine(pool, devices, *mining, ids), one, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)  # six products, over 0.2: 30 eps


def test_batch_pool_keeps_to_its_own_device(mining):
    ids = jnp.arange(8)
    whole = mine("global", 1, *mining, ids)[3]
    _, negative_ids, _, scores, _ = mine("batch", 4, *mining, ids)
    np.testing.assert_array_equal(np.asarray(negative_ids) // 2, np.arange(8) // 2)
    for device in range(4):
        own = slice(2 * device, 2 * device + 2)
        np.testing.assert_allclose(scores[own], whole[own, own], atol=1e-5)


def test_queue_pool_pads_a_shorter_bucket_to_the_length_of_the_queue(mining):
    token_queue, speech, image = mining
    pool = negative_pool(
        token_queue, eight_rows(), Pair(speech, image), NO_LOGITS, 0.2, "queue", None
    )
    speeches, images = pool.candidates
    assert speeches.tokens.shape == (19, 6, 3) and images.tokens.shape == (19, 5, 3)
    assert speeches.lengths.tolist() == [4] * 8 + [6] * 7 + [0] * 4
    np.testing.assert_array_equal(speeches.tokens[:8, :4], speech.tokens)


def pairs_matched(token_queue, online, candidates, logits, method):
    """The first token of the speech and of the image of each of the 24 pairs that are matched."""
    rows = eight_rows()
    negatives = mine_negatives(token_queue, rows, candidates, logits, 0.2, method, None)
    pairs = make_pairs(online, candidates, negatives, rows.keys, method)
    seen = np.asarray(pairs.speech.tokens), np.asarray(pairs.image.tokens)
    return [(a[0].tobytes(), b[0].tobytes()) for a, b in zip(*seen, strict=True)]


def test_every_pair_with_queue_negatives_has_one_online_and_one_momentum_side(mining):
    token_queue, speech, image = mining
    rng = np.random.default_rng(10)
    online = Pair(speech, image)
    momentum = Pair(random_encoded(rng, 8, 4), random_encoded(rng, 8, 5))
    entries = token_queue.entries
    known = {}  # the first token of every sequence there is -> the encoder that made it
    for name, sequences in (
        ("online", (speech.tokens, image.tokens)),
        ("momentum", (momentum[0].tokens, momentum[1].tokens)),
        ("momentum", (entries["speech_tokens"], entries["image_tokens"])),
    ):
        known |= {np.asarray(row)[0].tobytes(): name for tokens in sequences for row in tokens}
    pairs = pairs_matched(
        token_queue,
        online,
        with_momentum_tokens(online, momentum),
        NO_LOGITS,
        MethodConfig(negatives="queue"),
    )
    sides = [(known[a], known[b]) for a, b in pairs]
    assert all(set(pair) == {"online", "momentum"} for pair in sides), sides
    assert len(set(sides[:8])) == 2, "both kinds of positives occur"


@pytest.mark.parametrize("mining_tau, likest_alone", [(None, True), (0.2, True), (50.0, False)])
def test_a_high_temperature_of_mining_draws_easier_negatives(mining, mining_tau, likest_alone):
    token_queue, speech, image = mining
    likest = (np.arange(8) + 3) % 8  # by far, of each row in both directions
    logits = jnp.zeros((8, 8)).at[np.arange(8), likest].set(100.0)
    online, method = Pair(speech, image), MethodConfig(mining_tau=mining_tau)
    pairs = pairs_matched(token_queue, online, online, Directions(logits, logits), method)
    number = {
        np.asarray(row)[0].tobytes(): i for x in (speech, image) for i, row in enumerate(x.tokens)
    }
    negatives = [number[b] for _, b in pairs[8:16]] + [number[a] for a, _ in pairs[16:]]
    hits = np.mean(np.array(negatives) == np.tile(likest, 2))
    assert hits == 1.0 if likest_alone else hits < 0.6
