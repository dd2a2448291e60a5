"""Training and evaluation batches as NumPy dicts, decoded ahead of the step by threads.

Training: the step alone determines the batch, so a run resumes by starting at its step, and rows of all processes
concatenated are the batch of one process. Evaluation: everything once, in few shapes.
"""

import functools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from c2f_jax.data import batch_plan
from c2f_jax.data.audio import decode_audio
from c2f_jax.data.augment import AugmentConfig, augment_image, augment_wave, mentions_sides
from c2f_jax.data.images import decode_image, open_rgb
from c2f_jax.data.source import MIN_SAMPLES, SAMPLE_RATE, PairSource
from c2f_jax.errors import UserError
from c2f_jax.objectives.keys import Stream, host_rng


def steps_per_epoch(source: PairSource, batch_size: int) -> int:
    """Batches in one epoch; the remainder is dropped (other recordings in each epoch)."""
    return len(source) // batch_size


def bucket_seconds(source: PairSource, data, batch_size: int) -> tuple[float, ...]:
    """The training lengths of a `DataConfig`: its bucket_seconds, or as many as its max_padding asks for."""
    if data.max_padding is None:
        return data.bucket_seconds
    longest = round(data.bucket_seconds[-1] * SAMPLE_RATE)
    samples = batch_plan.fit_buckets(
        source.num_samples, longest, batch_size=batch_size, max_padding=data.max_padding
    )
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
    or, from the source's feature caches, speech_tokens float16 (n, T, C) and image_tokens float16 (n, P, C).
    S is one of bucket_seconds; recordings over the longest bucket are cropped at a place that is a function of (seed,
    epoch, recording). Damaged items are replaced by other recordings and named in `source.bad_items`. With speech
    copies, each epoch takes one of a recording and its copies, drawn from the same. Decoded items are kept in memory up
    to cache_mib. threads = 0 loads in the caller's thread; their number changes no batch. augment varies pictures and
    recordings, each by a draw of its own from (seed, epoch, recording). Raises `UserError` for sizes that do not fit
    together and, while iterating, when too many items are bad.
    """
    import grain

    batch_plan.check_plan(
        len(source),
        batch_size=batch_size,
        bucket_seconds=bucket_seconds,
        process_count=process_count,
    )
    load = _TrainBatch(
        source,
        batch_size,
        image_size,
        bucket_seconds,
        seed,
        process_index,
        process_count,
        cache_mib,
        augment,
    )
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(prefetch, 1) if threads else 0
    )
    return iter(grain.MapDataset.range(start_step, 2**31 - 1).map(load).to_iter_dataset(options))


class _TrainBatch:
    """step -> (step, batch)."""

    def __init__(
        self,
        source,
        batch_size,
        image_size,
        bucket_seconds,
        seed,
        process_index,
        process_count,
        cache_mib,
        augment,
    ):
        self.source, self.batch_size, self.image_size, self.seed = (
            source,
            batch_size,
            image_size,
            seed,
        )
        self.augment = augment or AugmentConfig()
        self.may_flip = functools.cache(
            lambda identity: not mentions_sides(source.captions(identity))
        )
        self.steps_per_epoch = steps_per_epoch(source, batch_size)
        rows = batch_size // process_count
        self.rows = range(process_index * rows, (process_index + 1) * rows)
        self.cache = _Cache(cache_mib * 2**20)
        buckets = [round(s * SAMPLE_RATE) for s in bucket_seconds]
        self.plan = functools.lru_cache(maxsize=2)(
            lambda epoch: batch_plan.plan_epoch(
                source.num_samples,
                batch_size=batch_size,
                bucket_samples=buckets,
                seed=seed,
                epoch=epoch,
            )
        )

    def __call__(self, step: int) -> tuple[int, dict[str, np.ndarray]]:
        step = int(step)
        epoch, position = divmod(step, self.steps_per_epoch)
        plan, lengths = self.plan(epoch)
        batch = empty_speech(self.source, len(self.rows), int(lengths[position]))
        longest = _longest(batch)
        images, batch["image_id"] = [], np.zeros(len(self.rows), np.int32)
        for out, row in enumerate(self.rows):
            index, speech, image = self._load_row(epoch, plan, position, row)
            identity = int(self.source.image_ids[self.source.image_index[index]])
            if self.augment.varies_speech and self.source.inputs.speech_features is None:
                speech = augment_wave(
                    speech,
                    self.augment,
                    host_rng(self.seed, Stream.SPEECH_AUGMENTATION, epoch, index),
                )
            if self.augment.varies_images:
                rng = host_rng(self.seed, Stream.IMAGE_AUGMENTATION, epoch, index)
                may_flip = self.augment.flip > 0 and self.may_flip(identity)
                image = augment_image(image, self.image_size, self.augment, rng, may_flip=may_flip)
            if len(speech) > longest:
                start = host_rng(self.seed, Stream.CROPS, epoch, index).integers(
                    len(speech) - longest + 1
                )
                speech = speech[start : start + longest]
            _put_speech(batch, out, speech)
            images.append(image)
            batch["image_id"][out] = identity
        batch[_image_name(self.source)] = np.stack(images)
        return step, batch

    def _load_row(
        self, epoch: int, plan: np.ndarray, position: int, row: int
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """The planned recording, or instead of a damaged one that of the same row in the next batch, and so on.

        When all batches have been tried at this row, the next row is tried; the choice is the same in any process.
        """
        steps, size = plan.shape
        for k in range(plan.size):
            index = int(plan[(position + k) % steps, (row + k // steps) % size])
            picture = int(self.source.image_index[index])
            copies = self.source.inputs.speech_copies
            copy = (
                int(
                    host_rng(self.seed, Stream.SPEECH_COPIES, epoch, index).integers(
                        len(copies) + 1
                    )
                )
                if copies
                else 0
            )
            read = functools.partial(load_speech_input, self.source, index, copy)
            speech = self.cache.get(("speech", index, copy), read)
            load = load_whole_image if self.augment.varies_images else load_image_input
            image = (
                self.cache.get(
                    ("image", picture),
                    functools.partial(load, self.source, picture, self.image_size),
                )
                if speech is not None
                else None
            )
            if image is not None:
                return index, speech, image
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


def load_image(
    source: PairSource, row: int, size: int, resize: str = "square", side: int = 0
) -> np.ndarray | None:
    """Picture `row` as uint8 (size, size, 3); None, and an entry in `source.bad_items`, when it cannot be used."""
    return _read_image(
        source, row, lambda data: decode_image(data, size, resize=resize, resize_side=side)
    )


def load_whole_image(source: PairSource, row: int, size: int) -> np.ndarray | None:
    """Picture `row` uncut, uint8 (H, W, 3), its shorter side at most 2 * size pixels; None as by `load_image`."""

    def decode(data):
        rgb = open_rgb(data, size)
        scale = min(1.0, 2 * size / min(rgb.size))
        return np.asarray(
            rgb.resize([max(round(scale * side), 1) for side in rgb.size], Image.Resampling.BICUBIC)
        )

    return _read_image(source, row, decode)


def _read_image(source: PairSource, row: int, decode) -> np.ndarray | None:
    try:
        return decode(source.image(row))
    except UserError as e:
        name = source.image_name(row)
        source.bad_items.add(name, str(e).removeprefix(f"{name}: "))
        return None


def load_speech_input(source: PairSource, index: int, copy: int = 0) -> np.ndarray | None:
    """Recording `index` as `load_wave` gives it, or its tokens (T, C) where the source has speech features.

    copy 1 and so on are the tokens of its varied copies.
    """
    if source.inputs.speech_features is None:
        return load_wave(source, index)
    features = source.inputs.speech_copies[copy - 1] if copy else source.inputs.speech_features
    return _cached(
        source, features, source.recording_key(index), lambda: source.recording_name(index)
    )


def load_image_input(source: PairSource, row: int, size: int) -> np.ndarray | None:
    """Picture `row` as `load_image` gives it, or its tokens (P, C) where the source has image features."""
    if source.inputs.image_features is None:
        return load_image(
            source, row, size, source.inputs.image_resize, source.inputs.image_resize_side
        )
    return _cached(
        source, source.inputs.image_features, source.image_key(row), lambda: source.image_name(row)
    )


def _cached(source, features, key, name):
    try:
        return np.array(features.tokens(key))
    except UserError as e:
        source.bad_items.add(name(), str(e))
        return None


def empty_speech(source: PairSource, rows: int, samples: int) -> dict[str, np.ndarray]:
    """A batch of silence: waveform (rows, samples), or the tokens of as many samples, and lengths of 0."""
    lengths = np.zeros(rows, np.int32)
    if source.inputs.speech_features is None:
        return {"waveform": np.zeros((rows, samples), np.float32), "speech_lengths": lengths}
    features = source.inputs.speech_features
    shape = (rows, features.tokens_of_samples(samples), *features.shape)
    return {"speech_tokens": np.zeros(shape, np.float16), "speech_lengths": lengths}


def empty_image(source: PairSource, size: int) -> np.ndarray:
    """A black picture (size, size, 3), or as many tokens of zeros as a picture has."""
    if source.inputs.image_features is None:
        return np.zeros((size, size, 3), np.uint8)
    return np.zeros(
        (source.inputs.image_features.most_tokens, *source.inputs.image_features.shape), np.float16
    )


def speech_batches(
    source: PairSource, *, batch_size: int, seconds_max: float, threads: int = 4, prefetch: int = 4
) -> Iterator[dict[str, np.ndarray]]:
    """Every recording once, by length where it is known, whole but for what exceeds seconds_max.

        waveform float32 (n, S) or speech_tokens float16 (n, T, C), speech_lengths int32 (n,), index int32 (n,),
        valid bool (n,)
    S is the smallest of seconds_max / 4, / 2 and / 1 at 16 kHz that holds the batch: three shapes to compile, little
    padding where most recordings are far shorter than the longest. Rows that only fill the last batch, and unreadable
    recordings, have valid = False; an unreadable one is silence of a legal length.
    """
    shapes = [round(seconds_max * SAMPLE_RATE / part) for part in (4, 2, 1)]

    def load(rows: np.ndarray) -> dict[str, np.ndarray]:
        speeches = [load_speech_input(source, int(index)) for index in rows]
        needed = max((len(speech) for speech in speeches if speech is not None), default=0)
        # What was read decides, not the length that a manifest states.
        for samples in shapes:
            batch = empty_speech(source, len(rows), samples)
            if needed <= (longest := _longest(batch)):
                break
        batch["speech_lengths"][:] = min(MIN_SAMPLES, longest)
        for out, speech in enumerate(speeches):
            if speech is not None:
                _put_speech(batch, out, speech[:longest])
        return {**batch, "valid": np.array([speech is not None for speech in speeches])}

    known = np.where(source.num_samples < 0, shapes[-1], source.num_samples)
    return _everything(np.argsort(known, kind="stable"), batch_size, load, threads, prefetch)


def image_batches(
    source: PairSource, *, batch_size: int, image_size: int, threads: int = 4, prefetch: int = 4
) -> Iterator[dict[str, np.ndarray]]:
    """Every picture once, in gallery order; all batches of one shape.

        image uint8 (n, H, W, 3) or image_tokens float16 (n, P, C), index int32 (n,), valid bool (n,)
    Rows that only fill the last batch, and unreadable pictures (black), have valid = False.
    """

    def load(rows: np.ndarray) -> dict[str, np.ndarray]:
        images = [load_image_input(source, int(row), image_size) for row in rows]
        valid = np.array([image is not None for image in images])
        black = empty_image(source, image_size)
        images = np.stack([black if image is None else image for image in images])
        return {_image_name(source): images, "valid": valid}

    return _everything(np.arange(source.num_images), batch_size, load, threads, prefetch)


def _everything(
    order, batch_size: int, load, threads: int, prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
    import grain

    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} of the evaluation must be at least 1")

    def load_batch(number: int) -> dict[str, np.ndarray]:
        rows = np.arange(number * batch_size, (number + 1) * batch_size)
        index = order[np.minimum(rows, len(order) - 1)].astype(np.int32)
        batch = load(index)
        return {**batch, "index": index, "valid": batch["valid"] & (rows < len(order))}

    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(prefetch, 1) if threads else 0
    )
    return iter(
        grain.MapDataset.range(-(-len(order) // batch_size))
        .map(load_batch)
        .to_iter_dataset(options)
    )


def _longest(batch: dict[str, np.ndarray]) -> int:
    """Samples or tokens that a row of the batch holds."""
    return batch["speech_tokens" if "speech_tokens" in batch else "waveform"].shape[1]


def _put_speech(batch: dict[str, np.ndarray], row: int, speech: np.ndarray) -> None:
    if "speech_tokens" in batch:
        batch["speech_tokens"][row, : len(speech)] = speech
    else:
        np.multiply(speech, np.float32(1 / 32768), out=batch["waveform"][row, : len(speech)])
    batch["speech_lengths"][row] = len(speech)


def _image_name(source: PairSource) -> str:
    return "image" if source.inputs.image_features is None else "image_tokens"
