"""Turn a configuration into the typed, checked pieces of an experiment.

No function of the rooms below takes a ConfigDict; they take what is built here.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from c2f_jax.config import consistency, fields
from c2f_jax.config.options import ENCODERS, RunOptions, sections
from c2f_jax.data.augment import AugmentConfig
from c2f_jax.data.feature_cache import open_features
from c2f_jax.datasets.config import DataConfig
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError
from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.factory import create_model
from c2f_jax.pretrained.networks import bare_tower
from c2f_jax.pretrained.weights import open_card
from c2f_jax.retrieval.evaluation import EvalConfig
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class Experiment(RunOptions):
    """A checked experiment: the options of the run, and what the other options describe.

    Attributes:
      data: what to read.
      eval: how to evaluate.
      method: what to train.
      optimizer: how to train.
      model: the model, without parameters.
      weights: "speech", "image" -> the published weights of its network.
    """

    data: DataConfig
    eval: EvalConfig
    method: MethodConfig
    optimizer: OptimizerConfig
    model: C2FModel
    weights: dict[str, str]

    def data_of(self, name: str) -> DataConfig:
        """Return the options for reading another data set, without this run's caches."""
        if name == self.data.name:
            return self.data
        changes: dict[str, Any] = {}
        for part in filter(self.can_encode, ("speech", "image")):
            changes[f"{part}_features"] = None
        if "speech_features" in changes:
            changes["speech_copies"] = 0
        return dataclasses.replace(self.data, name=name, **changes)

    def can_encode(self, kind: str) -> bool:
        """Return whether the model encodes any item, and not only tokens of another tool.

        Args:
          kind: "speech" or "image".
        """
        encoder = getattr(self.model, f"{kind}_encoder")
        return getattr(encoder, "tower", encoder) is not None


def create_experiment(
    config: ConfigDict, card_of: Callable[[str], Mapping[str, Any]] = open_card
) -> Experiment:
    """Check a configuration and build its pieces.

    Args:
      config: configuration.
      card_of: function that returns the card of published weights.

    Raises:
      UserError: if an option is unknown, has another type, is out of range or contradicts another.
    """
    plain = json.loads(config.to_json())
    _check_options(plain)
    model, weights, preprocessing = _with_weights(plain.pop("model"), card_of)
    data = plain.pop("data") | preprocessing
    data["augment"] = fields.build(AugmentConfig, data.get("augment", {}))
    encoders = [model.pop(part, {}) for part in ("speech", "image", "multimodal")]
    experiment = Experiment(
        data=fields.build(DataConfig, data),
        eval=fields.build(EvalConfig, plain.pop("eval", {})),
        method=fields.build(MethodConfig, plain.pop("method", {})),
        optimizer=fields.build(OptimizerConfig, plain.pop("optimizer", {})),
        model=create_model(*encoders, **model),
        weights=weights,
        **plain,
    )

    # Options that must agree with each other.
    experiment.data.augment.check()
    if experiment.data.image_features is None:
        consistency.check_image_grid(experiment.model.image_encoder, experiment.data.image_size)
    consistency.check_features(experiment.model, experiment.data, weights)
    experiment.method.check(
        experiment.batch_size, experiment.queue_size, experiment.token_queue_size
    )
    return experiment


def example_batch(data: DataConfig, raw: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Return one row of zeros in the longest training shape, to initialize a model with.

    Args:
      data: options for reading.
      raw: "speech", "image": parts to give as waveform or pixels even if there is a feature cache.
    """
    samples, side = round(max(data.bucket_seconds) * SAMPLE_RATE), data.image_size
    batch: dict[str, np.ndarray] = {"image": np.zeros((1, side, side, 3), np.uint8)}
    if data.image_features is not None and "image" not in raw:
        features = open_features(data.image_features)
        batch = {"image_tokens": np.zeros((1, features.most_tokens, *features.shape), np.float16)}

    if data.speech_features is None or "speech" in raw:
        batch["waveform"] = speech = np.zeros((1, samples), np.float32)
    else:
        features = open_features(data.speech_features)
        shape = (1, features.tokens_of_samples(samples), *features.shape)
        batch["speech_tokens"] = speech = np.zeros(shape, np.float16)
    batch["speech_lengths"] = np.full((1,), speech.shape[1], np.int32)
    return batch


def _check_options(plain: Mapping[str, Any]) -> None:
    """Check the names, types and ranges of all options of a configuration."""
    encoders = {part: _section(plain, f"model.{part}").get("name", "") for part in ENCODERS}
    options = sections(encoders)
    for where, known in options.items():
        values = dict(_section(plain, where))
        for name in list(values):
            # Sections have their own turn; a network is checked when it is built.
            if fields.dotted(where, name) in options or name == "tower":
                del values[name]
        fields.check_values(where, known, values)


def _section(plain: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the values of a section, "" being the whole configuration.

    Raises:
      UserError: if it is not a section.
    """
    values, path = plain, ""
    for name in where.split(".") if where else ():
        values, path = values.get(name, {}), fields.dotted(path, name)
        if not isinstance(values, Mapping):
            raise UserError(f"{path}={values!r}: must be a section")
    return values


def _with_weights(
    model: Mapping[str, Any], card_of: Callable[[str], Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Look up the networks of published weights.

    Returns:
      The values of ``model`` with the networks that the weights' cards describe, the weights of
      each part, and the image preprocessing that the weights need, as values of ``data``.

    Raises:
      UserError: if weights are missing, or given for an encoder that takes none.
    """
    model, weights, preprocessing = dict(model), {}, {}
    for part in ENCODERS:
        values = dict(model.get(part, {}))
        path = values.pop("weights", None)
        model[part] = values
        if values.get("name") != "published":
            if path is not None:
                raise UserError(f"model.{part}.weights needs model.{part}.name='published'")
            continue
        if path is None:
            if values.get("frozen", "tower") != "none":
                raise UserError(
                    f"model.{part}.weights is not set: give a folder of `c2f convert` or the "
                    f"published files, or train the network from scratch with "
                    f"model.{part}.frozen=none"
                )
            continue

        card = card_of(path)
        values["tower"] = bare_tower(card) | dict(values.get("tower") or {})
        weights[part] = path
        if part == "image":
            how = card["preprocessing"]
            preprocessing = {
                "image_size": how["image_size"],
                "image_resize": how["resize"],
                "image_resize_side": how["resize_side"],
            }
    return model, weights, preprocessing
