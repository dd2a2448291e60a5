"""What the values of a configuration may be: types and ranges, checked before anything is built from them."""

import math
import types
import typing

from c2f_jax.data.source import MIN_SAMPLES, SAMPLE_RATE
from c2f_jax.errors import UserError

_PARTS = ("model.speech", "model.image", "model.multimodal")
_LEAST_SECONDS = MIN_SAMPLES / SAMPLE_RATE


# What is expected of a number, a test of it, and the values that it holds for. The ranges of ``method`` and
# ``data.augment`` stand at their classes.
_RANGES = (
    (
        "a number from 1 on",
        lambda x: 1 <= x < math.inf,
        [
            *[
                "batch_size",
                "steps",
                "log_every",
                "data.image_size",
                "model.embedding_dim",
                "model.branches",
            ],
            *["eval.k", "eval.batch_size", "eval.pair_batch_size", "eval.resamples"],
            *[
                "model.speech.mels",
                "model.speech.hop",
                "model.image.patch",
                "model.image.token_pool",
            ],
            *[f"{part}.{name}" for part in _PARTS for name in ("width", "heads")],
        ],
    ),
    (
        "a number from 0 on",
        lambda x: 0 <= x < math.inf,
        [
            *[
                "seed",
                "eval_every",
                "queue_size",
                "token_queue_size",
                "method.sim_weight",
                "method.warm_up_steps",
                "method.alpha_ramp_steps",
                "checkpoint_every",
                "data.threads",
                "data.prefetch",
                "data.image_resize_side",
            ],
            *["data.speech_copies", "optimizer.warmup_steps", "optimizer.weight_decay"],
            *["model.speech.conv_layers", "model.speech.conv_blocks", "model.image.conv_blocks"],
            *[f"{part}.depth" for part in _PARTS],
        ],
    ),
    (
        "a number above 0",
        lambda x: 0 < x < math.inf,
        [
            *[
                "optimizer.learning_rate",
                "optimizer.clip_norm",
                "model.initial_tau",
                "method.mining_tau",
                "method.min_tau",
            ],
            *[f"{part}.mlp_ratio" for part in _PARTS],
        ],
    ),
    (
        "a number from 0 to 1",
        lambda x: 0 <= x <= 1,
        [
            "method.alpha",
            "method.momentum",
            "data.max_bad_share",
            "data.shuffled_share",
            "optimizer.final_fraction",
        ],
    ),
    (
        "a number from 0 on and below 1",
        lambda x: 0 <= x < 1,
        [
            "optimizer.b2",
            *[
                f"{part}.{name}"
                for part in _PARTS
                for name in ("dropout_rate", "token_dropout", "token_mask")
            ],
        ],
    ),
    ("a number above 0 and below 1", lambda x: 0 < x < 1, ["data.max_padding"]),
    (
        f"seconds, at least {_LEAST_SECONDS}",
        lambda x: _LEAST_SECONDS <= x < math.inf,
        ["data.max_seconds"],
    ),
)


def check_ranges(values):
    """Raise UserError for a number that is out of its range, or is none.

    Args:
      values: configuration as from ``flatten``; what it lacks, or holds None for, is not looked at.
    """
    for expected, holds, names in _RANGES:
        for name in names:
            value = values.get(name)
            if value is not None and not (of_type(value, float) and holds(value)):
                raise UserError(f"{name}={value!r}: {expected} is expected")


def of_type(value, kind):
    """Whether a plain value is of the type that a field is annotated with; a whole number is a float too.

    >>> of_type(3, float), of_type([1.5, 2], tuple[float, ...]), of_type(None, int), of_type(True, int | None)
    (True, True, False, False)
    """
    if isinstance(kind, types.UnionType):
        return any(of_type(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(
            of_type(entry, typing.get_args(kind)[0]) for entry in value
        )
    if typing.get_origin(kind) is not None:
        return isinstance(value, typing.get_origin(kind))
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, int | float if kind is float else kind)


def flatten(values, prefix=""):
    """Nested dicts of plain values as one, with dotted keys.

    >>> flatten({"steps": 3, "data": {"bucket_seconds": (1.0,)}})
    {'steps': 3, 'data.bucket_seconds': [1.0]}
    """
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
