"""Which recordings are in which training batch: a pure function of (seed, epoch)."""

from collections.abc import Sequence

import numpy as np

from c2f_jax.errors import UserError
from c2f_jax.objectives.keys import Stream, host_rng


def bucket_of(num_samples: np.ndarray, bucket_samples: Sequence[int]) -> np.ndarray:
    """The shortest bucket that holds each recording, int (M,); the longest for longer and for unknown (-1) lengths."""
    bucket = np.searchsorted(np.asarray(bucket_samples), num_samples, side="left")
    return np.where(
        num_samples < 0, len(bucket_samples) - 1, np.minimum(bucket, len(bucket_samples) - 1)
    )


def plan_epoch(
    num_samples: np.ndarray,
    *,
    batch_size: int,
    bucket_samples: Sequence[int],
    seed: int,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The batches of one epoch: recordings int64 (steps, batch) and the padded length of each batch int64 (steps,).

    steps = floor(M / batch) in every epoch. Each batch is of one bucket; what is left over of a bucket joins the next
    longer one, so that no recording is left out but the last M mod batch, other ones in each epoch.
    """
    rng = host_rng(seed, Stream.BATCHES, epoch)
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


def padding_share(
    num_samples: np.ndarray, *, batch_size: int, bucket_samples: Sequence[int], seed: int = 0
) -> float:
    """Share of padding among all samples of the batches of one epoch, cropped and unknown lengths counted as full."""
    plan, lengths = plan_epoch(
        num_samples, batch_size=batch_size, bucket_samples=bucket_samples, seed=seed, epoch=0
    )
    known = np.where(num_samples < 0, bucket_samples[-1], num_samples)
    return float(1 - np.minimum(known[plan], lengths[:, None]).sum() / (lengths.sum() * batch_size))


def fit_buckets(
    num_samples: np.ndarray,
    longest: int,
    *,
    batch_size: int,
    max_padding: float,
    step: int | None = None,
) -> tuple[int, ...]:
    """The fewest bucket lengths, the last one `longest`, with at most max_padding of padding in an epoch's batches.

    For each number of buckets those lengths (multiples of step, a 64th of the longest unless given) that waste least
    are found by dynamic programming, then the batches of an epoch are planned and counted, leftovers included. A
    compiled step a length is the price, so at most 16 are tried; `UserError` when these do not suffice.
    """
    step = step or max(longest // 64, 1)
    lengths = np.sort(np.where(num_samples < 0, longest, np.minimum(num_samples, longest)))
    ends = np.unique([*(-(-lengths // step) * step).clip(min(400, longest), longest), longest])
    below = np.searchsorted(lengths, ends, side="right")  # recordings that fit into each end
    cost = ends * below.astype(float)  # samples used when one bucket holds all up to this end
    best, back = [cost], []
    for count in range(1, min(16, len(ends)) + 1):
        if count > 1:
            # used[j, k]: all up to end j in count - 1 buckets, those from j to k in one of length ends[k]
            used = best[-1][:, None] + ends[None, :] * (below[None, :] - below[:, None])
            used[np.tril_indices(len(ends))] = np.inf
            back.append(used.argmin(axis=0))
            best.append(used.min(axis=0))
        place, chosen = len(ends) - 1, [longest]
        for previous in reversed(back):
            place = int(previous[place])
            chosen.append(int(ends[place]))
        buckets = tuple(sorted(set(chosen)))
        share = padding_share(num_samples, batch_size=batch_size, bucket_samples=buckets)
        if share <= max_padding:
            return buckets
    raise UserError(
        f"max_padding={max_padding:g} cannot be kept with {len(buckets)} lengths, which pad {share:.3f}: allow more, "
        "or take a smaller batch_size or a shorter last bucket"
    )


def check_plan(
    count: int, *, batch_size: int, bucket_seconds: Sequence[float], process_count: int = 1
) -> None:
    """Raises `UserError` when no epoch of `count` recordings can be planned so."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a multiple of the number of processes, {process_count}"
        )
    if batch_size > count:
        raise UserError(
            f"batch_size {batch_size} is more than the {count} recordings of the training split"
        )
    increasing = all(a < b for a, b in zip(bucket_seconds, bucket_seconds[1:], strict=False))
    if not len(bucket_seconds) or not increasing or bucket_seconds[0] < 0.025:
        raise UserError(
            f"bucket_seconds {tuple(bucket_seconds)} must be increasing lengths in seconds, at least "
            "0.025, such as (2.0, 4.0, 8.0); the last one is the crop length"
        )
