"""Training and evaluation batches as NumPy dicts, decoded ahead of the step by threads.

Training: the step alone determines the batch, so a run resumes by starting at its step, and rows of all processes
concatenated are the batch of one process. Evaluation: everything once, in order, in fixed shapes.
"""

import functools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from c2f_jax.data import batch_plan
from c2f_jax.data.audio import decode_audio
from c2f_jax.data.augment import AugmentConfig, augment_picture, augment_wave, speaks_of_sides
from c2f_jax.data.images import decode_image, open_rgb
from c2f_jax.data.pairs import MIN_SAMPLES, SAMPLE_RATE, PairSource
from c2f_jax.errors import UserError


def steps_per_epoch(source: PairSource, batch_size: int) -> int:
    """Batches in one epoch; the remainder is dropped (other recordings in each epoch)."""
    return len(source) // batch_size


def bucket_seconds(source: PairSource, data, batch_size: int) -> tuple[float, ...]:
    """The training lengths of a `DataConfig`: its bucket_seconds, or as many as its max_padding asks for."""
    if data.max_padding is None:
        return data.bucket_seconds
    longest = round(data.bucket_seconds[-1] * SAMPLE_RATE)
    samples = batch_plan.fit_buckets(source.num_samples, longest, batch_size=batch_size, max_padding=data.max_padding)
    return tuple(count / SAMPLE_RATE for count in samples)


def train_batches(
    source: PairSource,
    *,
    batch_size: int,
    image_size: int,
    bucket_seconds: Sequence[float],
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
    cache_mib: int = 2048,
    augment: AugmentConfig | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """An endless iterator of (step, batch) from start_step on; batch_size counts the rows of all processes.

    The batch holds this process's n = batch_size / process_count rows:
        waveform float32 (n, S), speech_lengths int32 (n,), image uint8 (n, H, W, 3), image_id int32 (n,)
    S is one of bucket_seconds; recordings over the longest bucket are cropped at a place that is a function of
    (seed, epoch, recording). Damaged items are replaced by other recordings and named in `source.bad_items`.
    Decoded items are kept in memory up to cache_mib. threads = 0 loads in the caller's thread; their number changes no
    batch. augment varies pictures and recordings, each by a draw of its own from (seed, epoch, recording). Raises
    `UserError` for sizes that do not fit together and, while iterating, when too many items are bad.
    """
    import grain

    batch_plan.check_plan(
        len(source), batch_size=batch_size, bucket_seconds=bucket_seconds, process_count=process_count
    )
    load = _TrainBatch(
        source, batch_size, image_size, bucket_seconds, seed, process_index, process_count, cache_mib, augment
    )
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, 1) if threads else 0)
    return iter(grain.MapDataset.range(start_step, 2**31 - 1).map(load).to_iter_dataset(options))


