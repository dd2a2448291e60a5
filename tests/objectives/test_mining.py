"""Hard negatives as c2f_losses mines them: pools, the same on any number of devices, temperature,
sides of the pairs, several a row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from c2f_jax.objectives import Features, Pair, c2f_losses, create_queues
from c2f_jax.objectives.embedding_queue import enqueue_features

N, QUEUED, SLOTS, TAU = 8, 7, 11, 0.2


class Tokens(NamedTuple):
    tokens: jax.Array
    lengths: jax.Array


def random_features(rng, rows, length):
    z = rng.normal(size=(rows, 6)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    tokens = rng.normal(size=(rows, length, 3)).astype(np.float32)
    # The queue keeps bfloat16; such numbers stay what they are.
    tokens = jnp.asarray(tokens, jnp.bfloat16).astype(jnp.float32)
    return Features(jnp.asarray(z), Tokens(tokens, jnp.full(rows, length)))


class Case(NamedTuple):
    """A token queue of 11 slots, 7 written, with speech of 6 tokens; a batch of 8 from a shorter
    bucket, 4 tokens, by the online and by the momentum encoder."""

    queues: object
    online: Pair
    momentum: Pair
    queued: Pair


def make_case():
    rng = np.random.default_rng(9)
    queued = Pair(random_features(rng, QUEUED, 6), random_features(rng, QUEUED, 5))
    ids = jnp.arange(QUEUED) % 4
    queues = create_queues(*queued, ids, size=0, token_size=SLOTS)
    queues = enqueue_features(queues, queued, ids)
    online, momentum = (
        Pair(random_features(rng, N, 4), random_features(rng, N, 5)) for _ in range(2)
    )
    return Case(queues, online, momentum, queued)


CASE = make_case()


def first_tokens(features):
    """The bytes of each row's first token, which name the row and its encoder."""
    return [np.asarray(row)[0].tobytes() for row in features.tokens.tokens]


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("devices", "per_row", "rows"))
def mine(negatives, ids, mining_tau=None, devices=1, per_row=1, z=None, rows=None):
    """First tokens of the pairs that are matched, in (devices, blocks, rows) order, which of them
    count, and the metrics."""

    def on_device(online, momentum, ids):
        seen = []

        def match(speech, image):
            seen.append((speech.tokens[:, 0], image.tokens[:, 0], speech.lengths))
            return jnp.zeros((speech.tokens.shape[0], 2))

        found = c2f_losses(
            *online, ids, tau=TAU, key=jax.random.key(5), match=match, momentum=momentum,
            queues=CASE.queues, negatives=negatives, mining_tau=mining_tau,
            negatives_per_row=per_row, mining_rows=rows, axis_name="devices",
        )  # fmt: skip
        return seen[0], found.metrics

    batch = CASE.online, CASE.momentum
    if z is not None:
        batch = jax.tree.map(
            lambda x: x._replace(embedding=z), batch, is_leaf=lambda x: isinstance(x, Features)
        )
    split = lambda x: x.reshape(devices, -1, *x.shape[1:])  # noqa: E731
    batch = jax.tree.map(split, (*batch, ids))
    return jax.vmap(on_device, axis_name="devices")(*batch)


def pairs_of(found):
    """Blocks (1 + 2m, n) of (speech, image) names, whatever the number of devices."""
    (speech, image, _), _ = found
    devices, pairs = speech.shape[:2]
    blocks = pairs * devices // N
    order = np.arange(devices * pairs).reshape(devices, blocks, -1).swapaxes(0, 1).reshape(-1)
    speech, image = (np.asarray(x).reshape(-1, 3)[order] for x in (speech, image))
    names = [(a.tobytes(), b.tobytes()) for a, b in zip(speech, image, strict=True)]
    return [names[k * N : (k + 1) * N] for k in range(blocks)]


def id_of_names(ids):
    """First token of every sequence there is -> image id."""
    known = {}
    for pair in (CASE.online, CASE.momentum):
        for features in pair:
            known |= dict(zip(first_tokens(features), np.asarray(ids).tolist(), strict=True))
    for features in CASE.queued:
        known |= dict(zip(first_tokens(features), (np.arange(QUEUED) % 4).tolist(), strict=True))
    return known


IDS = jnp.array([0, 1, 1, 2, 3, 4, 0, 5])


