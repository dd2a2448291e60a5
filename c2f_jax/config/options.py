"""All options: each is a dataclass field of what it configures."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from c2f_jax.config import fields
from c2f_jax.data.augment import AugmentConfig
from c2f_jax.datasets.config import DataConfig
from c2f_jax.errors import UserError
from c2f_jax.models.factory import (
    IMAGE_ENCODERS,
    SPEECH_ENCODERS,
    ModelOptions,
    option_fields,
)
from c2f_jax.models.multimodal import MultimodalEncoder
from c2f_jax.retrieval.evaluation import EvalConfig
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.optimizer import OptimizerConfig
from c2f_jax.training.parallel import MODES


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options at the top of a configuration.

    Attributes:
      seed: seed of initialization, data order and all other draws.
      batch_size: global batch N, over all devices of all processes.
      steps: optimizer steps.
      log_every: steps between logs.
      eval_every: steps between evaluations of the validation split; 0 for only at the end.
      checkpoint_every: steps between checkpoints; 0 for only at the end.
      max_skipped_steps: steps in a row whose loss or gradients are not finite, after which the run
        stops; such steps change nothing.
      queue_size: K, the length of the embedding queue.
      token_queue_size: length of the token queue, for ``method.negatives="queue"``.
      parallel: how devices share a batch, "pmap" or "shard_map".
      init_from: workdir of another run, whose best checkpoint training starts from (fine-tuning).
    """

    seed: int = field(default=0, metadata={"min": 0})
    batch_size: int = field(default=96, metadata={"min": 1})
    steps: int = field(default=1000, metadata={"min": 1})
    log_every: int = field(default=20, metadata={"min": 1})
    eval_every: int = field(default=250, metadata={"min": 0})
    checkpoint_every: int = field(default=250, metadata={"min": 0})
    max_skipped_steps: int = field(default=10, metadata={"min": 1})
    queue_size: int = field(default=1024, metadata={"min": 0})
    token_queue_size: int = field(default=0, metadata={"min": 0})
    parallel: str = field(default="pmap", metadata={"choices": MODES})
    init_from: str | None = None


@dataclass(frozen=True)
class EncoderOptions:
    """What the section of an encoder has besides the fields of the encoder.

    Attributes:
      name: which encoder.
      weights: folder of ``c2f convert`` or published files, for name="published".
    """

    name: str
    weights: str | None = None


SECTIONS = {
    "": RunOptions,
    "data": DataConfig,
    "data.augment": AugmentConfig,
    "eval": EvalConfig,
    "method": MethodConfig,
    "optimizer": OptimizerConfig,
    "model": ModelOptions,
}
ENCODERS = {"speech": SPEECH_ENCODERS, "image": IMAGE_ENCODERS}


def sections(encoders: Mapping[str, str]) -> dict[str, dict[str, dataclasses.Field]]:
    """Return the options of each section.

    Args:
      encoders: names of the "speech" and the "image" encoder.

    Raises:
      UserError: if there is no such encoder.
    """
    found = {name: fields.options_of(cls) for name, cls in SECTIONS.items()}
    del found["data"]["augment"]  # a section
    for part, choices in ENCODERS.items():
        name = encoders.get(part)
        if name not in choices:
            raise UserError(f"model.{part}.name={name!r}: choose one of {', '.join(choices)}")
        own = {option.name: option for option in option_fields(choices[name])}
        own.pop("tower", None)  # the network, whose options depend on the weights
        found[f"model.{part}"] = fields.options_of(EncoderOptions) | own
    found["model.multimodal"] = {option.name: option for option in option_fields(MultimodalEncoder)}
    return found
