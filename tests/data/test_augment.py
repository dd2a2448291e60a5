"""Augmentation: each change does what it says, is off by default, a function of (seed, epoch,
recording)."""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.memory_source import Memory, png, same, take

from c2f_jax.config.default import default_config
from c2f_jax.config.experiment import create_experiment
from c2f_jax.data import batch_plan, loader
from c2f_jax.data.augment import AugmentConfig, augment_image, augment_wave
from c2f_jax.datasets.config import DataConfig
from c2f_jax.errors import UserError

Y, X = np.mgrid[0:60, 0:80]
RAMP = np.stack([X * 3, Y * 4, 0 * X + 50], -1).astype(
    np.uint8
)  # red tells the column, green the row
TONE = np.round(8000 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.int16)


def rng(seed=0):
    return np.random.default_rng(seed)


def augmented(options, seed=0, may_flip=True):
    return augment_image(RAMP, 24, AugmentConfig(**options), rng(seed), may_flip=may_flip)


def wave(options, seed=0, samples=TONE):
    return augment_wave(samples, AugmentConfig(**options), rng(seed))


def test_crops_stay_inside_and_keep_area_and_ratio():
    areas, ratios = [], []
    for seed in range(100):
        cut = augmented({"crop_area": 0.2, "crop_ratio": 1.5}, seed).astype(float)
        # Off the borders, where resampling repeats pixels: the ramp tells how far apart two pixels
        # were.
        w, h = (
            (cut[12, 20, 0] - cut[12, 3, 0]) / 17 / 3 * 24,
            (cut[20, 12, 1] - cut[3, 12, 1]) / 17 / 4 * 24,
        )
        areas.append(w * h / 4800)
        ratios.append(w / h)
        assert (abs(cut[..., 2] - 50) <= 1).all()
    assert 0.15 < min(areas) < 0.35 and max(areas) > 0.7
    assert 0.6 < min(ratios) < 0.8 and 1.2 < max(ratios) < 1.6
    whole = augmented({})
    np.testing.assert_allclose(
        whole[12, :, 0], (10 + (np.arange(24) + 0.5) * 2.5 - 0.5) * 3, atol=4
    )


def test_flip_mirrors_unless_forbidden():
    np.testing.assert_array_equal(augmented({"flip": 1.0}), augmented({})[:, ::-1])
    np.testing.assert_array_equal(augmented({"flip": 1.0}, may_flip=False), augmented({}))
    flipped = [(augmented({"flip": 0.5}, seed) != augmented({})).any() for seed in range(60)]
    assert 15 < sum(flipped) < 45


def test_jitter_moves_brightness_contrast_and_saturation_within_bounds():
    means = [augmented({"jitter": 0.3}, seed).mean() / augmented({}).mean() for seed in range(40)]
    assert 0.65 < min(means) < 0.85 and 1.15 < max(means) < 1.35
    gray = np.full((24, 24, 3), 100, np.uint8)
    jittered = augment_image(gray, 24, AugmentConfig(jitter=0.3), rng(1), may_flip=False)
    assert (
        np.ptp(jittered) == 0
    )  # gray stays gray whatever the saturation, and flat whatever the contrast


def test_speed_changes_length_and_pitch():
    lengths = []
    for seed in range(12):
        changed = wave({"speed": 0.2}, seed)
        lengths.append(len(changed))
        middle = changed[2000:10_000].astype(float) * np.hanning(8000)
        hertz = np.argmax(abs(np.fft.rfft(middle, 64_000))) / 4
        assert hertz == pytest.approx(440 * 16_000 / len(changed), rel=0.01)
    assert 13_200 < min(lengths) < 15_500 and 16_500 < max(lengths) < 20_100
    assert len(wave({"speed": 0.5}, samples=TONE[:400])) >= 400


def test_gain_keeps_the_shape_and_does_not_clip():
    levels = []
    for seed in range(20):
        louder = wave({"gain_db": 12.0}, seed).astype(float)
        assert np.corrcoef(louder, TONE)[0, 1] > 0.9999
        levels.append(20 * np.log10(abs(louder).max() / 8000))
    assert -12.1 < min(levels) < -8 and 8 < max(levels) < 12.1
    assert abs(wave({"gain_db": 40.0}, 3).astype(int)).max() <= 32767


