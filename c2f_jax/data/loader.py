"""Training and evaluation batches as NumPy dicts, decoded ahead of the step by threads.

Training: the step alone determines the batch, so a run resumes by starting at its step, and the
rows of all processes, one after the other, are the batch of one process. Evaluation: each item
once, in few shapes.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Iterator

import numpy as np

from c2f_jax.data import batch_plan
from c2f_jax.data.augment import AugmentConfig, augment_image, augment_wave, mentions_sides
from c2f_jax.data.items import load_image_input, load_speech_input, load_whole_image
from c2f_jax.data.source import MIN_SAMPLES, PairSource
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError
from c2f_jax.objectives.keys import Stream, host_rng

Batch = dict[str, np.ndarray]
# The iterator needs an end; no run reaches it.
MOST_STEPS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """What a stream of training batches is made of.

    Attributes:
      batch_size: rows of a batch, those of all processes together.
      image_size: side of an image in pixels.
      bucket_seconds: lengths of the batches in seconds, increasing; the last one is the crop
        length.
      seed: seed of the order, the crops and the augmentation.
      augment: how recordings and images are varied.
      process_index: number of this process.
      process_count: number of processes.
      threads: threads that decode; 0 to decode in the caller's thread. They change no batch.
      prefetch: batches held ready.
      cache_mib: memory for decoded items.
    """

    batch_size: int
    image_size: int
    bucket_seconds: tuple[float, ...]
    seed: int
    augment: AugmentConfig = AugmentConfig()
    process_index: int = 0
    process_count: int = 1
    threads: int = 4
    prefetch: int = 4
    cache_mib: int = 2048


def steps_per_epoch(source: PairSource, batch_size: int) -> int:
    """Return the number of batches in an epoch.

    The remainder is dropped, different recordings in each epoch.
    """
    return len(source) // batch_size


def train_batches(
    source: PairSource, options: BatchOptions, *, start_step: int = 0
) -> Iterator[tuple[int, Batch]]:
    """Iterate over training batches, without end.

    Damaged items are replaced by other recordings and named in `source.bad_items`. Recordings over
    the longest bucket are cropped at a random place. With speech copies, each epoch takes a
    recording or one of its copies. All draws depend on (seed, epoch, recording) alone.

    Args:
      source: pairs.
      options: what the batches are made of.
      start_step: first step.

    Returns:
      (step, batch) of each step; the batch holds this process's n = batch_size / process_count
      rows: waveform float32 (n, S), speech_lengths int32 (n,), image uint8 (n, H, W, 3) and
      image_id int32 (n,); from the source's feature caches, speech_tokens float16 (n, T, C) in
      place of waveform and image_tokens float16 (n, P, C) in place of image. S is one of
      bucket_seconds.

    Raises:
      UserError: sizes do not fit together or, while iterating, too many items are bad.
    """
    batch_plan.check_plan(
        len(source),
        batch_size=options.batch_size,
        bucket_seconds=options.bucket_seconds,
        process_count=options.process_count,
    )

    load = _TrainBatch(source, options)
    return _iterate(range(start_step, MOST_STEPS), load, options.threads, options.prefetch)


def _iterate(
    numbers: range, load: Callable[[int], object], threads: int, prefetch: int
) -> Iterator:
    """Iterate over `load(number)` of all numbers, in order, loaded ahead by threads."""
    import grain

    buffered = max(prefetch, 1) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered)
    data_set = grain.MapDataset.range(numbers.start, numbers.stop, numbers.step).map(load)
    return iter(data_set.to_iter_dataset(options))


class _TrainBatch:
    """The function from a step to (step, batch)."""

    def __init__(self, source: PairSource, options: BatchOptions) -> None:
        self.source, self.options = source, options
        self.augment = options.augment

        self.cache = _Cache(options.cache_mib * 2**20)
        self.steps_per_epoch = steps_per_epoch(source, options.batch_size)

        # This process's rows of every batch.
        rows = options.batch_size // options.process_count
        self.rows = range(options.process_index * rows, (options.process_index + 1) * rows)
        # Threads that load ahead may be in two epochs.
        self.plan = functools.lru_cache(maxsize=2)(self._plan)
        self.may_flip = functools.cache(self._may_flip)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return batch_plan.plan_epoch(
            self.source.num_samples,
            batch_size=self.options.batch_size,
            bucket_samples=[round(s * SAMPLE_RATE) for s in self.options.bucket_seconds],
            seed=self.options.seed,
            epoch=epoch,
        )

    def _may_flip(self, identity: int) -> bool:
        return self.augment.flip > 0 and not mentions_sides(self.source.captions(identity))

    def __call__(self, step: int) -> tuple[int, Batch]:
        step = int(step)
        epoch, position = divmod(step, self.steps_per_epoch)

        # The plan of the epoch gives the recordings of the batch and its length.
        plan, lengths = self.plan(epoch)
        batch = empty_speech(self.source, len(self.rows), int(lengths[position]))
        longest = _longest(batch)

        image_ids = np.zeros(len(self.rows), np.int32)
        images = []
        for out, row in enumerate(self.rows):
            index, speech, image = self._load_row(epoch, plan, position, row)
            image_ids[out] = self.source.image_ids[self.source.image_index[index]]
            # Changes of speed alter the length, so the crop comes after them.
            speech = self._vary_speech(speech, epoch, index)
            images.append(self._vary_image(image, epoch, index, int(image_ids[out])))
            if len(speech) > longest:
                rng = host_rng(self.options.seed, Stream.CROPS, epoch, index)
                start = rng.integers(len(speech) - longest + 1)
                speech = speech[start : start + longest]
            _put_speech(batch, out, speech)

        batch["image_id"] = image_ids
        batch[_image_name(self.source)] = np.stack(images)
        return step, batch

    def _vary_speech(self, speech: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Vary a recording; cached tokens are varied by their copies instead."""
        if not self.augment.varies_speech or self.source.inputs.speech_features is not None:
            return speech
        rng = host_rng(self.options.seed, Stream.SPEECH_AUGMENTATION, epoch, index)
        return augment_wave(speech, self.augment, rng)

    def _vary_image(self, image: np.ndarray, epoch: int, index: int, identity: int) -> np.ndarray:
        """Vary a whole image and make it a square."""
        if not self.augment.varies_images:
            return image
        rng = host_rng(self.options.seed, Stream.IMAGE_AUGMENTATION, epoch, index)
        size, may_flip = self.options.image_size, self.may_flip(identity)
        return augment_image(image, size, self.augment, rng, may_flip=may_flip)

    def _load_row(
        self, epoch: int, plan: np.ndarray, position: int, row: int
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """Load the recording that is planned for a row, and its image.

        A damaged one is replaced by that of the same row in the next batch, and so on; once all
        batches have been tried at this row, by those of the next row. The choice is the same in any
        process.
        """
        # Only this row is replaced; the other rows of the batch stay as they are.
        steps, size = plan.shape
        for k in range(plan.size):
            index = int(plan[(position + k) % steps, (row + k // steps) % size])

            speech = self._load_speech(epoch, index)
            if speech is None:
                continue
            image = self._load_image(int(self.source.image_index[index]))
            if image is not None:
                return index, speech, image
        raise UserError(f"{self.source.name}, split {self.source.split}: no recording can be read")

    def _load_speech(self, epoch: int, index: int) -> np.ndarray | None:
        """Load a recording, or whichever of its copies this epoch draws."""
        copy, copies = 0, len(self.source.inputs.speech_copies)
        if copies:
            rng = host_rng(self.options.seed, Stream.SPEECH_COPIES, epoch, index)
            copy = int(rng.integers(copies + 1))
        load = functools.partial(load_speech_input, self.source, index, copy)
        return self.cache.get(("speech", index, copy), load)

    def _load_image(self, row: int) -> np.ndarray | None:
        """Load an image, uncut if it will be cropped at random."""
        load = load_whole_image if self.augment.varies_images else load_image_input
        load = functools.partial(load, self.source, row, self.options.image_size)
        return self.cache.get(("image", row), load)


class _Cache:
    """Arrays by key, up to a limit in bytes.

    Nothing is evicted, since each epoch visits everything once.
    """

    def __init__(self, limit: int) -> None:
        self._room, self._lock = limit, threading.Lock()
        self._items: dict[Hashable, np.ndarray] = {}

    def get(self, key: Hashable, make: Callable[[], np.ndarray | None]) -> np.ndarray | None:
        """Return the array of a key; make and keep it if it is missing; None is not kept."""
        array = self._items.get(key)
        if array is None:
            array = make()
            # Another thread may have made the same array in the meantime.
            with self._lock:
                if array is not None and key not in self._items and array.nbytes <= self._room:
                    self._items[key] = array
                    self._room -= array.nbytes
        return array


def empty_speech(source: PairSource, rows: int, samples: int) -> Batch:
    """Make a batch of silence.

    Args:
      source: pairs.
      rows: number of rows.
      samples: length in samples at 16 kHz.

    Returns:
      waveform float32 (rows, samples), or speech_tokens float16 (rows, T, C) of as many samples,
      and speech_lengths int32 (rows,), all 0.
    """
    lengths = np.zeros(rows, np.int32)
    features = source.inputs.speech_features
    if features is None:
        return {"waveform": np.zeros((rows, samples), np.float32), "speech_lengths": lengths}
    shape = (rows, features.tokens_of_samples(samples), *features.shape)
    return {"speech_tokens": np.zeros(shape, np.float16), "speech_lengths": lengths}


def empty_image(source: PairSource, size: int) -> np.ndarray:
    """Make a black image.

    Args:
      source: pairs.
      size: side in pixels.

    Returns:
      uint8 (size, size, 3), or zeros float16 (P, C), as many tokens as an image has.
    """
    features = source.inputs.image_features
    if features is None:
        return np.zeros((size, size, 3), np.uint8)
    return np.zeros((features.most_tokens, *features.shape), np.float16)


def speech_batches(
    source: PairSource,
    *,
    batch_size: int,
    seconds_max: float,
    part: tuple[int, int] = (0, 1),
    threads: int = 4,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Iterate once over all recordings, by length if it is known.

    Recordings are cut only where they exceed seconds_max. The batches have three lengths: three
    shapes to compile, and little padding where most recordings are far shorter than the longest.

    Args:
      source: pairs.
      batch_size: rows of a batch.
      seconds_max: length in seconds that recordings are cut to.
      part: (p, n) for batches p, p + n, p + 2 n and so on; nothing of the others is read.
      threads: threads that decode; 0 to decode in the caller's thread.
      prefetch: batches held ready.

    Returns:
      Batches of waveform float32 (n, S) or speech_tokens float16 (n, T, C), speech_lengths int32
      (n,), index int32 (n,) and valid bool (n,). S is the smallest of seconds_max / 4, / 2 and / 1
      that holds the batch. valid is False in rows that only fill the last batch, and for unreadable
      recordings, which are silence of a legal length.

    Raises:
      UserError: batch_size is below 1 or, while iterating, too many items are bad.
    """
    # Three shapes to compile, the shortest first.
    shapes = [round(seconds_max * SAMPLE_RATE / part) for part in (4, 2, 1)]

    def load(rows: np.ndarray) -> Batch:
        speeches = [load_speech_input(source, int(index)) for index in rows]
        needed = max((len(speech) for speech in speeches if speech is not None), default=0)
        # What was read decides, not the length that a manifest states.
        for samples in shapes:
            batch = empty_speech(source, len(rows), samples)
            longest = _longest(batch)
            if needed <= longest:
                break

        # Rows without a recording are silence that every encoder takes.
        batch["speech_lengths"][:] = min(MIN_SAMPLES, longest)
        batch["valid"] = np.array([speech is not None for speech in speeches])
        for row, speech in enumerate(speeches):
            if speech is not None:
                _put_speech(batch, row, speech[:longest])
        return batch

    # Neighbors in length share a batch; those of unknown length count as the longest.
    known = np.where(source.num_samples < 0, shapes[-1], source.num_samples)
    order = np.argsort(known, kind="stable")
    return _everything(order, batch_size, load, part, threads, prefetch)


def image_batches(
    source: PairSource,
    *,
    batch_size: int,
    image_size: int,
    part: tuple[int, int] = (0, 1),
    threads: int = 4,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Iterate once over all images, in gallery order; all batches have one shape.

    Args:
      source: pairs.
      batch_size: rows of a batch.
      image_size: side in pixels.
      part: (p, n) for batches p, p + n, p + 2 n and so on; nothing of the others is read.
      threads: threads that decode; 0 to decode in the caller's thread.
      prefetch: batches held ready.

    Returns:
      Batches of image uint8 (n, H, W, 3) or image_tokens float16 (n, P, C), index int32 (n,) and
      valid bool (n,). valid is False in rows that only fill the last batch, and for unreadable
      images, which are black.

    Raises:
      UserError: batch_size is below 1 or, while iterating, too many items are bad.
    """

    def load(rows: np.ndarray) -> Batch:
        images = [load_image_input(source, int(row), image_size) for row in rows]
        valid = np.array([image is not None for image in images])

        # All rows need an image, so that the batches have one shape.
        black = empty_image(source, image_size)
        stacked = np.stack([black if image is None else image for image in images])
        return {_image_name(source): stacked, "valid": valid}

    order = np.arange(source.num_images)
    return _everything(order, batch_size, load, part, threads, prefetch)


def _everything(
    order: np.ndarray,
    batch_size: int,
    load: Callable[[np.ndarray], Batch],
    part: tuple[int, int],
    threads: int,
    prefetch: int,
) -> Iterator[Batch]:
    """Iterate over a part of the batches of all items in an order.

    The last item fills up the last batch.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} of the evaluation must be at least 1")

    def load_batch(number: int) -> Batch:
        # The last batch may reach past the end; its rows there repeat the last item.
        rows = np.arange(number * batch_size, (number + 1) * batch_size)
        index = order[np.minimum(rows, len(order) - 1)].astype(np.int32)
        batch = load(index)
        return {**batch, "index": index, "valid": batch["valid"] & (rows < len(order))}

    first, every = part
    numbers = range(first, -(-len(order) // batch_size), every)
    return _iterate(numbers, load_batch, threads, prefetch)


def _longest(batch: Batch) -> int:
    """Return how many samples or tokens a row of the batch holds."""
    return batch["speech_tokens" if "speech_tokens" in batch else "waveform"].shape[1]


def _put_speech(batch: Batch, row: int, speech: np.ndarray) -> None:
    """Write a recording, int16 samples or tokens, to a row."""
    if "speech_tokens" in batch:
        batch["speech_tokens"][row, : len(speech)] = speech
    else:
        np.multiply(speech, np.float32(1 / 32768), out=batch["waveform"][row, : len(speech)])
    batch["speech_lengths"][row] = len(speech)


def _image_name(source: PairSource) -> str:
    return "image" if source.inputs.image_features is None else "image_tokens"
