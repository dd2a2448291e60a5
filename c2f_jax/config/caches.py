"""The feature caches that a configuration names."""

import dataclasses

from c2f_jax.data.feature_cache import has_card
from c2f_jax.models.factory import create_tower
from c2f_jax.pretrained.extract_features import cache_card, extract_features
from c2f_jax.pretrained.weights import bare_tower, open_card


def prepare_features(experiment, splits):
    """Make the caches that a configuration names and whose network it has, where they are not finished.

    Raises:
      UserError: the cache that is there is of other weights, another layer or preprocessing.
    """
    for part, weights, path, options in _caches(experiment):
        sources = [experiment.data.load(split, features=False) for split in splits]
        extract_features(weights, sources, path, **options)
        if part == "speech":
            train = [source for source in sources if source.split == experiment.data.train_split]
            for copy, copy_path in enumerate(experiment.data.copy_caches(), start=1):
                varied = {"augment": experiment.data.augment, "copy": copy}
                extract_features(weights, train, copy_path, **varied, **options)


def check_features(experiment):
    """Compare the caches that are there with the networks of a configuration.

    Raises:
      UserError: as ``prepare_features``.
    """
    for _, weights, path, options in _caches(experiment):
        options = {"max_seconds": None} | options
        layer, max_seconds, card = (
            options.pop("layer"),
            options.pop("max_seconds"),
            open_card(weights),
        )
        has_card(path, cache_card(card, bare_tower(card) | options, layer, max_seconds))


def _caches(experiment):
    """(part, weights, cache, options of ``extract_features``) of each cache whose network the configuration has."""
    data = experiment.data
    for part, path in (("speech", data.speech_features), ("image", data.image_features)):
        encoder = getattr(experiment.model, f"{part}_encoder")
        if path is None or part not in experiment.weights:
            continue
        options = {"layer": "all" if encoder.layer == "weighted_sum" else encoder.layer}
        options |= {} if part == "image" else {"max_seconds": data.max_seconds}
        weights = experiment.weights[part]
        yield (
            part,
            weights,
            path,
            options | _changes(encoder.tower, create_tower(bare_tower(open_card(weights)))),
        )


def _changes(tower, published):
    """The attributes that a configuration gives to a network in place of the published ones, as a dict."""
    names = {f.name for f in dataclasses.fields(tower)} - {
        "parent",
        "name",
        "dtype",
        "attention",
        "remat",
        "vision",
    }
    values = {name: getattr(tower, name) for name in sorted(names)}
    values = {name: value for name, value in values.items() if value != getattr(published, name)}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }
