"""From a configuration to the typed, checked pieces of an experiment. Nothing below this file sees a ConfigDict."""

import dataclasses
import json
from dataclasses import dataclass

import ml_collections
import numpy as np

from c2f_jax.config.fields import check_ranges, flatten, of_type
from c2f_jax.data.augment import AugmentConfig
from c2f_jax.data.feature_cache import open_features
from c2f_jax.data.images import RESIZE
from c2f_jax.data.source import SAMPLE_RATE
from c2f_jax.datasets.config import DataConfig
from c2f_jax.errors import UserError
from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.factory import create_model
from c2f_jax.objectives import ID_POLICIES
from c2f_jax.pretrained.networks import bare_tower
from c2f_jax.pretrained.weights import open_card
from c2f_jax.retrieval.evaluation import SCORES, EvalConfig
from c2f_jax.training.method import NEGATIVE_POOLS, MethodConfig
from c2f_jax.training.optimizer import OptimizerConfig
from c2f_jax.training.parallel import MODES


@dataclass(frozen=True)
class Experiment:
    """A checked experiment.

    Attributes:
      seed: of initialisation, data order and every draw.
      batch_size: global batch N, over all devices of all processes.
      steps: optimiser steps.
      log_every, eval_every, checkpoint_every: cadences in steps; 0 for only at the end.
      queue_size: K of the embedding queue.
      token_queue_size: slots of the token queue for ``queue`` negatives.
      parallel: "pmap" or "shard_map".
      init_from: workdir of another run; training starts from the parameters of its best checkpoint (fine-tuning).
      data, eval, method, optimizer, model: see their classes.
      weights: "speech", "image" -> converted or published weights of its network.
    """

    seed: int
    batch_size: int
    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    queue_size: int
    token_queue_size: int
    parallel: str
    data: DataConfig
    eval: EvalConfig
    method: MethodConfig
    optimizer: OptimizerConfig
    model: C2FModel
    weights: dict[str, str]
    init_from: str | None = None

    def data_of(self, name):
        """The DataConfig for a data set of that name; the feature caches of a network are of the run's own data."""
        if name == self.data.name:
            return self.data
        encoders = {
            "speech_features": self.model.speech_encoder,
            "image_features": self.model.image_encoder,
        }
        own = {
            part: None
            for part, encoder in encoders.items()
            if getattr(encoder, "tower", None) is not None
        }
        if "speech_features" in own:
            own["speech_copies"] = 0
        return dataclasses.replace(self.data, name=name, **own)


def create_experiment(config: ml_collections.ConfigDict) -> Experiment:
    """Check a configuration and build its pieces.

    Raises:
      UserError: naming the value, what is expected and how to mend it.
    """
    plain = json.loads(config.to_json())
    check_ranges(flatten(plain))
    model = plain.pop("model", None)
    method, data = plain.pop("method", {}), plain.pop("data", {})
    for name, section in (("model", model), ("method", method), ("data", data)):
        if not isinstance(section, dict):
            raise UserError(f"the configuration has no section `{name}`: see c2f_jax/config.py")
    model, weights, preprocessing = _with_weights(model)
    data |= preprocessing
    data["augment"] = _build(AugmentConfig, "data.augment", data.pop("augment", {}))
    data["augment"].check()
    parts = {
        "data": _build(DataConfig, "data", data),
        "eval": _build(EvalConfig, "eval", plain.pop("eval", {})),
        "method": _build(MethodConfig, "method", method),
        "optimizer": _build(OptimizerConfig, "optimizer", plain.pop("optimizer", {})),
        "model": _model(model),
        "weights": weights,
    }
    experiment = _build(Experiment, "the configuration", plain | parts)
    for name, choices in (("id_policy", ID_POLICIES), ("negatives", NEGATIVE_POOLS)):
        value = getattr(experiment.method, name)
        if value not in choices:
            raise UserError(f"method.{name}={value!r}: choose one of {', '.join(choices)}")
    if experiment.parallel not in MODES:
        raise UserError(f"parallel={experiment.parallel!r}: choose one of {', '.join(MODES)}")
    if experiment.eval.score not in SCORES:
        raise UserError(f"eval.score={experiment.eval.score!r}: choose one of {', '.join(SCORES)}")
    if experiment.data.image_resize not in RESIZE:
        raise UserError(
            f"data.image_resize={experiment.data.image_resize!r}: choose one of {', '.join(RESIZE)}"
        )
    if experiment.data.image_features is None:
        _check_image_grid(model["image"], experiment.data.image_size)
    _check_features(experiment)
    experiment.method.check(experiment.queue_size, experiment.token_queue_size)
    return experiment


def example_batch(data: DataConfig, raw=()):
    """One row of zeros in the longest training shape, to initialise a model with.

    Args:
      data: DataConfig.
      raw: "speech", "image": parts that are given as waveform or pixels even where there is a feature cache.
    """
    samples, side = round(max(data.bucket_seconds) * SAMPLE_RATE), data.image_size
    batch = {"image": np.zeros((1, side, side, 3), np.uint8)}
    if data.image_features is not None and "image" not in raw:
        features = open_features(data.image_features)
        batch = {"image_tokens": np.zeros((1, features.most_tokens, *features.shape), np.float16)}
    if data.speech_features is None or "speech" in raw:
        batch["waveform"] = speech = np.zeros((1, samples), np.float32)
    else:
        features = open_features(data.speech_features)
        shape = (1, features.tokens_of_samples(samples), *features.shape)
        batch["speech_tokens"] = speech = np.zeros(shape, np.float16)
    return batch | {"speech_lengths": np.full((1,), speech.shape[1], np.int32)}


def _model(values):
    values = dict(values)
    parts = [values.pop(name, {}) for name in ("speech", "image", "multimodal")]
    known = {"embedding_dim", "branches", "initial_tau", "dtype", "attention", "remat"}
    if set(values) - known:
        raise UserError(
            f"model has no {', '.join(sorted(set(values) - known))}: its values are {', '.join(sorted(known))}"
        )
    return create_model(*parts, **values)


def _with_weights(model):
    """The model's values with the networks of its weights' cards, the weights, and the images' preprocessing."""
    model, weights, preprocessing = dict(model), {}, {}
    for part in ("speech", "image"):
        values = dict(model.get(part, {}))
        path = values.pop("weights", None)
        if values.get("name") == "published":
            frozen = values.get("frozen", "tower") != "none"
            if path is None and frozen:
                raise UserError(
                    f"model.{part}.weights is needed: a folder of `c2f convert` or the published files; a frozen "
                    f"network with random parameters says nothing (model.{part}.frozen=none trains it from the start)"
                )
            if path is not None:
                card = open_card(path)
                values["tower"] = bare_tower(card) | dict(values.get("tower") or {})
                weights[part] = path
                if part == "image":
                    how = card["preprocessing"]
                    preprocessing = {
                        "image_size": how["image_size"],
                        "image_resize": how["resize"],
                        "image_resize_side": how["resize_side"],
                    }
        elif path is not None:
            raise UserError(f"model.{part}.weights goes with model.{part}.name='published'")
        model[part] = values
    return model, weights, preprocessing


def _check_features(experiment):
    """A cache belongs to a frozen network; an encoder without a network needs one."""
    for part in ("speech", "image"):
        encoder, path = (
            getattr(experiment.model, f"{part}_encoder"),
            getattr(experiment.data, f"{part}_features"),
        )
        published = hasattr(encoder, "tower")
        if path is None and published and encoder.tower is None:
            raise UserError(
                f"model.{part}.name='tokens' reads a feature cache: give data.{part}_features"
            )
        if path is not None and not published:
            raise UserError(f"data.{part}_features needs model.{part}.name 'published' or 'tokens'")
        if path is not None and encoder.tower is not None and path.endswith(".npz"):
            raise UserError(
                f"data.{part}_features={path} holds tokens of another tool: model.{part}.name='tokens' reads them, "
                "without weights; the cache of a network is a folder"
            )
        if path is not None and encoder.tower is not None and encoder.frozen != "tower":
            raise UserError(
                f"data.{part}_features needs a frozen network: set model.{part}.frozen='tower'"
            )
    data = experiment.data
    if data.image_features is not None and data.augment.varies_images:
        raise UserError(
            "data.augment cannot vary pictures that data.image_features keeps encoded: leave one out"
        )
    if data.speech_copies and not (
        data.speech_features and data.augment.varies_speech and "speech" in experiment.weights
    ):
        raise UserError(
            f"data.speech_copies={data.speech_copies}: varied recordings that a frozen network has run on need "
            "data.speech_features, model.speech.weights, and something of recordings in data.augment, such as speed"
        )
    if data.speech_features is not None and data.augment.varies_speech and not data.speech_copies:
        raise UserError(
            "data.augment cannot vary recordings that data.speech_features keeps encoded: leave one out, or set "
            "data.speech_copies"
        )


def _check_image_grid(image, size):
    """Sizes that the light ViT would otherwise take and silently lose a part of the picture with."""
    patch, pool = image.get("patch", 1), image.get("token_pool", 1)
    if size % patch:
        raise UserError(f"data.image_size={size} is not a multiple of model.image.patch={patch}")
    if image.get("conv_stem") and patch & (patch - 1):
        raise UserError(f"model.image.patch={patch} is not a power of two, which conv_stem needs")
    if (size // patch) % pool:
        raise UserError(
            f"{size // patch} patches a side do not divide into model.image.token_pool={pool}"
        )


def _build(cls, where, values):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise UserError(
            f"{where} is {values!r}: a section with the values {', '.join(fields)} is expected"
        )
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{where} has no {', '.join(unknown)}: its values are {', '.join(fields)}")
    missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: see c2f_jax/config.py")
    for name, value in values.items():
        kind = fields[name].type
        if not of_type(value, kind):
            kind = kind.__name__ if type(kind) is type else kind
            raise UserError(f"{where}: {name}={value!r} is not of the type {kind}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
