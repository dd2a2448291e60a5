"""SpokenCOCO: reader, layout and TFDS builder."""

import dataclasses
from collections.abc import Iterator

from etils import epath

from c2f_jax.data.listing import Listing
from c2f_jax.datasets.builder import FilePairs
from c2f_jax.datasets.layout import (
    Layout,
    Part,
    dict_list,
    json_entries,
    note_strays,
    text_value,
)
from c2f_jax.errors import UserError

KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
# Names of the splits in Karpathy's and SpeechCLIP's files.
SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An image of the listing: its path below the folder of images, and its captions."""

    image: str
    captions: list[dict]
    split: str | None
    where: str

    @property
    def file(self) -> str:
        return self.image.rpartition("/")[2]


def _read(parts: dict[str, epath.Path]) -> Listing:
    """Read the pairs.

    They come from SpeechCLIP's listing by split, or from the official one and Karpathy's splits.
    """
    listing = Listing("spoken_coco")
    path, recordings = parts["listing"], parts["recordings"].parent
    # Archives are unpacked one by one, so the two years need not lie in one folder.
    folders = {
        "train2014": parts["images"].parent,
        "val2014": parts["images of val2014"].parent,
    }

    unused: list[epath.Path] = []

    if "ksplit" in path.name:
        entries = list(_ksplit_entries(path.parent))
    else:
        entries = _official_entries(path, parts.get("splits"), listing)

    for entry in entries:
        if entry.split is None:
            # Recordings of images in no split are listed, so they are not stray files.
            unused += [recordings / str(caption.get("wav")) for caption in entry.captions]
            continue

        year = entry.image.partition("/")[0]
        if year not in folders:
            raise UserError(
                f"{entry.where}: the image must be below {' or '.join(folders)}, "
                f"not {entry.image!r}; download the file again"
            )

        if not entry.captions:
            listing.note("image without caption", entry.image, f"no recording ({entry.where})")

        for number, caption in enumerate(entry.captions):
            where = f"{entry.where}, caption {number}"
            listing.add(
                image=folders[year] / entry.image,
                audio=recordings / text_value(caption, "wav", where),
                split=entry.split,
                image_id=entry.file.rpartition(".")[0],
                caption=str(caption.get("text") or ""),
                speaker=caption.get("speaker") or "",
                where=where,
            )
    note_strays(listing, parts["recordings"], unused)
    return listing


def _entries(file: epath.Path) -> Iterator[_Entry]:
    """Read the images of one JSON file, without their splits."""
    for number, entry in enumerate(json_entries(file, "data")):
        where = f"{file}, entry {number}"
        image = text_value(entry, "image", where)
        captions = dict_list(entry.get("captions") or [], f"{where}, captions")
        yield _Entry(image, captions, None, where)


def _ksplit_entries(folder: epath.Path) -> Iterator[_Entry]:
    """Read SpeechCLIP's files: one for each split."""
    for name in ("train", "val", "test"):
        for entry in _entries(folder / f"SpokenCOCO_ksplit_{name}.json"):
            yield dataclasses.replace(entry, split=SPLITS[name])


def _official_entries(
    path: epath.Path, karpathy: epath.Path | None, listing: Listing
) -> list[_Entry]:
    """Read the official files, with Karpathy's splits and in his order."""
    if karpathy is None:
        raise UserError(
            f"{path}: the official files have no test split; put Karpathy's dataset_coco.json "
            f"(from {KARPATHY}) beside them, or SpeechCLIP's SpokenCOCO_ksplit_train.json, "
            "_val.json and _test.json"
        )

    split_of, place_of = {}, {}
    for number, image in enumerate(json_entries(karpathy, "images")):
        file = text_value(image, "filename", f"{karpathy}, image {number}")
        split_of[file] = SPLITS.get(str(image.get("split")))
        place_of[file] = number

    listed, unlisted = [], []
    for name in ("train", "val"):
        for entry in _entries(path.parent / f"SpokenCOCO_{name}.json"):
            split = split_of.get(entry.file)
            if split is None:
                unlisted.append(entry)
                listing.note("in no split", entry.image, f"not in {karpathy.name} ({entry.where})")
            else:
                listed.append(dataclasses.replace(entry, split=split))

    # The five folds of a thousand test images are cut from Karpathy's order.
    listed.sort(key=lambda entry: place_of[entry.file])
    for file in sorted(place_of.keys() - {entry.file for entry in listed}):
        listing.note("image without caption", file, f"in {karpathy.name}, but no recording")
    return listed + unlisted


_SOURCE = "https://data.csail.mit.edu/placesaudio/SpokenCOCO.tar.gz"
SPOKEN_COCO = Layout(
    name="spoken_coco",
    parts=(
        Part(
            "listing",
            (
                "SpokenCOCO/SpokenCOCO_ksplit_train.json",
                "SpokenCOCO_ksplit_train.json",
                "SpokenCOCO/SpokenCOCO_train.json",
                "SpokenCOCO_train.json",
            ),
            _SOURCE,
            64,
        ),
        Part("recordings", ("SpokenCOCO/wavs", "wavs"), _SOURCE, 64),
        Part("images", ("train2014",), "http://images.cocodataset.org/zips/train2014.zip", 13.5),
        Part(
            "images of val2014",
            ("val2014",),
            "http://images.cocodataset.org/zips/val2014.zip",
            6.6,
        ),
        Part("splits", ("dataset_coco.json", "dataset.json"), KARPATHY, 0.04, optional=True),
    ),
    read=_read,
    published={"train": (113_287, None), "validation": (5000, None), "test": (5000, 25_031)},
    homepage="https://groups.csail.mit.edu/sls/downloads/placesaudio/",
    license="see the owners' pages for recordings and photographs",
)


class SpokenCoco(FilePairs):
    """SpokenCOCO, the Karpathy split (Hsu, Harwath, Song and Glass, 2020)."""

    LAYOUT = SPOKEN_COCO
