"""The evaluation protocols of the field by name: what is ranked against what, and what makes numbers comparable."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from c2f_jax.data.source import PairSource, Recording
from c2f_jax.errors import UserError
from c2f_jax.retrieval.evaluation import DIRECTIONS, NAMES


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way of measuring retrieval.

    Attributes:
      name: by which it is called for.
      about: what it is.
      data_set: that it is defined on; another may be given, and is then said to be another.
      splits: the first of them that the data set has is taken.
      pictures, recordings: their published numbers; None where any number will do.
      folds: equal parts of the gallery, in its order, each ranked alone; the results are averaged.
      one_recording: only the first recording of each picture is used.
      all_pictures: the pictures of the other splits join the gallery.
    """

    name: str
    about: str
    data_set: str
    splits: tuple[str, ...]
    pictures: int | None = None
    recordings: int | None = None
    folds: int = 1
    one_recording: bool = False
    all_pictures: bool = False


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "flickr8k_1k",
            "Flickr8k Audio, official test split: 1,000 pictures, 5,000 recordings",
            "flickr8k_audio",
            ("test",),
            1000,
            5000,
        ),
        Protocol(
            "spoken_coco_5k",
            "SpokenCOCO, Karpathy's test split: 5,000 pictures, 25,031 recordings",
            "spoken_coco",
            ("test",),
            5000,
            25_031,
        ),
        Protocol(
            "spoken_coco_1k_5fold",
            "SpokenCOCO, Karpathy's test split in five folds of 1,000 pictures, averaged",
            "spoken_coco",
            ("test",),
            5000,
            25_031,
            folds=5,
        ),
        Protocol(
            "places_1k",
            "Places Audio, validation: 1,000 pictures, one recording each",
            "places_audio",
            ("validation", "dev_seen"),
            1000,
            1000,
            one_recording=True,
        ),
        Protocol(
            "mteb",
            "as MTEB: the pictures of all splits are ranked, recall is the fraction of right items found",
            "flickr8k_audio",
            ("test",),
            8091,
            all_pictures=True,
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; `UserError` listing all when there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"no protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def open_protocol(
    protocol: Protocol,
    load: Callable[[str, str], PairSource],
    data: str | None = None,
    split: str | None = None,
) -> PairSource:
    """The recordings and the gallery of a protocol; load(data set, split) opens a split.

    data and split take the place of the protocol's own. Raises what load raises for the last split tried.
    """
    name = data or protocol.data_set
    splits = (split,) if split else protocol.splits
    for candidate in splits:
        try:
            source = load(name, candidate)
            break
        except UserError:
            if candidate == splits[-1]:
                raise
    if not protocol.all_pictures:
        return source
    others = []
    for other in ("train", "validation", "test"):
        if other != source.split:
            try:
                others.append(load(name, other))
            except UserError:  # a data set without this split ranks the pictures that it has
                continue
    return WithMorePictures(source, others)


class WithMorePictures(PairSource):
    """A split whose gallery also holds the pictures of other splits, which are right for none of its recordings."""

    def __init__(self, source: PairSource, others: Sequence[PairSource]):
        self._source = source
        self._more = [(other, row) for other in others for row in range(other.num_images)]
        first = int(source.image_ids.max(initial=-1)) + 1
        super().__init__(
            source.name,
            source.split,
            image_index=source.image_index,
            image_ids=np.concatenate(
                [source.image_ids, np.arange(first, first + len(self._more), dtype=np.int32)]
            ),
            num_samples=source.num_samples,
            bad_items=source.bad_items,
            inputs=source.inputs,
        )

    def _owner(self, row: int) -> tuple[PairSource, int]:
        own = self._source.num_images
        return (self._source, int(row)) if row < own else self._more[int(row) - own]

    def recording(self, index: int) -> Recording:
        """Recording `index` of the split itself."""
        return self._source.recording(index)

    def image(self, row: int) -> bytes | str:
        """Picture `row`: those of the split, then those of the others."""
        source, own_row = self._owner(row)
        return source.image(own_row)

    def image_id(self, row: int) -> str:
        """The identity of picture `row` in its own split."""
        source, own_row = self._owner(row)
        return source.image_id(own_row)

    def recording_key(self, index: int) -> str:
        """What a feature cache calls recording `index`."""
        return self._source.recording_key(index)

    def image_key(self, row: int) -> str:
        """What a feature cache calls picture `row`, in its own split."""
        source, own_row = self._owner(row)
        return source.image_key(own_row)


