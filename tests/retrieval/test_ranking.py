"""Coarse and fine search against brute force: chunks that do not divide, ties, several right items,
k at both ends."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from c2f_jax.errors import UserError
from c2f_jax.retrieval import ranking, reranking


def tied_embeddings(rows, seed):
    """Rows of {-1, 0, 1}: products are small integers, exact in float32, with many ties."""
    return np.random.default_rng(seed).integers(-1, 2, (rows, 4)).astype(np.float32)


def brute_force_order(queries, gallery):
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    return scores, np.array(
        [sorted(range(len(gallery)), key=lambda j, row=row: (-row[j], j)) for row in scores]
    )


@pytest.mark.parametrize(
    ("chunk", "gallery_chunk"), [(7, 11), (1, 1), (23, 61), (1000, 1000), (4, 60), (8, 2)]
)
def test_coarse_top_k_equals_brute_force_with_ties(chunk, gallery_chunk):
    queries, gallery = tied_embeddings(23, 0), tied_embeddings(61, 1)
    expected_scores, expected = brute_force_order(queries, gallery)
    for k in (1, 5, 61):
        scores, indices = ranking.coarse_top_k(
            queries, gallery, k, chunk=chunk, gallery_chunk=gallery_chunk
        )
        assert indices.shape == scores.shape == (23, k)
        np.testing.assert_array_equal(indices, expected[:, :k])
        np.testing.assert_array_equal(
            scores, np.take_along_axis(expected_scores, expected[:, :k], 1)
        )


def test_coarse_top_k_of_random_floats_and_bfloat16():
    rng = np.random.default_rng(2)
    queries, gallery = rng.normal(size=(10, 16)), rng.normal(size=(40, 16))
    _, expected = brute_force_order(queries, gallery)
    found = ranking.coarse_top_k(queries, gallery, 8, chunk=3, gallery_chunk=9)[1]
    np.testing.assert_array_equal(found, expected[:, :8])
    queries, gallery = queries.astype(ml_dtypes.bfloat16), gallery.astype(ml_dtypes.bfloat16)
    _, expected = brute_force_order(queries, gallery)
    np.testing.assert_array_equal(ranking.coarse_top_k(queries, gallery, 8)[1], expected[:, :8])


def test_k_above_the_gallery_is_cut_to_it():
    scores, indices = ranking.coarse_top_k(tied_embeddings(3, 0), tied_embeddings(5, 1), 128)
    assert indices.shape == (3, 5) and np.isfinite(scores).all()
    np.testing.assert_array_equal(np.sort(indices, axis=1), np.tile(np.arange(5), (3, 1)))


def test_a_collapsed_model_ranks_in_gallery_order():
    gallery = np.ones((30, 4), np.float32)
    np.testing.assert_array_equal(
        ranking.coarse_top_k(gallery, gallery, 4, gallery_chunk=7)[1][9], [0, 1, 2, 3]
    )
    ranks = ranking.first_relevant_rank(
        gallery, gallery, np.arange(30), np.arange(30), chunk=4, gallery_chunk=7
    )
    np.testing.assert_array_equal(ranks, np.arange(1, 31))


@pytest.mark.parametrize(("chunk", "gallery_chunk"), [(7, 11), (5, 1), (1000, 1000)])
def test_first_relevant_rank_equals_brute_force_with_ties_and_several_right_items(
    chunk, gallery_chunk
):
    queries, gallery = tied_embeddings(23, 3), tied_embeddings(61, 4)
    rng = np.random.default_rng(5)
    gallery_ids = rng.integers(0, 15, 61) + 2**40  # far outside int32
    query_ids = rng.choice(gallery_ids, 23)
    _, order = brute_force_order(queries, gallery)
    expected = [
        1 + next(place for place, j in enumerate(row) if gallery_ids[j] == wanted)
        for row, wanted in zip(order, query_ids, strict=True)
    ]
    ranks = ranking.first_relevant_rank(
        queries, gallery, query_ids, gallery_ids, chunk=chunk, gallery_chunk=gallery_chunk
    )
    np.testing.assert_array_equal(ranks, expected)
    assert len(set(expected)) > 5


def test_padding_of_the_gallery_never_ranks_ahead_of_a_negative_cosine():
    gallery = -np.ones((5, 2), np.float32)
    ranks = ranking.first_relevant_rank(
        -gallery, gallery, np.arange(5), np.arange(5), chunk=2, gallery_chunk=3
    )
    np.testing.assert_array_equal(ranks, [1, 2, 3, 4, 5])


def test_a_chunk_size_compiles_once():
    queries, gallery = tied_embeddings(50, 0), tied_embeddings(90, 1)
    before = ranking._merge_top_k._cache_size()
    ranking.coarse_top_k(queries, gallery, 3, chunk=8, gallery_chunk=16)
    ranking.coarse_top_k(queries[:31], gallery[:77], 3, chunk=8, gallery_chunk=16)
    assert ranking._merge_top_k._cache_size() == before + 1


def numbered_tokens(rows, length, dtype=np.float32):
    return np.broadcast_to(
        np.arange(rows, dtype=np.float64)[:, None, None], (rows, length, 2)
    ).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("direction", ["s2i", "i2s"])
def test_matching_gives_each_pair_its_own_logit(direction, dtype):
    speech, images, lengths = (
        numbered_tokens(9, 5, dtype),
        numbered_tokens(6, 3, dtype),
        np.arange(1, 10) % 5 + 1,
    )
    shapes = set()

    def match_fn(speech_tokens, speech_lengths, image_tokens):
        shapes.add(
            (speech_tokens.shape, speech_lengths.shape, image_tokens.shape, speech_tokens.dtype)
        )
        speech_rows, image_rows = (
            tokens[:, 0, 0].astype(float) for tokens in (speech_tokens, image_tokens)
        )
        answer = 10000 * speech_rows + 100 * image_rows + speech_lengths
        return np.stack([0.25 * answer, 1.25 * answer], 1)

    rows, columns = (9, 6) if direction == "s2i" else (6, 9)
    candidates = np.array(
        [np.random.default_rng(row).permutation(columns)[:4] for row in range(rows)]
    )
    tokens = (speech, images) if direction == "s2i" else (images, speech)
    logits = reranking.match_candidates(
        match_fn, *tokens, candidates, direction=direction, speech_lengths=lengths, pair_chunk=7
    )
    for row in range(rows):
        for place, column in enumerate(candidates[row]):
            s, i = (row, column) if direction == "s2i" else (column, row)
            assert logits[row, place] == 10000 * s + 100 * i + lengths[s]
    assert shapes == {
        ((7, 5, 2), (7,), (7, 3, 2), np.dtype(dtype))
    }  # a fixed shape: one compilation


def test_matching_with_a_jitted_matcher_compiles_once_and_larger_chunks_change_nothing():
    rng = np.random.default_rng(0)
    speech, images = (
        rng.normal(size=(8, 5, 4)).astype(np.float32),
        rng.normal(size=(6, 3, 4)).astype(np.float32),
    )

    @jax.jit
    def match_fn(speech_tokens, speech_lengths, image_tokens):
        score = jnp.einsum("btw,bpw->b", speech_tokens, image_tokens) / speech_lengths
        return jnp.stack([-score, score], axis=1)

    candidates = np.array([rng.permutation(6) for _ in range(8)])
    results = [
        reranking.match_candidates(
            match_fn,
            speech,
            images,
            candidates,
            direction="s2i",
            speech_lengths=np.full(8, 5),
            pair_chunk=chunk,
        )
        for chunk in (5, 48, 500)
    ]
    expected = 2 * np.einsum("stw,ipw->si", speech.astype(float), images.astype(float)) / 5
    for result in results:
        np.testing.assert_allclose(
            result, np.take_along_axis(expected, candidates, 1), rtol=1e-4, atol=1e-4
        )
    assert match_fn._cache_size() == 3  # one a chunk size


@pytest.mark.parametrize("direction", ["s2i", "i2s"])
def test_length_buckets_hand_over_fewer_frames_and_the_same_answers(direction):
    rng = np.random.default_rng(1)
    lengths = np.array([1, 3, 4, 5, 6, 10, 10, 7, 2])
    speech, images = (
        rng.normal(size=(9, 10, 2)).astype(np.float32),
        rng.normal(size=(6, 3, 2)).astype(np.float32),
    )
    seen = {}

    def match_fn(speech_tokens, speech_lengths, image_tokens):
        seen.setdefault(speech_tokens.shape[1], set()).update(speech_lengths.tolist())
        valid = np.arange(speech_tokens.shape[1])[None, :] < speech_lengths[:, None]
        score = (speech_tokens * valid[:, :, None]).sum((1, 2)) * image_tokens.sum((1, 2))
        return np.stack([np.zeros_like(score), score], 1)

    columns, rows = (6, 9) if direction == "s2i" else (9, 6)
    tokens = (speech, images) if direction == "s2i" else (images, speech)
    candidates = np.tile(np.arange(columns), (rows, 1))
    settings = {"direction": direction, "speech_lengths": lengths, "pair_chunk": 4}
    whole = reranking.match_candidates(match_fn, *tokens, candidates, **settings)
    assert seen == {10: set(lengths.tolist())}
    seen.clear()
    bucketed = reranking.match_candidates(
        match_fn, *tokens, candidates, length_buckets=3, **settings
    )
    assert seen == {4: {1, 2, 3, 4}, 7: {5, 6, 7}, 10: {10}}
    np.testing.assert_allclose(bucketed, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("most_items", [4, 7, 100])
@pytest.mark.parametrize("direction", ["s2i", "i2s"])
def test_two_stages_give_the_logits_of_one(direction, most_items, processes):
    """Whatever is prepared at once, each item is prepared at the length of its pairs."""
    rng = np.random.default_rng(2)
    lengths = np.array([1, 3, 4, 5, 6, 10, 10, 7, 2])
    speech, images = rng.normal(size=(9, 10, 2)), rng.normal(size=(6, 3, 2))
    prepared = []

    def match_fn(speech_tokens, speech_lengths, image_tokens):
        valid = np.arange(speech_tokens.shape[1])[None, :] < speech_lengths[:, None]
        score = (speech_tokens * valid[:, :, None]).sum((1, 2)) * image_tokens.sum((1, 2))
        return np.stack([np.zeros_like(score), score], 1)

    def fill(rows, size):
        assert len(rows) <= size
        prepared.append(len(rows))
        return np.concatenate([rows, np.full((size - len(rows), *rows.shape[1:]), np.nan)])

    def match_rows(speech, lengths, image, speech_rows, image_rows):
        assert len(speech_rows) == len(image_rows) == 4
        return match_fn(speech[speech_rows] / 2, lengths[speech_rows], image[image_rows] / 2)

    staged = reranking.StagedMatch(
        lambda tokens, lengths, size: fill(2 * tokens, size),
        lambda tokens, size: fill(2 * tokens, size),
        match_rows,
        most_items,
    )
    columns, rows = (6, 9) if direction == "s2i" else (9, 6)
    tokens = (speech, images) if direction == "s2i" else (images, speech)
    candidates = np.stack([rng.permutation(columns)[:5] for _ in range(rows)])

    def match(function):
        return reranking.match_candidates(
            function,
            *tokens,
            candidates,
            direction=direction,
            speech_lengths=lengths,
            pair_chunk=4,
            length_buckets=3,
            share_work=lambda work: [work(p, processes) for p in range(processes)],
        )

    np.testing.assert_allclose(match(staged), match(match_fn), rtol=1e-5)
    if most_items == 100 and processes == 1:
        # Each of the three lengths has its recordings, and at most all images.
        assert sum(prepared) <= 9 + 3 * 6


def test_few_pairs_are_matched_in_one_call():
    calls = []

    def match_fn(speech_tokens, speech_lengths, image_tokens):
        calls.append(speech_tokens.shape)
        return np.zeros((len(speech_tokens), 2))

    reranking.match_candidates(
        match_fn,
        np.ones((1, 3, 2)),
        np.ones((5, 12, 2)),
        np.arange(5)[None],
        direction="i2s",
        speech_lengths=[1, 2, 3, 8, 5],
        pair_chunk=8,
        length_buckets=3,
    )
    assert calls == [(8, 8, 2)]


def test_fine_scores_are_the_written_formulas():
    cosine, match = np.array([[0.5, -0.25]]), np.array([[3.0, -800.0]])
    scores = reranking.fine_scores(cosine, match, tau=0.05)
    np.testing.assert_array_equal(scores["sic"], cosine)
    np.testing.assert_array_equal(scores["sim"], match)
    np.testing.assert_allclose(scores["sum"], [[3.5, -800.25]])
    np.testing.assert_allclose(scores["prob"], [[1 / (1 + np.exp(-3.0)), 0.0]])
    np.testing.assert_allclose(scores["joint"], [[13.0, -805.0]])


def test_joint_score_recovers_the_posterior_that_sic_missed():
    """The docstring's derivation on a small discrete world: the best matcher plus cosine / tau
    ranks as p(i|s)."""
    rng = np.random.default_rng(7)
    joint = rng.dirichlet(np.full(64, 0.5)).reshape(8, 8) + 1e-4
    for _ in range(500):  # uniform marginals on both sides
        joint /= 8 * joint.sum(1, keepdims=True)
        joint /= 8 * joint.sum(0, keepdims=True)
    similarity = rng.normal(size=(8, 8))  # cosine / tau, made so that Z is the same for all
    noise = np.exp(similarity)
    for _ in range(500):
        noise /= 8 * noise.sum(1, keepdims=True)
        noise /= 8 * noise.sum(0, keepdims=True)
    tau = 0.1
    cosine = tau * np.log(noise)
    match = np.log(joint) - np.log(2 * noise)  # log p(s,i) - log[p(s) q(i|s) + p(i) q(s|i)]
    scores = reranking.fine_scores(cosine, match, tau)
    expected = np.argsort(-joint, axis=1)
    np.testing.assert_array_equal(reranking.fine_order(scores["joint"]), expected)
    assert not np.array_equal(reranking.fine_order(scores["sim"]), expected)


def test_fine_ranks_equal_brute_force():
    rng = np.random.default_rng(8)
    scores = rng.integers(0, 4, (200, 9)).astype(float)  # many ties
    relevant = rng.random((200, 9)) < 0.15
    coarse = np.where(relevant.any(1), relevant.argmax(1) + 1, rng.integers(10, 50, 200))
    for row, rank in enumerate(reranking.fine_ranks(coarse, scores, relevant)):
        order = sorted(range(9), key=lambda place, row=row: (-scores[row, place], place))
        hits = [new for new, place in enumerate(order, 1) if relevant[row, place]]
        assert rank == (hits[0] if hits else coarse[row])


def test_a_matcher_without_an_opinion_leaves_the_coarse_ranking():
    relevant = np.eye(6, dtype=bool)
    np.testing.assert_array_equal(
        reranking.fine_ranks(np.arange(1, 7), np.zeros((6, 6)), relevant), np.arange(1, 7)
    )


def bad_match(**changes):
    settings = {
        "query_tokens": np.zeros((2, 3, 4)),
        "gallery_tokens": np.zeros((2, 3, 4)),
        "candidates": np.zeros((2, 1), int),
        "direction": "s2i",
        "speech_lengths": np.ones(2),
    } | changes
    logits = settings.pop("logits", np.zeros((1, 2)))
    return lambda: reranking.match_candidates(lambda *_: logits, pair_chunk=1, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ranking.coarse_top_k(np.full((2, 3), np.nan), np.ones((4, 3)), 1),
            "queries: 2 of 2 rows",
        ),
        (
            lambda: ranking.coarse_top_k(np.ones((2, 3)), np.array([[1, 1, 1], [1, np.inf, 1]]), 1),
            "gallery: 1 of 2.*row 1",
        ),
        (lambda: ranking.coarse_top_k(np.ones((2, 3)), np.ones((4, 3)), 0), "k must be at least 1"),
        (lambda: ranking.coarse_top_k(np.ones((2, 3)), np.ones((4, 5)), 1), "must share D"),
        (lambda: ranking.coarse_top_k(np.ones((2, 3)), np.ones((0, 3)), 1), "nothing to search"),
        (
            lambda: ranking.first_relevant_rank(np.ones((2, 3)), np.ones((2, 3)), [1, 8], [1, 2]),
            "query 1, id 8",
        ),
        (
            lambda: ranking.first_relevant_rank(np.ones((2, 3)), np.ones((2, 3)), [1], [1, 2]),
            "one id each",
        ),
        (bad_match(direction="t2i"), "'s2i'.*'t2i'"),
        (bad_match(speech_lengths=np.ones(3)), "3 speech_lengths for 2"),
        (bad_match(logits=np.array([[0.0, np.nan]])), r"match logits \(s2i\): 2 of 2"),
        (lambda: reranking.fine_scores(0.5, 0.0, tau=0.0), "tau must be above 0"),
        (lambda: ranking.coarse_top_k(np.ones(3), np.ones((4, 3)), 1), r"queries must have rank 2"),
        (lambda: ranking.coarse_top_k(np.ones((2, 3)), np.ones(3), 1), r"gallery must have rank 2"),
        (
            lambda: ranking.first_relevant_rank(np.eye(2), np.eye(2), [[0], [1]], [0, 1]),
            r"query_ids must have rank 1, shape \(Q,\); got shape \(2, 1\)",
        ),
        (bad_match(candidates=np.zeros(2, int)), r"candidates must have rank 2, shape \(Q, k\)"),
        (bad_match(candidates=np.zeros((3, 1), int)), "3 rows of candidates for 2 queries"),
        (bad_match(query_tokens=np.zeros((2, 3))), "query_tokens must have rank 3"),
        (bad_match(gallery_tokens=np.zeros((2, 3))), "gallery_tokens must have rank 3"),
        (lambda: reranking.fine_scores([0.5], [[0.0]], tau=1.0), "match_logit must have the shape"),
        (lambda: reranking.fine_order([1.0, 2.0]), "scores must have rank 2"),
        (lambda: reranking.rerank([1, 2], [[1.0, 2.0]]), "lists must have rank 2"),
        (lambda: reranking.rerank([[1], [2]], [[1.0]]), "2 lists, but scores of 1 queries"),
        (lambda: reranking.rerank([[1]], [[1.0, 2.0]]), "2 scores .* lists of 1"),
        (lambda: reranking.fine_ranks([[1]], [[1.0]], [[True]]), "coarse_rank must have rank 1"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_top_k_of_blocks_is_that_of_float64(monkeypatch, k, count):
    """In pieces of any size and order, with ties and rows that are not wanted."""
    monkeypatch.setattr(ranking, "GALLERY_CHUNK", 3)
    rng = np.random.default_rng(k)
    gallery = rng.integers(-2, 3, (60, 4)).astype(np.float32)  # many ties, exact products
    queries, wanted = rng.integers(-2, 3, (count, 4)).astype(np.float32), rng.random(60) < 0.8
    cuts = [0, 1, 14, 14, 40, 60]
    order = np.r_[20:60, 0:20]  # whatever the order, of equal ones the lower row is first
    parts = [order[a:b] for a, b in itertools.pairwise(cuts)]
    blocks = [(part, gallery[part], wanted[part]) for part in parts]
    k = min(k, int(wanted.sum()))
    scores, rows = ranking.top_k_of_blocks(queries, blocks, k)
    exact = queries.astype(np.float64) @ gallery.astype(np.float64).T
    exact[:, ~wanted] = -np.inf
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(exact, expected, axis=1))
