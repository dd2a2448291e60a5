"""The feature caches that a configuration names."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from c2f_jax.config.experiment import Experiment
from c2f_jax.data.feature_cache import has_card
from c2f_jax.models.factory import create_tower, option_fields
from c2f_jax.pretrained.extract_features import (
    FeatureOptions,
    VariedCopy,
    cache_card,
    extract_features,
)
from c2f_jax.pretrained.networks import bare_tower
from c2f_jax.pretrained.weights import open_card


@dataclass(frozen=True)
class NetworkCache:
    """A feature cache of a network in a configuration.

    Attributes:
      part: "speech" or "image".
      weights: weights of the network.
      path: path of the cache.
      options: which tokens the cache holds.
    """

    part: str
    weights: str
    path: str
    options: FeatureOptions


def prepare_features(experiment: Experiment, splits: Sequence[str]) -> None:
    """Make or finish the caches that a configuration names and whose network it has.

    Raises:
      UserError: an existing cache is of other weights, another layer or preprocessing.
    """
    for cache in network_caches(experiment):
        sources = [experiment.data.load(split, features=False) for split in splits]
        extract_features(cache.weights, sources, cache.path, cache.options)
        if cache.part != "speech":
            continue

        train = [source for source in sources if source.split == experiment.data.train_split]
        for number, path in enumerate(experiment.data.copy_caches(), start=1):
            varied = VariedCopy(experiment.data.augment, number)
            options = dataclasses.replace(cache.options, varied=varied)
            extract_features(cache.weights, train, path, options)


def check_features(experiment: Experiment) -> None:
    """Compare the existing caches with the networks of a configuration.

    Raises:
      UserError: as ``prepare_features``.
    """
    for cache in network_caches(experiment):
        has_card(cache.path, cache_card(open_card(cache.weights), cache.options))


def network_caches(experiment: Experiment) -> Iterator[NetworkCache]:
    """Yield the caches whose network the configuration has."""
    data = experiment.data
    for part, path in (("speech", data.speech_features), ("image", data.image_features)):
        if path is None or part not in experiment.weights:
            continue
        encoder = getattr(experiment.model, f"{part}_encoder")
        weights = experiment.weights[part]
        published = create_tower(bare_tower(open_card(weights)))
        options = FeatureOptions(
            layer="all" if encoder.layer == "weighted_sum" else encoder.layer,
            tower=_changes(encoder.tower, published),
        )
        if part == "speech":
            options = dataclasses.replace(options, max_seconds=data.max_seconds)
        yield NetworkCache(part, weights, path, options)


def _changes(tower: nn.Module, published: nn.Module) -> dict[str, Any]:
    """Return the attributes that a configuration changes in a published network."""
    changes = {}
    for name in sorted(option.name for option in option_fields(type(tower))):
        value = getattr(tower, name)
        if name != "vision" and value != getattr(published, name):
            changes[name] = list(value) if isinstance(value, tuple) else value
    return changes
