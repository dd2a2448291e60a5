"""Which recordings are in which training batch: a pure function of (seed, epoch)."""

from collections.abc import Sequence

import numpy as np

from c2f_jax.data.source import MIN_SAMPLES
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError
from c2f_jax.objectives.keys import Stream, host_rng

MOST_BUCKETS = 16  # each is one more compiled step
MIN_SECONDS = MIN_SAMPLES / SAMPLE_RATE


def bucket_of(num_samples: np.ndarray, bucket_samples: Sequence[int]) -> np.ndarray:
    """Choose the bucket of each recording.

    Args:
      num_samples: int (M,), length of each recording, -1 where unknown.
      bucket_samples: lengths of the buckets, increasing.

    Returns:
      int (M,), the shortest bucket that holds the recording; the last one for longer and for
      unknown lengths.
    """
    last = len(bucket_samples) - 1
    bucket = np.searchsorted(np.asarray(bucket_samples), num_samples, side="left")
    return np.where(num_samples < 0, last, np.minimum(bucket, last))


def plan_epoch(
    num_samples: np.ndarray,
    *,
    batch_size: int,
    bucket_samples: Sequence[int],
    seed: int,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Plan the batches of one epoch.

    A batch belongs to one bucket. The remainder of a bucket joins the next longer one, so that only
    M mod batch_size recordings are left out, different ones in each epoch.

    Args:
      num_samples: int (M,), length of each recording, -1 where unknown.
      batch_size: recordings of a batch.
      bucket_samples: lengths of the buckets, increasing.
      seed: seed of the run.
      epoch: number of the epoch.

    Returns:
      The recordings of each batch, int64 (steps, batch_size), and its padded length, int64
      (steps,); steps = floor(M / batch_size).
    """
    rng = host_rng(seed, Stream.BATCHES, epoch)

    order = rng.permutation(len(num_samples))
    bucket = bucket_of(num_samples, bucket_samples)[order]

    # From the shortest bucket to the longest, so that remainders can move up.
    batches, lengths = [], []
    left_over = order[:0]
    for k, samples in enumerate(bucket_samples):
        members = np.concatenate([left_over, order[bucket == k]])
        full = len(members) // batch_size * batch_size
        batches.append(members[:full].reshape(-1, batch_size))
        lengths.append(np.full(full // batch_size, samples))
        left_over = members[full:]

    plan, padded = np.concatenate(batches), np.concatenate(lengths)

    if len(bucket_samples) > 1:
        # The buckets are mixed over the epoch.
        shuffle = rng.permutation(len(plan))
        plan, padded = plan[shuffle], padded[shuffle]
    return plan, padded


def padding_share(
    num_samples: np.ndarray, *, batch_size: int, bucket_samples: Sequence[int], seed: int = 0
) -> float:
    """Count the padding in the batches of one epoch.

    Args:
      num_samples: int (M,), length of each recording, -1 where unknown.
      batch_size: recordings of a batch.
      bucket_samples: lengths of the buckets, increasing.
      seed: seed of the plan.

    Returns:
      Its share among all samples; recordings that are cropped or of unknown length fill their row.
    """
    plan, lengths = plan_epoch(
        num_samples, batch_size=batch_size, bucket_samples=bucket_samples, seed=seed, epoch=0
    )

    known = np.where(num_samples < 0, bucket_samples[-1], num_samples)
    used = np.minimum(known[plan], lengths[:, None]).sum()
    return float(1 - used / (lengths.sum() * batch_size))


def fit_buckets(
    num_samples: np.ndarray,
    longest: int,
    *,
    batch_size: int,
    max_padding: float,
    step: int | None = None,
) -> tuple[int, ...]:
    """Choose the fewest bucket lengths that keep the padding of an epoch's batches below a bound.

    For each number of buckets, dynamic programming finds the lengths that waste least. Then the
    batches of an epoch are planned and their padding counted, leftovers included. Each length is
    one more compiled step, so only few are tried.

    Args:
      num_samples: int (M,), length of each recording, -1 where unknown.
      longest: length of the last bucket in samples.
      batch_size: recordings of a batch.
      max_padding: largest share of padding.
      step: lengths are multiples of this; None for a 64th of the longest.

    Returns:
      The lengths in samples, increasing.

    Raises:
      UserError: the bound cannot be kept.
    """
    step = step or max(longest // 64, 1)

    # Candidates are the lengths that occur, rounded up to a multiple of the step.
    lengths = np.where(num_samples < 0, longest, np.minimum(num_samples, longest))
    ends = _round_up(lengths, step).clip(min(MIN_SAMPLES, longest), longest)
    ends = np.unique([*ends, longest])
    # How many recordings fit into each end, and the samples that one bucket of this length takes.
    below = np.searchsorted(np.sort(lengths), ends, side="right")
    best, back = [ends * below.astype(float)], []
    for count in range(1, min(MOST_BUCKETS, len(ends)) + 1):
        if count > 1:
            # used[j, k]: all up to end j in count - 1 buckets, those from j to k in one of ends[k].
            used = best[-1][:, None] + ends[None, :] * (below[None, :] - below[:, None])
            used[np.tril_indices(len(ends))] = np.inf
            back.append(used.argmin(axis=0))
            best.append(used.min(axis=0))

        # Read the best lengths back, from the longest one down.
        place, chosen = len(ends) - 1, [longest]
        for previous in reversed(back):
            place = int(previous[place])
            chosen.append(int(ends[place]))
        buckets = tuple(sorted(set(chosen)))

        share = padding_share(num_samples, batch_size=batch_size, bucket_samples=buckets)
        if share <= max_padding:
            return buckets
    raise UserError(
        f"max_padding={max_padding:g} cannot be kept with {len(buckets)} lengths, which pad "
        f"{share:.3f}: allow more, or take a smaller batch_size or a shorter last bucket"
    )


def _round_up(values: np.ndarray, step: int) -> np.ndarray:
    return -(-values // step) * step


def check_plan(
    count: int, *, batch_size: int, bucket_seconds: Sequence[float], process_count: int = 1
) -> None:
    """Check that epochs can be planned.

    Args:
      count: number of recordings.
      batch_size: recordings of a batch.
      bucket_seconds: lengths of the buckets.
      process_count: number of processes that share a batch.

    Raises:
      UserError: they cannot.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a multiple of the number of processes, "
            f"{process_count}"
        )

    if batch_size > count:
        raise UserError(
            f"batch_size {batch_size} is more than the {count} recordings of the training split"
        )

    increasing = all(a < b for a, b in zip(bucket_seconds, bucket_seconds[1:], strict=False))
    if not len(bucket_seconds) or not increasing or bucket_seconds[0] < MIN_SECONDS:
        raise UserError(
            f"bucket_seconds {tuple(bucket_seconds)} must be increasing lengths in seconds, at "
            f"least {MIN_SECONDS:g}, such as (2.0, 4.0, 8.0); the last one is the crop length"
        )
