"""Which recordings are in which training batch: a pure function of (seed, epoch)."""

from collections.abc import Sequence

import numpy as np

from c2f_jax.errors import UserError


def bucket_of(num_samples: np.ndarray, bucket_samples: Sequence[int]) -> np.ndarray:
    """The shortest bucket that holds each recording, int (M,); the longest for longer and for unknown (-1) lengths."""
    bucket = np.searchsorted(np.asarray(bucket_samples), num_samples, side="left")
    return np.where(num_samples < 0, len(bucket_samples) - 1, np.minimum(bucket, len(bucket_samples) - 1))


def plan_epoch(
    num_samples: np.ndarray, *, batch_size: int, bucket_samples: Sequence[int], seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The batches of one epoch: recordings int64 (steps, batch) and the padded length of each batch int64 (steps,).

    steps = floor(M / batch) in every epoch. Each batch is of one bucket; what is left over of a bucket joins the next
    longer one, so that no recording is left out but the last M mod batch, other ones in each epoch.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(num_samples))
    bucket = bucket_of(num_samples, bucket_samples)[order]
    batches, lengths = [], []
    left_over = order[:0]
    for k, samples in enumerate(bucket_samples):
        members = np.concatenate([left_over, order[bucket == k]])
        full = len(members) // batch_size * batch_size
        batches.append(members[:full].reshape(-1, batch_size))
        lengths.append(np.full(full // batch_size, samples))
        left_over = members[full:]
    shuffle = rng.permutation(sum(map(len, batches))) if len(bucket_samples) > 1 else slice(None)
    return np.concatenate(batches)[shuffle], np.concatenate(lengths)[shuffle]


def check_plan(count: int, *, batch_size: int, bucket_seconds: Sequence[float], process_count: int = 1) -> None:
    """Raises `UserError` when no epoch of `count` recordings can be planned so."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} must be a multiple of the number of processes, {process_count}")
    if batch_size > count:
        raise UserError(f"batch_size {batch_size} is more than the {count} recordings of the training split")
    increasing = all(a < b for a, b in zip(bucket_seconds, bucket_seconds[1:], strict=False))
    if not len(bucket_seconds) or not increasing or bucket_seconds[0] < 0.025:
        raise UserError(
            f"bucket_seconds {tuple(bucket_seconds)} must be increasing lengths in seconds, at least "
            "0.025, such as (2.0, 4.0, 8.0); the last one is the crop length"
        )
