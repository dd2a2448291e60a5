"""The named protocols: what is ranked against what, folds, and whether the numbers are those that
were published."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.memory_source import Memory

from c2f_jax.errors import UserError
from c2f_jax.models.c2f import Encoded
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.retrieval.evaluation import EvalConfig, evaluate_retrieval
from c2f_jax.retrieval.protocols import (
    PROTOCOLS,
    evaluate_protocol,
    find_protocol,
    mean_of_folds,
    open_protocol,
)
from c2f_jax.retrieval.result import EvaluationResult


def encoded(images, per_image, seed=0, noise=1.0, width=16):
    """Embeddings of recordings that lie near those of their images."""
    rng = np.random.default_rng(seed)
    counts = np.broadcast_to(per_image, images)
    image = rng.normal(size=(images, width))
    speech = np.repeat(image, counts, axis=0) + noise * rng.normal(size=(counts.sum(), width))
    unit = [
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (speech, image)
    ]
    parts = [Encoded(x, x[:, None], np.ones(len(x), np.int32)) for x in unit]
    ids = np.arange(images) + 7
    return EncodedSplit(*parts, np.repeat(ids, counts), ids)


def evaluate(split):
    return evaluate_retrieval(split, EvalConfig(k=10, resamples=60), tau=0.1)


def recall_at(cut, split):
    """R@cut of speech -> image by a plain loop in float64."""
    hits = []
    for vector, identity in zip(
        split.speech.embedding.astype(float), split.speech_ids, strict=True
    ):
        order = np.argsort(-(split.image.embedding.astype(float) @ vector), kind="stable")
        hits.append(identity in split.image_ids[order[:cut]])
    return 100 * np.mean(hits)


def named(result):
    return dataclasses.replace(
        result, data_set="flickr8k_audio", split="test", trained_on="spoken_coco"
    )


def test_the_published_numbers_are_recognized():
    whole = encoded(1000, 5)
    result, used = evaluate_protocol(PROTOCOLS["flickr8k_1k"], whole, evaluate)
    assert result.protocol.as_published
    assert result.queries.gallery_recordings == 5000 and used is whole
    assert result.coarse.speech_to_image["R@1"].value == pytest.approx(recall_at(1, whole))
    table = named(result).table()
    assert "1,000 images, 5,000 recordings, as published" in table
    assert "trained on spoken_coco" in table
    fewer = whole.select_images(np.arange(998))
    result, _ = evaluate_protocol(PROTOCOLS["flickr8k_1k"], fewer, evaluate)
    assert not result.protocol.as_published
    assert "NOT the published number" in named(result).table()
    assert "protocol" not in evaluate(fewer).table()


def test_five_folds_are_averaged():
    counts = np.where(np.arange(500) % 200 == 0, 6, 5)
    whole = encoded(500, counts)
    small = dataclasses.replace(
        PROTOCOLS["spoken_coco_1k_5fold"], images=500, recordings=int(counts.sum())
    )
    result, first = evaluate_protocol(small, whole, evaluate)
    folds = [whole.select_images(np.arange(100 * k, 100 * k + 100)) for k in range(5)]
    expected = np.mean([recall_at(1, fold) for fold in folds])
    recall = result.coarse.speech_to_image["R@1"]
    assert recall.value == pytest.approx(expected)
    assert result.protocol.to_json() | {"about": ""} == {
        "name": "spoken_coco_1k_5fold",
        "about": "",
        "folds": 5,
        "pictures": 500,
        "recordings": 2503,
        "of": {"pictures": 500, "recordings": 2503},
        "as_published": True,
    }
    assert EvaluationResult.from_json(result.to_json()) == result
    assert len(first.images) == 100 and result.queries.gallery_images == 100
    jax.tree.map(
        np.testing.assert_array_equal, dataclasses.asdict(first), dataclasses.asdict(folds[0])
    )
    assert result.table()
    # A gallery of a fifth is easier, and five of them tell as much as the whole: the interval is
    # not that of one fold.
    low, high = evaluate(folds[0]).coarse.speech_to_image["R@1"].interval
    mean_low, mean_high = recall.interval
    assert mean_low < expected < mean_high and mean_high - mean_low < 0.65 * (high - low)
    assert expected > recall_at(1, whole)


def test_intervals_of_a_mean_of_folds():
    folds = [
        {"R@1": 10.0, "R@1_interval": [7.0, 14.0], "k": 3},
        {"R@1": 20.0, "R@1_interval": [16.0, 23.0], "k": 3},
    ]
    merged = mean_of_folds(folds)
    assert merged["R@1"] == 15.0 and merged["k"] == 3
    assert merged["R@1_interval"] == pytest.approx(
        [15 - np.sqrt(9 + 16) / 2, 15 + np.sqrt(16 + 9) / 2]
    )


def test_places_takes_a_thousand_images_with_one_recording_each():
    whole = encoded(1100, np.arange(1100) % 3 + 1)
    result, used = evaluate_protocol(PROTOCOLS["places_1k"], whole, evaluate)
    assert result.protocol.as_published and result.protocol.of_images == 1100
    np.testing.assert_array_equal(used.speech_ids, used.image_ids)
    np.testing.assert_array_equal(used.recordings[:4], [0, 1, 3, 6])  # the first of each picture


def load(name, split):
    sizes = {"train": 30, "validation": 10, "dev_seen": 6, "test": 8}
    present = {
        "places_audio": ("train", "dev_seen"),
        "flickr8k_audio": ("train", "validation", "test"),
    }[name]
    if split not in present:
        raise UserError(f"{name} has no split {split}")
    source = Memory([800] * sizes[split])
    source.split = split
    return source


def test_the_splits_of_protocols():
    assert open_protocol(PROTOCOLS["flickr8k_1k"], load).split == "test"
    assert (
        open_protocol(PROTOCOLS["places_1k"], load).split == "dev_seen"
    )  # the distribution of 2020
    assert open_protocol(PROTOCOLS["flickr8k_1k"], load, "places_audio", "train").split == "train"
    with pytest.raises(UserError, match="places_audio has no split test"):
        open_protocol(PROTOCOLS["flickr8k_1k"], load, "places_audio")
    with pytest.raises(UserError, match="no protocol 'flickr'.*flickr8k_1k, spoken_coco_5k"):
        find_protocol("flickr")


def test_mteb_ranks_the_images_of_all_splits():
    source = open_protocol(PROTOCOLS["mteb"], load)
    assert len(source) == 8 and source.num_images == 4 + 15 + 5
    assert len(set(source.image_ids.tolist())) == 24
    assert source.image(3) == load("flickr8k_audio", "test").image(3)
    assert source.image(4) == load("flickr8k_audio", "train").image(0)
    assert (
        source.image(23) == load("flickr8k_audio", "validation").image(4)
        and source.image_id(23) == "picture 4"
    )
    assert source.recording(7)["caption"] == "caption 7"
    whole = encoded(24, 2)
    queries = np.flatnonzero(whole.speech_ids < 7 + 4)
    whole = whole.select_recordings(queries)
    result, _ = evaluate_protocol(PROTOCOLS["mteb"], whole, evaluate)
    assert result.queries.gallery_images == 24 and result.queries.image_to_speech == 4
    table = named(result).table()
    metrics = result.coarse.image_to_speech
    first, fifth = (metrics[f"fraction_recall@{cut}"].value for cut in (1, 5))
    assert f"fraction recall  @1 {first:.1f}  @5 {fifth:.1f}" in table
    assert "nDCG@10" in table and "NOT the published number" in table


def test_too_few_images_for_the_folds():
    with pytest.raises(UserError, match="cuts 5 folds, but there are 3 images"):
        evaluate_protocol(PROTOCOLS["spoken_coco_1k_5fold"], encoded(3, 2), evaluate)
