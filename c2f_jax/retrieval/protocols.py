"""The evaluation protocols of the field: what is ranked against what, so that numbers compare."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from c2f_jax.data.files import Stamp, content_hash
from c2f_jax.data.source import PairSource, Recording
from c2f_jax.errors import UserError
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.retrieval.result import EvaluationResult, ProtocolReport


@dataclass(frozen=True)
class Protocol:
    """One way of measuring retrieval.

    Attributes:
      name: name on the command line and in results.
      about: description for people.
      data_set: data set that it is defined on.
      splits: names of its split; the first that the data set has is used.
      images: published number of images; None if any number will do.
      recordings: published number of recordings; None if any number will do.
      folds: equal parts of the gallery, in its order, each ranked alone; the results are averaged.
      one_recording: only the first recording of each image is used.
      all_images: the images of the other splits join the gallery.
    """

    name: str
    about: str
    data_set: str
    splits: tuple[str, ...]
    images: int | None = None
    recordings: int | None = None
    folds: int = 1
    one_recording: bool = False
    all_images: bool = False


_ALL = (
    Protocol(
        name="flickr8k_1k",
        about="Flickr8k Audio, official test split: 1,000 images, 5,000 recordings",
        data_set="flickr8k_audio",
        splits=("test",),
        images=1000,
        recordings=5000,
    ),
    Protocol(
        name="spoken_coco_5k",
        about="SpokenCOCO, Karpathy's test split: 5,000 images, 25,031 recordings",
        data_set="spoken_coco",
        splits=("test",),
        images=5000,
        recordings=25_031,
    ),
    Protocol(
        name="spoken_coco_1k_5fold",
        about="SpokenCOCO, Karpathy's test split in five folds of 1,000 images, averaged",
        data_set="spoken_coco",
        splits=("test",),
        images=5000,
        recordings=25_031,
        folds=5,
    ),
    Protocol(
        name="places_1k",
        about="Places Audio, validation: 1,000 images, one recording each",
        data_set="places_audio",
        splits=("validation", "dev_seen"),
        images=1000,
        recordings=1000,
        one_recording=True,
    ),
    Protocol(
        name="mteb",
        about="as MTEB: ranks the images of all splits; recall is the fraction of correct items",
        data_set="flickr8k_audio",
        splits=("test",),
        images=8091,
        all_images=True,
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def find_protocol(name: str) -> Protocol:
    """Return the protocol of that name.

    Raises:
      UserError: there is none; the message lists all.
    """
    if name not in PROTOCOLS:
        raise UserError(f"no protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def open_protocol(
    protocol: Protocol,
    load: Callable[[str, str], PairSource],
    data: str | None = None,
    split: str | None = None,
) -> PairSource:
    """Open the recordings and the gallery of a protocol.

    Args:
      protocol: the protocol.
      load: opens a split, from the names of data set and split.
      data: data set; None for that of the protocol.
      split: split; None for that of the protocol.

    Returns:
      The split, with the images of the other splits in its gallery if the protocol says so.

    Raises:
      UserError: whatever ``load`` raises for the last split tried.
    """
    source = _first_split(load, data or protocol.data_set, (split,) if split else protocol.splits)
    if not protocol.all_images:
        return source

    # All other splits there are.
    others = []
    for other in ("train", "validation", "test"):
        if other != source.split:
            try:
                others.append(load(data or protocol.data_set, other))
            except UserError:
                continue  # a data set without this split
    return WithMoreImages(source, others)


class WithMoreImages(PairSource):
    """A split whose gallery also has the images of other splits, which match no recording.

    Args:
      source: the split.
      others: splits whose images join the gallery.
    """

    def __init__(self, source: PairSource, others: Sequence[PairSource]) -> None:
        self._source = source
        self._others = others
        self._more = [(other, row) for other in others for row in range(other.num_images)]
        # Identities that no image of the split has.
        first = int(source.image_ids.max(initial=-1)) + 1
        more_ids = np.arange(first, first + len(self._more), dtype=np.int32)
        super().__init__(
            source.name,
            source.split,
            image_index=source.image_index,
            image_ids=np.concatenate([source.image_ids, more_ids]),
            num_samples=source.num_samples,
            bad_items=source.bad_items,
            inputs=source.inputs,
        )

    def _owner(self, row: int) -> tuple[PairSource, int]:
        """Return the split that an image comes from, and its row there."""
        own = self._source.num_images
        return (self._source, int(row)) if row < own else self._more[int(row) - own]

    def recording(self, index: int) -> Recording:
        """Return recording ``index`` of the split itself."""
        return self._source.recording(index)

    def image(self, row: int) -> bytes | str:
        """Return image ``row``: those of the split first, then those of the others."""
        source, own_row = self._owner(row)
        return source.image(own_row)

    def image_id(self, row: int) -> str:
        """Return the identity of image ``row`` in its own split."""
        source, own_row = self._owner(row)
        return source.image_id(own_row)

    def recording_key(self, index: int) -> str:
        """Return the key of recording ``index`` in a feature cache."""
        return self._source.recording_key(index)

    def image_key(self, row: int) -> str:
        """Return the key of image ``row`` in a feature cache of its own split."""
        source, own_row = self._owner(row)
        return source.image_key(own_row)

    def stamp(self, kind: str, index: int) -> Stamp:
        """Return the stamp of an item in its own split."""
        if kind == "speech":
            return self._source.stamp(kind, index)
        source, own_row = self._owner(index)
        return source.stamp(kind, own_row)

    def content(self) -> str:
        """Hash the content of all splits that images come from."""
        texts = [source.content() for source in (self._source, *self._others)]
        return content_hash("\n".join(texts).encode())


def evaluate_protocol(
    protocol: Protocol,
    encoded: EncodedSplit,
    evaluate: Callable[[EncodedSplit], EvaluationResult],
) -> tuple[EvaluationResult, EncodedSplit]:
    """Evaluate an encoded split as a protocol says.

    Args:
      protocol: the protocol.
      encoded: the split of ``open_protocol``, encoded.
      evaluate: evaluates an encoded split, see ``evaluation.evaluate_retrieval``.

    Returns:
      The result, with ``protocol`` filled in, and the encoded split that its lists are of. With
      several folds the numbers are means over the folds; lists and split are those of the first.

    Raises:
      UserError: there are fewer images than folds.
    """
    of_images, of_recordings = len(encoded.images), len(encoded.recordings)
    if of_images < protocol.folds:
        raise UserError(
            f"{protocol.name} cuts {protocol.folds} folds, but there are {of_images} images"
        )

    # The part of the split that the protocol is defined on.
    if protocol.one_recording:
        first = np.sort(np.unique(encoded.speech_ids, return_index=True)[1])
        encoded = encoded.select_recordings(first)
    if protocol.images is not None and not protocol.all_images and of_images > protocol.images:
        encoded = encoded.select_images(np.arange(protocol.images))

    # Consecutive folds, as the field cuts them.
    folds = [encoded]
    if protocol.folds > 1:
        parts = np.array_split(np.arange(len(encoded.images)), protocol.folds)
        folds = [encoded.select_images(rows) for rows in parts]
    results = [evaluate(fold) for fold in folds]
    if len(folds) > 1:  # bins of several folds have no mean
        results = [dataclasses.replace(r, calibrations=None, reliability=None) for r in results]

    # Numbers compare only if exactly the published items were used.
    images = sum(len(fold.images) for fold in folds)
    recordings = sum(len(fold.recordings) for fold in folds)
    report = ProtocolReport(
        name=protocol.name,
        about=protocol.about,
        folds=protocol.folds,
        images=images,
        recordings=recordings,
        of_images=of_images,
        of_recordings=of_recordings,
        as_published=protocol.images in (None, images)
        and protocol.recordings in (None, recordings),
    )

    mean = EvaluationResult.from_json(mean_of_folds([result.to_json() for result in results]))
    return dataclasses.replace(mean, protocol=report, lists=results[0].lists), folds[0]


def mean_of_folds(results: Sequence[Any]) -> Any:
    """Average the numbers of several results; anything else is taken from the first.

    Folds share no image, so the half-widths of their intervals add in quadrature: that of the mean
    of F folds is sqrt(sum of squares) / F.

    Args:
      results: results of equal structure, as ``EvaluationResult.to_json`` gives them, or a part of
        them.

    Returns:
      One result of the same structure.

    >>> mean_of_folds([{"R@1": 10.0, "k": 3}, {"R@1": 20.0, "k": 3}])
    {'R@1': 15.0, 'k': 3}
    """
    first = results[0]
    if len(results) == 1:
        return first
    if isinstance(first, dict):
        return _mean_of_dicts(results)
    if isinstance(first, float):
        return float(np.mean(results))
    return round(float(np.mean(results)))


def _mean_of_dicts(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, value in results[0].items():
        values = [result[key] for result in results]
        if key.endswith("_interval"):
            centers = np.array([result[key.removesuffix("_interval")] for result in results])
            squares = (np.array(values) - centers[:, None]) ** 2
            # Half-widths below and above the value, each in quadrature.
            low, high = np.sqrt(np.sum(squares, axis=0)) / len(results)
            merged[key] = [float(centers.mean() - low), float(centers.mean() + high)]
        elif isinstance(value, dict | float | int):
            merged[key] = mean_of_folds(values)
        else:
            merged[key] = value
    return merged


def _first_split(
    load: Callable[[str, str], PairSource], name: str, splits: Sequence[str]
) -> PairSource:
    """Open the first of several splits that the data set has."""
    for split in splits[:-1]:
        try:
            return load(name, split)
        except UserError:
            continue
    return load(name, splits[-1])
