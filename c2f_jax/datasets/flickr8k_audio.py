"""Flickr8k Audio: reader, layout and TFDS builder."""

import csv
from collections import defaultdict
from collections.abc import Iterable

from etils import epath

from c2f_jax.data.listing import Listing
from c2f_jax.datasets.builder import FilePairs
from c2f_jax.datasets.layout import (
    Layout,
    Part,
    dict_list,
    json_entries,
    note_strays,
    text_lines,
    text_value,
)

# Names of the splits in the lists and in Karpathy's file.
SPLITS = {"train": "train", "dev": "validation", "val": "validation", "test": "test"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def _read(parts: dict[str, epath.Path]) -> Listing:
    """Read the pairs: wav2capt.txt names a recording, its image and the number of its caption."""
    listing = Listing("flickr8k_audio")
    images, order = parts["images"], parts["recordings"]
    wavs = order.parent / "wavs"
    splits = _splits(parts["splits"], listing)
    captions = _captions(parts.get("captions"))
    speakers = _speakers(order.parent / "wav2spk.txt")

    unused, spoken = [], set()
    for number, line in text_lines(order):
        fields = line.split()
        if len(fields) != 3 or not fields[2].lstrip("#").isdigit():
            where = f"{order}:{number}"
            reason = f"must be WAV JPG #K, but is {line!r}"
            listing.leave_out("unreadable line", where, where, reason)
            continue

        audio, image, which = fields[0], fields[1], int(fields[2].lstrip("#"))

        spoken.add(image)
        if image not in splits:
            unused.append(wavs / audio)
            listing.note("in no split", wavs / audio, f"{image} is in none of the lists of images")
            continue

        listing.add(
            image=images / image,
            audio=wavs / audio,
            split=splits[image],
            image_id=image.rpartition(".")[0],
            caption=captions.get(image, {}).get(which, ""),
            speaker=speakers.get(audio, ""),
            where=f"{order}:{number}",
        )

    _note_images(listing, images, captions, spoken)
    note_strays(listing, wavs, unused)
    return listing


def _note_images(
    listing: Listing, folder: epath.Path, captions: Iterable[str], spoken: set[str]
) -> None:
    """Note captions without an image, images without a recording, and files that are not images."""
    there = {path.name for path in folder.iterdir()}
    for image in sorted(set(captions) - there):
        listing.note("caption without image", image, f"has captions, but no file in {folder}")
    for image in sorted(there - spoken):
        if image.lower().endswith(IMAGE_SUFFIXES):
            listing.note("image without caption", folder / image, "no recording")
        else:
            listing.note("stray file", folder / image, "not an image")


def _splits(path: epath.Path, listing: Listing) -> dict[str, str]:
    """Read image -> split, from the three lists of names or from Karpathy's file."""
    named = []

    if path.suffix == ".json":
        for number, entry in enumerate(json_entries(path, "images")):
            image = text_value(entry, "filename", f"{path}, image {number}")
            named.append((image, str(entry.get("split"))))
    else:
        for name in ("train", "dev", "test"):
            file = path.parent / f"Flickr_8k.{name}Images.txt"
            named += [(line.strip(), name) for _, line in text_lines(file)]

    splits: dict[str, str] = {}
    for image, name in named:
        split = SPLITS.get(name)
        if split and splits.setdefault(image, split) != split:
            listing.note("split leak", image, f"listed in {splits[image]} and in {split}")
    return splits


def _captions(path: epath.Path | None) -> dict[str, dict[int, str]]:
    """Read image -> number of the caption -> text.

    They come from the token file, Kaggle's CSV or Karpathy's JSON.
    """
    captions: dict[str, dict[int, str]] = defaultdict(dict)
    if path is None:
        return captions

    if path.suffix == ".json":
        for entry in json_entries(path, "images"):
            sentences = dict_list(entry.get("sentences") or [], f"{path}, sentences")
            of_image = captions[text_value(entry, "filename", str(path))]
            for number, sentence in enumerate(sentences):
                of_image[number] = str(sentence.get("raw", ""))
    elif path.name == "captions.txt":
        for _, line in text_lines(path)[1:]:
            # Line by line, or one stray quote would swallow what follows it. Captions with a comma
            # are not always quoted: everything after the first comma is the caption.
            image, *rest = next(csv.reader([line]))
            captions[image][len(captions[image])] = ",".join(rest)
    else:
        for _, line in text_lines(path):
            name, _, text = line.partition("\t")
            image, _, which = name.rpartition("#")
            number = int(which) if which.isdigit() else len(captions[image])
            captions[image][number] = text
    return captions


def _speakers(path: epath.Path) -> dict[str, str]:
    """Read recording -> speaker; {} if the file is missing."""
    speakers = {}
    if path.exists():
        for _, line in text_lines(path):
            fields = line.split()
            if len(fields) == 2:
                speakers[fields[0]] = fields[1]
    return speakers


_DATASETS = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
FLICKR8K_AUDIO = Layout(
    name="flickr8k_audio",
    parts=(
        Part(
            "recordings",
            ("flickr_audio/wav2capt.txt", "wav2capt.txt"),
            "https://groups.csail.mit.edu/sls/downloads/flickraudio/downloads/flickr_audio.tar.gz",
            4.2,
        ),
        Part(
            "images",
            ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images"),
            f"{_DATASETS}/Flickr8k_Dataset.zip",
            1.1,
        ),
        Part(
            "splits",
            ("Flickr_8k.trainImages.txt", "dataset_flickr8k.json", "dataset.json"),
            f"{_DATASETS}/Flickr8k_text.zip",
            0.003,
        ),
        Part(
            "captions",
            ("Flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json", "dataset.json"),
            f"{_DATASETS}/Flickr8k_text.zip",
            0.003,
            optional=True,
        ),
    ),
    read=_read,
    published={"train": (6000, 30_000), "validation": (1000, 5000), "test": (1000, 5000)},
    homepage="https://groups.csail.mit.edu/sls/downloads/flickraudio/",
    license="recordings CC BY-SA; photographs for research and education",
)


class Flickr8kAudio(FilePairs):
    """Flickr8k Audio: 8,000 photographs, five spoken captions each (Harwath and Glass, 2015)."""

    LAYOUT = FLICKR8K_AUDIO