@pytest.mark.parametrize("negatives", ["global", "queue"])
def test_mined_negatives_are_the_same_on_any_number_of_devices(negatives):
    one, known = pairs_of(mine(negatives, IDS)), id_of_names(IDS)
    for own, (_, image) in zip(IDS.tolist(), one[1], strict=True):
        assert known[image] != own
    for own, (speech, _) in zip(IDS.tolist(), one[2], strict=True):
        assert known[speech] != own
    from_queue = {name for features in CASE.queued for name in first_tokens(features)}
    used = {name for block in one[1:] for pair in block for name in pair}
    assert bool(used & from_queue) == (negatives == "queue")
    for devices in (2, 4):
        assert pairs_of(mine(negatives, IDS, devices=devices)) == one


def test_batch_pool_keeps_to_its_own_device():
    ids = jnp.arange(N)
    _, images, speeches = pairs_of(mine("batch", ids, devices=4))
    known = id_of_names(ids)
    assert [known[image] // 2 for _, image in images] == (np.arange(N) // 2).tolist()
    assert [known[speech] // 2 for speech, _ in speeches] == (np.arange(N) // 2).tolist()


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("negatives", ["global", "queue"])
def test_rows_draw_from_their_own_block_on_any_number_of_devices(negatives, rows):
    one, known = pairs_of(mine(negatives, jnp.arange(N), rows=rows)), id_of_names(jnp.arange(N))
    from_queue = {name for features in CASE.queued for name in first_tokens(features)}
    drawn = [image for _, image in one[1]], [speech for speech, _ in one[2]]
    for names in drawn:
        of_block = [
            known[name] // rows == row // rows and known[name] != row
            for row, name in enumerate(names)
            if name not in from_queue
        ]
        assert all(of_block) and len(of_block) > 0
    for devices in (2, 4, 8):
        assert pairs_of(mine(negatives, jnp.arange(N), rows=rows, devices=devices)) == one
    assert one != pairs_of(mine(negatives, jnp.arange(N)))


def test_a_block_as_large_as_the_batch_is_the_whole_batch():
    for rows in (N, 3 * N):
        assert pairs_of(mine("global", IDS, rows=rows)) == pairs_of(mine("global", IDS))


def test_blocks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="mining_rows is 3; it must divide the batch of 8 rows"):
        mine("global", IDS, rows=3)


def test_tokens_are_padded_to_the_length_of_the_queue():
    (_, _, lengths), _ = mine("queue", IDS)
    assert set(np.asarray(lengths).ravel()) == {4, 6}, "both the batch's and the queue's speech"


def test_every_pair_with_queue_negatives_has_one_online_and_one_momentum_side():
    encoder = {}
    for name, pair in (("online", CASE.online), ("momentum", CASE.momentum), ("momentum", CASE.queued)):  # fmt: skip  # noqa: E501
        encoder |= {token: name for features in pair for token in first_tokens(features)}
    blocks = pairs_of(mine("queue", IDS))
    sides = [[(encoder[a], encoder[b]) for a, b in block] for block in blocks]
    assert all(set(pair) == {"online", "momentum"} for block in sides for pair in block), sides
    assert len(set(sides[0])) == 2, "both kinds of positives occur"


@pytest.mark.parametrize("mining_tau, likest_alone", [(None, True), (TAU, True), (50.0, False)])
def test_a_high_temperature_of_mining_draws_easier_negatives(mining_tau, likest_alone):
    # Rows r and r + 4 have almost the same embedding: by far the likest of another id.
    rng = np.random.default_rng(3)
    z = np.tile(np.eye(6)[:4], (2, 1)) + 1e-4 * rng.normal(size=(8, 6))
    z = jnp.asarray(10 * z, jnp.float32)  # cosines of 100: softmax leaves nothing to the others
    ids = jnp.arange(N)
    known = id_of_names(ids)
    _, images, speeches = pairs_of(mine("global", ids, mining_tau, z=z))
    drawn = [known[image] for _, image in images] + [known[speech] for speech, _ in speeches]
    hits = np.mean(np.array(drawn) == np.tile((np.arange(N) + 4) % N, 2))
    assert hits == 1.0 if likest_alone else hits < 0.6


def test_several_negatives_a_row_are_all_different_and_of_other_ids():
    blocks, known = pairs_of(mine("queue", IDS, per_row=3)), id_of_names(IDS)
    assert len(blocks) == 1 + 2 * 3
    pairs = [pair for block in blocks[1:] for pair in block]
    own = np.repeat(np.asarray(IDS), 3)
    images, speeches = pairs[: 3 * N], pairs[3 * N :]
    for row in range(N):
        drawn = slice(3 * row, 3 * row + 3)
        assert len({image for _, image in images[drawn]}) == 3
        assert len({speech for speech, _ in speeches[drawn]}) == 3
    assert all(known[image] != i for i, (_, image) in zip(own, images, strict=True))
    assert all(known[speech] != i for i, (speech, _) in zip(own, speeches, strict=True))
