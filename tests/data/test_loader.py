"""Batches: a function of (seed, step) alone, whole over processes, with damaged items replaced and
named."""

import threading

import numpy as np
import pytest
from helpers.memory_source import Memory, same, take

from c2f_jax.data import batch_plan, loader
from c2f_jax.errors import UserError


def indices(batch):
    """Which recordings are in the batch, read off their samples."""
    return np.round(batch["waveform"][:, 0] * 1024).astype(int) - 1


SOURCE_LENGTHS = np.random.default_rng(0).integers(500, 1600, 43)


def test_batches_hold_what_the_source_holds():
    source = Memory(SOURCE_LENGTHS)
    for step, batch in take(source, 7):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "waveform": ((8, 1600), np.dtype("float32")),
            "speech_lengths": ((8,), np.dtype("int32")),
            "image": ((8, 8, 8, 3), np.dtype("uint8")),
            "image_id": ((8,), np.dtype("int32")),
        }
        for row, index in enumerate(indices(batch)):
            length = SOURCE_LENGTHS[index]
            expected = np.zeros(1600, np.float32)
            expected[:length] = source.wave(index)
            np.testing.assert_allclose(batch["waveform"][row], expected, atol=1 / 32768)
            assert batch["speech_lengths"][row] == length
            assert (batch["image"][row] == index // 2).all() and batch["image_id"][
                row
            ] == 100 + index // 2
        assert step < 7


def test_every_epoch_visits_everything_once_but_the_remainder_in_another_order():
    batches = [indices(batch) for _, batch in take(Memory(SOURCE_LENGTHS), 15)]
    epochs = [np.concatenate(batches[k : k + 5]) for k in (0, 5, 10)]
    for epoch in epochs:
        assert len(set(epoch)) == 40
    assert not (epochs[0] == epochs[1]).all() and set(epochs[0]) != set(epochs[1])