class _TrainBatch:
    """step -> (step, batch)."""

    def __init__(
        self, source, batch_size, image_size, bucket_seconds, seed, process_index, process_count, cache_mib, augment
    ):
        self.source, self.batch_size, self.image_size, self.seed = source, batch_size, image_size, seed
        self.augment = augment or AugmentConfig()
        self.may_flip = functools.cache(lambda identity: not speaks_of_sides(source.captions(identity)))
        self.steps_per_epoch = steps_per_epoch(source, batch_size)
        rows = batch_size // process_count
        self.rows = range(process_index * rows, (process_index + 1) * rows)
        self.cache = _Cache(cache_mib * 2**20)
        buckets = [round(s * SAMPLE_RATE) for s in bucket_seconds]
        self.plan = functools.lru_cache(maxsize=2)(
            lambda epoch: batch_plan.plan_epoch(
                source.num_samples, batch_size=batch_size, bucket_samples=buckets, seed=seed, epoch=epoch
            )
        )

    def __call__(self, step: int) -> tuple[int, dict[str, np.ndarray]]:
        step = int(step)
        epoch, position = divmod(step, self.steps_per_epoch)
        plan, lengths = self.plan(epoch)
        samples = int(lengths[position])
        batch = _empty_batch(len(self.rows), samples, self.image_size)
        for out, row in enumerate(self.rows):
            index, wave, image = self._load_row(plan, position, row)
            identity = int(self.source.image_ids[self.source.image_index[index]])
            if self.augment.recordings:
                wave = augment_wave(wave, self.augment, np.random.default_rng((self.seed, epoch, index, 1)))
            if self.augment.pictures:
                rng = np.random.default_rng((self.seed, epoch, index, 2))
                may_flip = self.augment.flip > 0 and self.may_flip(identity)
                image = augment_picture(image, self.image_size, self.augment, rng, may_flip=may_flip)
            if len(wave) > samples:
                start = np.random.default_rng((self.seed, epoch, index)).integers(len(wave) - samples + 1)
                wave = wave[start : start + samples]
            _put_wave(batch, out, wave)
            batch["image"][out] = image
            batch["image_id"][out] = identity
        return step, batch

    def _load_row(self, plan: np.ndarray, position: int, row: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The planned recording, or instead of a damaged one that of the same row in the next batch, and so on.

        When all batches have been tried at this row, the next row is tried; the choice is the same in any process.
        """
        steps, size = plan.shape
        for k in range(plan.size):
            index = int(plan[(position + k) % steps, (row + k // steps) % size])
            picture = int(self.source.image_index[index])
            wave = self.cache.get(("wave", index), functools.partial(load_wave, self.source, index))
            load = load_whole_image if self.augment.pictures else load_image
            image = (
                self.cache.get(("image", picture), functools.partial(load, self.source, picture, self.image_size))
                if wave is not None
                else None
            )
            if image is not None:
                return index, wave, image
        raise UserError(f"{self.source.name}, split {self.source.split}: no recording can be read")


class _Cache:
    """Arrays by key until the limit in bytes; nothing is evicted, since each epoch visits everything once."""

    def __init__(self, limit: int):
        self._room, self._items, self._lock = limit, {}, threading.Lock()

    def get(self, key, make) -> np.ndarray | None:
        """The array of `key`, made when it is not held; None is not kept."""
        array = self._items.get(key)
        if array is None:
            array = make()
            with self._lock:
                if array is not None and key not in self._items and array.nbytes <= self._room:
                    self._items[key] = array
                    self._room -= array.nbytes
        return array


def load_wave(source: PairSource, index: int) -> np.ndarray | None:
    """Recording `index` as int16 (samples,); None, and an entry in `source.bad_items`, when it cannot be used.

    Sixteen bits whatever the file holds, so that a decoded recording costs half as much memory to keep.
    """
    try:
        wave = decode_audio(source.recording(index)["audio"])
        if len(wave) >= MIN_SAMPLES:
            return np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16)
        reason = f"only {len(wave)} samples at 16 kHz; {MIN_SAMPLES} are needed"
    except UserError as e:
        reason = str(e)
    name = source.recording_name(index)
    source.bad_items.add(name, reason.removeprefix(f"{name}: "))
    return None


def load_image(source: PairSource, row: int, size: int) -> np.ndarray | None:
    """Picture `row` as uint8 (size, size, 3); None, and an entry in `source.bad_items`, when it cannot be used."""
    return _read_image(source, row, lambda data: decode_image(data, size))


def load_whole_image(source: PairSource, row: int, size: int) -> np.ndarray | None:
    """Picture `row` uncut, uint8 (H, W, 3), its shorter side at most 2 * size pixels; None as by `load_image`."""

    def decode(data):
        rgb = open_rgb(data, size)
        scale = min(1.0, 2 * size / min(rgb.size))
        return np.asarray(rgb.resize([max(round(scale * side), 1) for side in rgb.size], Image.Resampling.BICUBIC))

    return _read_image(source, row, decode)


def _read_image(source: PairSource, row: int, decode) -> np.ndarray | None:
    try:
        return decode(source.image(row))
    except UserError as e:
        name = source.image_name(row)
        source.bad_items.add(name, str(e).removeprefix(f"{name}: "))
        return None


def speech_batches(
    source: PairSource, *, batch_size: int, seconds_max: float, threads: int = 4, prefetch: int = 4
) -> Iterator[dict[str, np.ndarray]]:
    """Every recording once, in order, whole but for what exceeds seconds_max; all batches of one shape.

        waveform float32 (n, S), speech_lengths int32 (n,), index int32 (n,), valid bool (n,)
    S = seconds_max at 16 kHz. Rows that only fill the last batch, and unreadable recordings, have valid = False; an
    unreadable one is silence of a legal length.
    """
    samples = round(seconds_max * SAMPLE_RATE)

    def load(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch = _empty_batch(len(rows), samples, 0)
        valid = np.ones(len(rows), bool)
        for out, index in enumerate(rows):
            wave = load_wave(source, int(index))
            if wave is None:
                valid[out], wave = False, np.zeros(MIN_SAMPLES, np.int16)
            _put_wave(batch, out, wave[:samples])
        return {"waveform": batch["waveform"], "speech_lengths": batch["speech_lengths"], "valid": valid}

    return _in_order(len(source), batch_size, load, threads, prefetch)


def image_batches(
    source: PairSource, *, batch_size: int, image_size: int, threads: int = 4, prefetch: int = 4
) -> Iterator[dict[str, np.ndarray]]:
    """Every picture once, in gallery order; all batches of one shape.

        image uint8 (n, H, W, 3), index int32 (n,), valid bool (n,)
    Rows that only fill the last batch, and unreadable pictures (black), have valid = False.
    """

    def load(rows: np.ndarray) -> dict[str, np.ndarray]:
        images = [load_image(source, int(row), image_size) for row in rows]
        valid = np.array([image is not None for image in images])
        black = np.zeros((image_size, image_size, 3), np.uint8)
        return {"image": np.stack([black if image is None else image for image in images]), "valid": valid}

    return _in_order(source.num_images, batch_size, load, threads, prefetch)


def _in_order(count: int, batch_size: int, load, threads: int, prefetch: int) -> Iterator[dict[str, np.ndarray]]:
    import grain

    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} of the evaluation must be at least 1")

    def load_batch(number: int) -> dict[str, np.ndarray]:
        rows = np.arange(number * batch_size, (number + 1) * batch_size)
        index = np.minimum(rows, count - 1).astype(np.int32)
        batch = load(index)
        return {**batch, "index": index, "valid": batch["valid"] & (rows < count)}

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, 1) if threads else 0)
    return iter(grain.MapDataset.range(-(-count // batch_size)).map(load_batch).to_iter_dataset(options))


def _put_wave(batch: dict[str, np.ndarray], row: int, wave: np.ndarray) -> None:
    np.multiply(wave, np.float32(1 / 32768), out=batch["waveform"][row, : len(wave)])
    batch["speech_lengths"][row] = len(wave)


def _empty_batch(rows: int, samples: int, image_size: int) -> dict[str, np.ndarray]:
    return {
        "waveform": np.zeros((rows, samples), np.float32),
        "speech_lengths": np.zeros(rows, np.int32),
        "image": np.zeros((rows, image_size, image_size, 3), np.uint8),
        "image_id": np.zeros(rows, np.int32),
    }