def rank(protocol: Protocol, encoded, retrieve: Callable):
    """Ranks an encoded split (`c2f_jax.trained.EncodedSplit`) as the protocol says.

    retrieve(encoded) -> (result, lists). Returns (result, lists, encoded): the result has "protocol" beside what
    `evaluate_retrieval` gives; of several folds the numbers are means, the lists and the split those of the first.
    """
    pictures, recordings = len(encoded.images), len(encoded.recordings)
    if protocol.one_recording:
        encoded = _first_recordings(encoded)
    if protocol.pictures is not None and not protocol.all_pictures and pictures > protocol.pictures:
        encoded = part_of(encoded, np.arange(protocol.pictures))
    if pictures < protocol.folds:
        raise UserError(
            f"{protocol.name} cuts {protocol.folds} folds, but there are {pictures} pictures"
        )
    folds = [encoded] if protocol.folds == 1 else [
        part_of(encoded, rows) for rows in np.array_split(np.arange(len(encoded.images)), protocol.folds)
    ]  # fmt: skip
    ranked = [retrieve(fold) for fold in folds]
    result = mean_of_folds([result for result, _ in ranked])
    used_pictures, used = (
        sum(len(getattr(fold, name)) for fold in folds) for name in ("images", "recordings")
    )
    result["protocol"] = {
        "name": protocol.name,
        "about": protocol.about,
        "folds": protocol.folds,
        "pictures": used_pictures,
        "recordings": used,
        "of": {"pictures": pictures, "recordings": recordings},
        "as_published": used_pictures == (protocol.pictures or used_pictures)
        and used == (protocol.recordings or used),
    }
    return result, ranked[0][1], folds[0]


def part_of(encoded, rows: np.ndarray):
    """The pictures at `rows` of an encoded split with those recordings that belong to them."""
    kept = np.flatnonzero(np.isin(encoded.speech_ids, encoded.image_ids[rows]))
    return dataclasses.replace(
        encoded,
        image=jax.tree.map(lambda x: x[rows], encoded.image),
        images=encoded.images[rows],
        image_ids=encoded.image_ids[rows],
        **_recordings(encoded, kept),
    )


def _first_recordings(encoded):
    first = np.sort(np.unique(encoded.speech_ids, return_index=True)[1])
    return dataclasses.replace(encoded, **_recordings(encoded, first))


def _recordings(encoded, rows):
    return {
        "speech": jax.tree.map(lambda x: x[rows], encoded.speech),
        "recordings": encoded.recordings[rows],
        "speech_ids": encoded.speech_ids[rows],
    }


def mean_of_folds(results: Sequence):
    """The mean of the numbers of several results; what is not a number is that of the first.

    Folds share no picture, so the half-widths of their intervals add in quadrature: that of the mean of F folds is
    sqrt(sum of squares) / F.
    """
    first = results[0]
    if len(results) == 1:
        return first
    if isinstance(first, dict):
        merged = {}
        for key, value in first.items():
            values = [result[key] for result in results]
            if key.endswith("_interval"):
                centres = np.array([result[key.removesuffix("_interval")] for result in results])
                widths = np.sqrt(np.sum((np.array(values) - centres[:, None]) ** 2, axis=0)) / len(
                    results
                )
                merged[key] = [float(centres.mean() - widths[0]), float(centres.mean() + widths[1])]
            else:
                merged[key] = (
                    mean_of_folds(values) if isinstance(value, dict | float | int) else value
                )
        return merged
    if isinstance(first, float):
        return float(np.mean(results))
    return round(float(np.mean(results)))


def format_protocol(result: dict) -> str:
    """One or two lines on the protocol of a result, for the console; empty without one."""
    told = result.get("protocol")
    if told is None:
        return ""
    verdict = "as published" if told["as_published"] else "NOT the published number: not comparable"
    lines = [
        f"protocol {told['name']} ({told['about']})",
        f"  {told['pictures']:,} pictures, {told['recordings']:,} recordings, {verdict}; {result['data_set']}, "
        f"{result['split']} split, trained on {result['trained_on']}",
    ]
    if told["name"] == "mteb":
        stage = result.get("fine", result["coarse"])
        for way, key in DIRECTIONS.items():
            values = "  ".join(
                f"@{cut} {stage[key][f'fraction_recall@{cut}']:.1f}" for cut in (1, 5, 10)
            )
            lines.append(
                f"  {NAMES[way]}: nDCG@10 {stage[key]['nDCG@10']:.3f}, fraction recall {values}"
            )
    return "\n".join(lines) + "\n"