def test_the_seed_decides_the_order():
    one, other = take(Memory(SOURCE_LENGTHS), 3), take(Memory(SOURCE_LENGTHS), 3, seed=4)
    assert not all(
        (indices(a) == indices(b)).all() for (_, a), (_, b) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("start", [1, 5, 9])
def test_resuming_at_a_step_gives_the_batches_that_would_have_come(start):
    lengths = np.random.default_rng(1).integers(500, 4000, 43)  # cropped, so crops are tested too
    options = {"bucket_seconds": (0.05, 0.1)}
    same(
        take(Memory(lengths), 12, **options)[start:],
        take(Memory(lengths), 12 - start, start_step=start, **options),
    )


def test_threads_and_the_cache_change_nothing():
    lengths = np.random.default_rng(1).integers(500, 4000, 43)
    plain = take(Memory(lengths), 14, cache_mib=0)
    same(plain, take(Memory(lengths), 14, threads=3, prefetch=2, cache_mib=0))
    same(plain, take(Memory(lengths), 14, threads=3, cache_mib=100))


def test_the_cache_spares_reading_again():
    source, uncached = Memory(SOURCE_LENGTHS), Memory(SOURCE_LENGTHS)
    take(source, 20)
    take(uncached, 20, cache_mib=0)
    assert source.reads <= 43 and uncached.reads == 160


def test_the_cache_stays_within_its_limit():
    cache = loader._Cache(100)
    made = []

    def make():
        made.append(1)
        return np.zeros(40, np.uint8)

    for key in [1, 2, 3, 1, 2, 3]:
        assert len(cache.get(key, make)) == 40
    assert len(made) == 4  # 1 and 2 fit and are kept; 3 is made each time
    assert cache.get("bad", lambda: None) is None


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_all_processes_are_the_batch_of_one(processes):
    lengths = np.random.default_rng(1).integers(500, 4000, 43)
    options = {"bucket_seconds": (0.05, 0.2)}
    whole = take(Memory(lengths), 11, **options)
    parts = [
        take(Memory(lengths), 11, process_index=p, process_count=processes, **options)
        for p in range(processes)
    ]
    joined = [
        (step, {key: np.concatenate([part[k][1][key] for part in parts]) for key in batch})
        for k, (step, batch) in enumerate(whole)
    ]
    same(whole, joined)


def test_long_recordings_are_cropped_at_places_that_differ_between_epochs():
    class Ramp(Memory):
        def wave(self, index):
            return np.arange(self.lengths[index]) / 32768

    source = Ramp([5000] * 8)
    starts = []
    for _, batch in take(source, 3, bucket_seconds=(0.05,)):
        assert (batch["speech_lengths"] == 800).all()
        first = np.round(batch["waveform"][:, 0] * 32768).astype(int)
        np.testing.assert_allclose(batch["waveform"][:, -1] * 32768, first + 799, atol=0.01)
        assert first.min() >= 0 and first.max() <= 4200
        starts.append(sorted(first))
    assert len(set(starts[0])) > 4 and starts[0] != starts[1]


def test_plan_against_a_plain_loop():
    lengths = np.array([100, 900, 250, 5000, -1, 300, 90, 700, 310, 120, 450, 260, 800])
    buckets = [300, 600, 1000]
    expected_bucket = []
    for n in lengths:
        fits = [k for k, b in enumerate(buckets) if n <= b]
        expected_bucket.append(2 if n < 0 or not fits else fits[0])
    np.testing.assert_array_equal(batch_plan.bucket_of(lengths, buckets), expected_bucket)
    for epoch in range(5):
        plan, padded = batch_plan.plan_epoch(
            lengths, batch_size=3, bucket_samples=buckets, seed=0, epoch=epoch
        )
        assert plan.shape == (4, 3) and padded.shape == (4,)
        assert len(set(plan.ravel())) == 12
        for row, samples in zip(plan, padded, strict=True):
            for index in row:
                assert (
                    buckets[expected_bucket[index]] <= samples
                )  # never cropped below its own bucket
        again, _ = batch_plan.plan_epoch(
            lengths, batch_size=3, bucket_samples=buckets, seed=0, epoch=epoch
        )
        np.testing.assert_array_equal(plan, again)


def test_buckets_save_padding_and_are_mixed_over_the_epoch():
    lengths = np.random.default_rng(0).integers(400, 16_000, 1000)
    plan, padded = batch_plan.plan_epoch(
        lengths, batch_size=10, bucket_samples=[4000, 8000, 16_000], seed=0, epoch=0
    )
    assert len(plan) == 100
    assert {4000, 8000, 16_000} == set(padded) and padded.mean() < 12_000
    assert len(set(padded[:30])) == 3
    short = np.concatenate(
        [row for row, samples in zip(plan, padded, strict=True) if samples == 4000]
    )
    assert (lengths[short] <= 4000).all()


def test_damaged_items_are_replaced_and_named():
    lengths = np.full(200, 800)
    lengths[11] = 399  # readable, but too short for a frame
    source = Memory(lengths, per_image=1, broken={5}, broken_images={7})
    source.bad_items.allowed = 3
    batches = take(source, 25)
    for _, batch in batches:
        assert not {5, 7, 11} & set(indices(batch)) and (batch["speech_lengths"] == 800).all()
        assert (
            batch["image_id"] == indices(batch) + 100
        ).all()  # the replacement brings its own picture
    reasons = source.bad_items.reasons
    assert len(reasons) == 3
    assert "not readable audio" in reasons["memory, train, recording 5"]
    assert "not a readable image" in reasons["memory, train, image picture 7"]
    assert "400 are needed" in reasons["memory, train, recording 11"]


@pytest.mark.parametrize("processes", [2, 4])
def test_replacements_are_the_same_in_any_process(processes):
    def make():
        source = Memory(np.full(40, 800), per_image=1, broken={5, 6, 20}, broken_images={7, 30})
        source.bad_items.allowed = 9
        return source

    whole = take(make(), 10)
    parts = [take(make(), 10, process_index=p, process_count=processes) for p in range(processes)]
    for k, (_, batch) in enumerate(whole):
        np.testing.assert_array_equal(
            indices(batch), np.concatenate([indices(part[k][1]) for part in parts])
        )
    same(whole[4:], take(make(), 6, start_step=4))


@pytest.mark.parametrize("threads", [0, 2])
def test_too_many_damaged_items_stop_with_an_error(threads):
    source = Memory(np.full(200, 800), broken=set(range(0, 200, 10)))
    with pytest.raises(
        UserError, match="memory, split train: [34] of 200 items.*max_bad_share"
    ) as caught:
        take(source, 25, threads=threads)
    assert "recording" in str(caught.value) and "not readable audio" in str(caught.value)


def test_the_next_batches_are_loaded_while_the_caller_works():
    source = Memory(SOURCE_LENGTHS)
    options = loader.BatchOptions(
        batch_size=8,
        image_size=8,
        bucket_seconds=(0.1,),
        seed=0,
        threads=2,
        prefetch=3,
        cache_mib=0,
    )
    batches = loader.train_batches(source, options)
    next(batches)
    waited = threading.Event()
    for _ in range(200):
        if source.reads >= 24:
            break
        waited.wait(0.02)
    assert source.reads >= 24


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 44}, "batch_size 44 is more than the 43 recordings"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 9, "process_count": 2}, "multiple of the number of processes, 2"),
        ({"bucket_seconds": ()}, "bucket_seconds"),
        ({"bucket_seconds": (2.0, 1.0)}, "increasing"),
        ({"bucket_seconds": (1.0, 1.0)}, "increasing"),
        ({"bucket_seconds": (0.01,)}, "at least 0.025"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused_at_once(options, message):
    source = Memory(SOURCE_LENGTHS)
    options = {"batch_size": 8, "image_size": 8, "bucket_seconds": (1.0,), "seed": 0, **options}
    with pytest.raises(UserError, match=message):
        loader.train_batches(source, loader.BatchOptions(**options))
    assert source.reads == 0


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("known", [False, True])
def test_evaluation_reads_every_recording_once_in_few_shapes(threads, known):
    lengths = SOURCE_LENGTHS.copy()
    lengths[4] = 3000
    source = Memory(lengths)
    source.num_samples = np.where(known, source.num_samples, -1)
    if known:
        source.num_samples[7] = 400  # what a manifest states may be wrong
    batches = list(loader.speech_batches(source, batch_size=10, seconds_max=0.125, threads=threads))
    shapes = [b["waveform"].shape for b in batches]
    assert len(batches) == 5 and set(shapes) <= {(10, 500), (10, 1000), (10, 2000)}
    assert not known or (10, 1000) in shapes
    index = np.concatenate([b["index"] for b in batches])
    valid = np.concatenate([b["valid"] for b in batches])
    np.testing.assert_array_equal(np.sort(index[valid]), np.arange(43))
    assert len(set(index[~valid])) == 1 and (~valid).sum() == 7
    for b in batches:
        assert {k: v.dtype for k, v in b.items()} == {
            "waveform": np.float32,
            "speech_lengths": np.int32,
            "index": np.int32,
            "valid": np.bool_,
        }
        np.testing.assert_array_equal(indices(b), b["index"])
        np.testing.assert_array_equal(b["speech_lengths"], np.minimum(lengths[b["index"]], 2000))


@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_reads_every_image_once_in_order(threads):
    source = Memory(SOURCE_LENGTHS, broken_images={3})
    source.bad_items.allowed = 1
    batches = list(loader.image_batches(source, batch_size=8, image_size=6, threads=threads))
    index = np.concatenate([b["index"] for b in batches])
    valid = np.concatenate([b["valid"] for b in batches])
    images = np.concatenate([b["image"] for b in batches])
    assert images.shape == (24, 6, 6, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(index[valid], [j for j in range(22) if j != 3])
    np.testing.assert_array_equal(
        images[valid], np.broadcast_to(index[valid][:, None, None, None], (21, 6, 6, 3))
    )
    assert not images[3].any() and list(source.bad_items.reasons) == [
        "memory, train, image picture 3"
    ]


def test_an_unreadable_recording_is_marked_in_evaluation():
    source = Memory(np.full(120, 800), broken={6})
    batches = list(loader.speech_batches(source, batch_size=60, seconds_max=0.1, threads=0))
    valid = np.concatenate([b["valid"] for b in batches])
    np.testing.assert_array_equal(np.flatnonzero(~valid), [6])
    assert (
        batches[0]["speech_lengths"][6] == loader.MIN_SAMPLES
        and not batches[0]["waveform"][6].any()
    )


def test_a_batch_larger_than_the_set_is_fine_in_evaluation():
    (batch,) = loader.speech_batches(
        Memory(SOURCE_LENGTHS), batch_size=64, seconds_max=0.1, threads=0
    )
    assert batch["valid"].sum() == 43
    with pytest.raises(UserError, match="batch_size 0"):
        loader.speech_batches(Memory(SOURCE_LENGTHS), batch_size=0, seconds_max=0.1)


@pytest.mark.parametrize("count", [2, 7])
def test_parts_of_the_evaluation_are_the_whole_and_read_nothing_of_each_other(count):
    def recordings(source, **part):
        return loader.speech_batches(source, batch_size=10, seconds_max=0.125, threads=0, **part)

    def images(source, **part):
        return loader.image_batches(source, batch_size=5, image_size=6, threads=0, **part)

    for batches in (recordings, images):
        whole, reads = list(batches(Memory(SOURCE_LENGTHS))), 0
        parts = []
        for number in range(count):
            source = Memory(SOURCE_LENGTHS)
            parts.append(list(batches(source, part=(number, count))))
            reads += source.reads
        assert sum(map(len, parts)) == len(whole) == 5
        for number, batch in enumerate(whole):
            np.testing.assert_equal(parts[number % count][number // count], batch)
        # The last batch repeats the last item.
        assert reads == (50 if batches is recordings else 0)
