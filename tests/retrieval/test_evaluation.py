"""The whole evaluation against plain loops in float64: ranks, lists, both directions, scores, table
and errors."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from c2f_jax.errors import UserError
from c2f_jax.models.c2f import Encoded
from c2f_jax.retrieval import recall, reranking
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.retrieval.evaluation import EvalConfig, evaluate_retrieval
from c2f_jax.retrieval.result import EvaluationResult

TAU = 0.25  # a power of two: cosine / tau stays exact, so ties in the oracle are ties in the code


def small_world(seed=0, recordings=40, images=18):
    """Unit vectors of halves (exact cosines, many ties), ids with several right items on both
    sides, integer logits."""
    rng = np.random.default_rng(seed)
    speech = 0.5 * rng.choice([-1.0, 1.0], (recordings, 4))
    image = 0.5 * rng.choice([-1.0, 1.0], (images, 4))
    image_ids = np.arange(images) % 12 + 100  # some pictures share an identity
    speech_ids = rng.choice(image_ids, recordings)
    speech_ids[:12] = np.arange(12) + 100  # every picture is spoken of
    logits = rng.integers(-3, 4, (recordings, images)).astype(np.float64)

    def match_fn(speech_tokens, speech_lengths, image_tokens):
        value = logits[speech_tokens[:, 0, 0].astype(int), image_tokens[:, 0, 0].astype(int)]
        return np.stack([-0.5 * value, 0.5 * value], axis=1)

    inputs = {
        "speech_embeddings": speech,
        "image_embeddings": image,
        "speech_ids": speech_ids,
        "image_ids": image_ids,
        "speech_tokens": np.arange(recordings, dtype=np.float32).reshape(-1, 1, 1),
        "speech_lengths": np.ones(recordings, np.int32),
        "image_tokens": np.arange(images, dtype=np.float32).reshape(-1, 1, 1),
        "match_fn": match_fn,
    }
    return inputs, logits


def evaluate(inputs, *, tau=TAU, share_work=reranking.do_alone, **options):
    """Evaluate plain arrays, named as in ``small_world``; some may be missing."""
    encoded = EncodedSplit(
        Encoded(
            inputs["speech_embeddings"], inputs.get("speech_tokens"), inputs.get("speech_lengths")
        ),
        Encoded(inputs["image_embeddings"], inputs.get("image_tokens"), None),
        inputs["speech_ids"],
        inputs["image_ids"],
    )
    return evaluate_retrieval(
        encoded, EvalConfig(**options), inputs.get("match_fn"), tau=tau, share_work=share_work
    )


def values(metrics):
    return {name: metric.value for name, metric in metrics.items()}


def oracle(queries, gallery, query_ids, gallery_ids, logits, k, score):
    """Ranked gallery rows of each query before and after re-ranking, by sorting tuples."""
    coarse, fine = [], []
    for row, query in enumerate(queries):
        cosine = [float(query @ item) for item in gallery]
        order = sorted(range(len(gallery)), key=lambda j, cosine=cosine: (-cosine[j], j))
        value = {
            "sic": lambda j, cosine=cosine: cosine[j],
            "sim": lambda j, row=row: logits[row, j],
            "prob": lambda j, row=row: 1 / (1 + np.exp(-logits[row, j])),
            "sum": lambda j, row=row, cosine=cosine: cosine[j] + logits[row, j],
            "joint": lambda j, row=row, cosine=cosine: cosine[j] / TAU + logits[row, j],
        }[score]
        head = sorted(
            order[:k], key=lambda j, value=value, order=order: (-value(j), order.index(j))
        )
        coarse.append(order)
        fine.append(head + order[k:])

    def rank(lists):
        return [
            1 + next(place for place, j in enumerate(row) if gallery_ids[j] == wanted)
            for row, wanted in zip(lists, query_ids, strict=True)
        ]

    return np.array(coarse), np.array(fine), rank(coarse), rank(fine)


@pytest.mark.parametrize("k", [1, 4, 13, 18, 500])
@pytest.mark.parametrize("score", reranking.SCORES)
def test_both_directions_equal_brute_force(k, score):
    inputs, logits = small_world()
    result = evaluate(inputs, k=k, score=score, pair_batch_size=32, resamples=20)
    speech = inputs["speech_embeddings"], inputs["speech_ids"]
    image = inputs["image_embeddings"], inputs["image_ids"]
    for direction, (queries, query_ids), (gallery, gallery_ids), table in (
        ("s2i", speech, image, logits),
        ("i2s", image, speech, logits.T),
    ):
        coarse, fine, coarse_rank, fine_rank = oracle(
            queries, gallery, query_ids, gallery_ids, table, k, score
        )
        ranked, depth = result.lists[direction], min(max(k, 10), len(gallery))
        np.testing.assert_array_equal(ranked.queries, np.arange(len(queries)))
        np.testing.assert_array_equal(ranked.coarse, coarse[:, :depth])
        np.testing.assert_array_equal(ranked.fine, fine[:, :depth])
        np.testing.assert_array_equal(ranked.coarse_rank, coarse_rank)
        np.testing.assert_array_equal(ranked.fine_rank, fine_rank)
        np.testing.assert_array_equal(
            ranked.fine_hits, gallery_ids[fine[:, :depth]] == query_ids[:, None]
        )
        counts = [sum(gallery_ids == wanted) for wanted in query_ids]
        for stage, ranks, hits in (
            (result.coarse, coarse_rank, ranked.coarse_hits),
            (result.fine, fine_rank, ranked.fine_hits),
        ):
            expected = recall.rank_metrics(ranks) | recall.list_metrics(hits, counts)
            metrics = stage.direction(direction)
            assert values(metrics) == pytest.approx(expected)
            low, high = metrics["R@5"].interval
            assert low <= metrics["R@5"].value <= high
        before, after = (values(s.direction(direction)) for s in (result.coarse, result.fine))
        gains = values(result.difference.direction(direction))
        for name in ("R@1", "MRR", "median_rank"):
            assert gains[name] == pytest.approx(after[name] - before[name])
    assert result.fine_scores[score] == result.fine


@pytest.mark.parametrize("count", [2, 3, 50])
def test_processes_that_share_the_work_agree_even_if_they_round_differently(count):
    """Threads stand for processes; each has other embeddings, as if its device rounded badly."""
    inputs, _ = small_world()
    expected = evaluate(inputs, k=7, pair_batch_size=32, resamples=20)
    barrier, given, matched = threading.Barrier(count), [None] * count, [0] * count

    def run(process):
        def share_work(work):
            given[process] = work(process, count)
            barrier.wait()
            results = list(given)
            barrier.wait()
            return results

        def match_fn(*tokens):
            matched[process] += 1
            return inputs["match_fn"](*tokens)

        noise = process * np.random.default_rng(process).normal(size=(40, 1))
        rounded = inputs["speech_embeddings"] + noise.astype(np.float32)
        rounded /= np.linalg.norm(rounded, axis=1, keepdims=True)
        own = inputs | {"speech_embeddings": rounded, "match_fn": match_fn}
        return evaluate(own, k=7, pair_batch_size=32, resamples=20, share_work=share_work)

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(run, range(count)))
    for result in results:
        assert result.to_json() | {"seconds": 0} == expected.to_json() | {"seconds": 0}
        for direction in ("s2i", "i2s"):
            for name in ("coarse", "fine", "coarse_rank", "fine_rank"):
                np.testing.assert_array_equal(
                    getattr(result.lists[direction], name), getattr(expected.lists[direction], name)
                )
    # 280 pairs in 9 chunks, and 126 in 4.
    assert sum(matched) == 13 and max(matched) <= -(-9 // count) + -(-4 // count)


def test_one_candidate_gives_the_coarse_numbers_and_sic_scores_change_nothing():
    inputs, _ = small_world(seed=1)
    one = evaluate(inputs, k=1, score="sim", resamples=20)
    assert one.fine == one.coarse
    many = evaluate(inputs, k=12, resamples=20)
    assert many.fine_scores["sic"] == many.coarse
    assert many.fine != many.coarse
    gain = many.fine.mean_recall.value - many.coarse.mean_recall.value
    assert many.difference.mean_recall.value == pytest.approx(gain)


def test_result_is_json_and_the_table_shows_it():
    inputs, _ = small_world(seed=2)
    result = evaluate(inputs, k=7, tau=np.float32(TAU), resamples=20)
    stored = result.to_json()
    assert json.loads(json.dumps(stored)) == stored
    assert EvaluationResult.from_json(stored) == result
    assert set(result.seconds) == {"coarse_s2i", "fine_s2i", "coarse_i2s", "fine_i2s"}
    table = result.table()
    recall_at_1 = result.fine.image_to_speech["R@1"]
    low, high = recall_at_1.interval
    assert f"{recall_at_1.value:.1f} [{low:.1f}, {high:.1f}]" in table
    assert f"image -> speech R@1 {recall_at_1.value:.1f} %" in repr(result)
    for words in (
        "speech -> image: 40 queries, gallery of 18",
        "image -> speech: 18 queries, gallery of 40",
        "k=7, joint",
        "median rank",
        "MRR",
        "fine - coarse",
        "12 image ids",
    ):
        assert words in table
    assert max(len(line) for line in table.splitlines()[:-1]) <= 100


def test_without_a_matcher_only_coarse_is_reported():
    inputs, _ = small_world(seed=3)
    full = evaluate(inputs, k=5, resamples=20)
    for name in ("speech_tokens", "speech_lengths", "image_tokens", "match_fn"):
        del inputs[name]
    result = evaluate(inputs, k=5, resamples=20)
    assert result.coarse == full.coarse
    assert result.fine is result.fine_scores is result.difference is None
    stored = result.to_json()
    assert not {"fine", "fine_scores", "difference"} & set(stored)
    assert EvaluationResult.from_json(stored) == result
    assert result.lists["s2i"].fine is None and "fine" not in result.table()


def test_queries_without_an_answer_are_left_out_and_counted():
    inputs, logits = small_world(seed=4)
    inputs["speech_ids"][[3, 20]] = 999
    inputs["image_ids"][5] = 555
    result = evaluate(inputs, k=6, score="joint", resamples=20)
    lists = result.lists
    kept = np.flatnonzero(np.isin(inputs["speech_ids"], inputs["image_ids"]))
    assert not {3, 20} & set(kept)
    np.testing.assert_array_equal(lists["s2i"].queries, kept)
    expected = oracle(
        inputs["speech_embeddings"][kept],
        inputs["image_embeddings"],
        inputs["speech_ids"][kept],
        inputs["image_ids"],
        logits[kept],
        6,
        "joint",
    )
    np.testing.assert_array_equal(lists["s2i"].fine[:, :6], expected[1][:, :6])
    np.testing.assert_array_equal(lists["s2i"].fine_rank, expected[3])
    assert result.queries.recordings_without_image == 40 - len(kept)
    answered = np.isin(inputs["image_ids"], inputs["speech_ids"])
    assert result.queries.images_without_recording == np.sum(~answered) > 0
    assert result.queries.gallery_images == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "cosine"}, "score must be one of sic"),
        ({"k": 0}, "k must be at least 1"),
        ({"tau": -1.0}, "tau must be above 0"),
        ({"speech_embeddings": np.full((40, 4), np.nan)}, "speech_embeddings: 40 of 40 rows"),
        ({"image_embeddings": np.ones((18, 4))}, "image_embeddings must be L2-normalized.*norm 2"),
        ({"image_ids": np.arange(7)}, "image_embeddings must be .*one id a row"),
        ({"speech_ids": np.arange(40) + 5000}, "no recording shares its id"),
        ({"speech_tokens": np.zeros((39, 1, 1))}, "speech_tokens must have 40 rows.*got 39"),
        ({"image_tokens": None}, "image_tokens must have 18 rows.*got none"),
        ({"match_fn": lambda s, lengths, i: np.full((len(s), 2), np.inf)}, r"match logits \(s2i\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_bad_input_is_one_clear_error(change, message):
    inputs, _ = small_world()
    options = {"k": 5, "resamples": 5}
    for name, value in change.items():
        (options if name in ("k", "score", "tau") else inputs)[name] = value
    with pytest.raises(UserError, match=message):
        evaluate(inputs, **options)