def test_noise_has_the_level_that_was_asked():
    for seed in range(5):
        noise = wave({"noise_db": (10.0, 10.0)}, seed).astype(float) - TONE
        assert 10 * np.log10(np.mean(TONE.astype(float) ** 2) / np.mean(noise**2)) == pytest.approx(
            10, abs=0.3
        )


def test_reverb_fades_as_long_as_asked():
    click = np.zeros(16_000, np.int16)
    click[100] = 16_000
    tail = wave({"reverb_seconds": 0.5, "reverb": 1.0}, 2, click).astype(float)
    assert tail[100] >= 15_900 and not tail[:100].any() and len(tail) == 16_000
    assert abs(tail[101:2000]).max() > 100 and abs(tail[100 + 8000 :]).max() < 40
    np.testing.assert_array_equal(wave({"reverb_seconds": 0.5, "reverb": 0.0}), TONE)


def test_masks_mute_stretches_and_bands():
    muted = wave({"time_masks": 2, "time_mask_seconds": 0.3}, 1)
    changed = muted != TONE
    assert 100 < changed.sum() <= 9600 and not muted[changed].any()
    noise = (rng(5).standard_normal(16_000) * 3000).astype(np.int16)
    before, after = (
        abs(np.fft.rfft(w.astype(float))) for w in (noise, wave({"frequency_masks": 1}, 4, noise))
    )
    gone = after < 0.05 * before
    low, high = np.flatnonzero(gone)[[0, -1]]
    assert gone[low : high + 1].mean() > 0.95 and high > low and high <= low * 2**0.5 + 2
    np.testing.assert_allclose(
        np.delete(after, range(low, high + 1)), np.delete(before, range(low, high + 1)), atol=200
    )


def test_everything_is_off_by_default():
    assert not AugmentConfig().varies_images and not AugmentConfig().varies_speech
    np.testing.assert_array_equal(wave({}), TONE)
    source = Memory([800] * 20)
    same(take(source, 4), take(source, 4, augment=AugmentConfig()))


ALL = AugmentConfig(
    crop_area=0.3,
    flip=0.5,
    jitter=0.3,
    speed=0.1,
    gain_db=6,
    noise_db=(5, 30),
    reverb_seconds=0.1,
    time_masks=1,
    time_mask_seconds=0.02,
    frequency_masks=1,
)


class Photos(Memory):
    """Images that are not of one color, so that crops differ."""

    def image(self, row):
        return png(np.random.default_rng(row).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("cache_mib", [0, 100])
def test_batches_are_the_same_bytes_for_any_number_of_threads(threads, cache_mib):
    lengths = rng(1).integers(500, 4000, 43)
    options = {"bucket_seconds": (0.1, 0.2), "augment": ALL}
    plain = take(Photos(lengths), 12, threads=0, **options)
    same(plain, take(Photos(lengths), 12, threads=threads, cache_mib=cache_mib, **options))
    same(
        plain[7:],
        take(Photos(lengths), 5, threads=threads, start_step=7, cache_mib=cache_mib, **options),
    )


def test_two_processes_together_give_the_batch_of_one():
    lengths = rng(1).integers(500, 4000, 43)
    whole, *parts = (
        take(Photos(lengths), 7, augment=ALL, threads=2, process_index=p, process_count=n)
        for p, n in ((0, 1), (0, 2), (1, 2))
    )
    joined = [(step, {key: np.concatenate([part[k][1][key] for part in parts]) for key in batch})
              for k, (step, batch) in enumerate(whole)]  # fmt: skip
    same(whole, joined)


def test_draws_differ_between_epochs_and_seeds():
    source = Photos([800] * 8)
    one, two = (batch for _, batch in take(source, 2, augment=dataclasses.replace(ALL, speed=0.0)))
    order = [np.argsort(batch["image_id"], kind="stable") for batch in (one, two)]
    assert (one["image"][order[0]] != two["image"][order[1]]).any()
    ((_, other),) = take(source, 1, augment=ALL, seed=9)
    assert (other["image"] != one["image"]).any()


def test_evaluation_is_never_augmented():
    source = Photos([800] * 8)
    (speech,) = loader.speech_batches(source, batch_size=8, seconds_max=0.05, threads=0)
    np.testing.assert_allclose(speech["waveform"][3], source.wave(3), atol=1 / 32768)


def test_images_whose_captions_speak_of_sides_are_not_mirrored():
    class Sided(Photos):
        def recording(self, index):
            captions = ["a dog on the left", "a dog", "a cat", "a cat sleeps", "a bird", ""]
            return {**super().recording(index), "caption": captions[index]}

    ((_, batch),) = take(Sided([800] * 6), 1, batch_size=6, augment=AugmentConfig(flip=1e-9))
    straight = dict(zip(batch["image_id"].tolist(), batch["image"], strict=True))
    ((_, batch),) = take(Sided([800] * 6), 1, batch_size=6, augment=AugmentConfig(flip=1.0))
    for identity, shown in zip(batch["image_id"], batch["image"], strict=True):
        mirrored = (
            int(identity) == 101
        )  # "a cat": no side is spoken of; the others name one, or do not tell
        np.testing.assert_array_equal(
            shown, straight[int(identity)][:, ::-1] if mirrored else straight[int(identity)]
        )


def test_values_out_of_range_are_refused():
    config = default_config()
    config.data.name = "spoken_scenes"
    for key, value in (
        ("flip", 1.5),
        ("crop_area", 0.0),
        ("noise_db", (20.0, 10.0)),
        ("speed", -0.1),
    ):
        with config.ignore_type():
            changed = config.copy_and_resolve_references()
            changed.data.augment[key] = value
        with pytest.raises(UserError, match=f"data.augment.{key}"):
            create_experiment(changed)
    config.data.augment.flip = 0.5
    assert create_experiment(config).data.augment == AugmentConfig(flip=0.5)


LENGTHS = np.clip(np.random.default_rng(0).gamma(9.0, 0.46, 4000), 0.3, 24) * 16_000


@pytest.mark.parametrize("bound", [0.3, 0.2, 0.1])
def test_lengths_are_chosen_for_a_bound_on_padding(bound):
    lengths = LENGTHS.astype(int)
    buckets = batch_plan.fit_buckets(lengths, 160_000, batch_size=32, max_padding=bound)
    assert buckets[-1] == 160_000 and list(buckets) == sorted(set(buckets))
    for seed in range(3):
        padded = filled = 0
        plan, sizes = batch_plan.plan_epoch(
            lengths, batch_size=32, bucket_samples=buckets, seed=seed, epoch=2
        )
        for row, size in zip(plan, sizes, strict=True):
            padded += int(size) * 32
            filled += int(np.minimum(lengths[row], size).sum())
        assert (
            1 - filled / padded <= bound + 0.003
        )  # counted on one epoch, kept in the others but for leftovers
    assert len(buckets) <= {0.3: 3, 0.2: 4, 0.1: 8}[bound]


def test_chosen_lengths_are_the_best_of_their_number():
    lengths = (LENGTHS[:60] // 8000 * 8000 + 1).astype(int)
    buckets = batch_plan.fit_buckets(lengths, 80_000, batch_size=1, max_padding=0.2, step=8000)

    def waste(chosen):
        size = np.array(chosen)[np.searchsorted(chosen, np.minimum(lengths, 80_000))]
        return size.sum()

    ends = range(8000, 80_000, 8000)
    others = [(*some, 80_000) for some in itertools.combinations(ends, len(buckets) - 1)]
    assert waste(buckets) == min(map(waste, others))


def test_a_bound_that_cannot_be_kept_is_an_error():
    with pytest.raises(UserError, match="max_padding=0.001 cannot be kept"):
        batch_plan.fit_buckets(LENGTHS.astype(int), 160_000, batch_size=64, max_padding=0.001)
    unknown = np.full(100, -1)
    assert batch_plan.fit_buckets(unknown, 16_000, batch_size=4, max_padding=0.1) == (16_000,)


def test_the_config_chooses_lengths():
    data = DataConfig("x", bucket_seconds=(0.1,), max_padding=0.1)
    source = Memory(rng(0).integers(400, 1600, 400))
    chosen = data.batch_options(source, batch_size=8, seed=0).bucket_seconds
    assert len(chosen) > 1 and chosen[-1] == 0.1
    plain = DataConfig("x", bucket_seconds=(0.1,)).batch_options(source, batch_size=8, seed=0)
    assert plain.bucket_seconds == (0.1,)
    batches = take(source, 50, bucket_seconds=chosen)
    padded = sum(batch["waveform"].size for _, batch in batches)
    assert 1 - sum(batch["speech_lengths"].sum() for _, batch in batches) / padded <= 0.1
