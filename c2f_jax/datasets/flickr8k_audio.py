"""Flickr8k Audio: reader, layout and TFDS builder."""

import csv
from collections import defaultdict

from etils import epath

from c2f_jax.data.manifest import Listing
from c2f_jax.datasets.builder import FilePairs
from c2f_jax.datasets.layout import (
    Layout,
    Part,
    dicts,
    json_entries,
    note_strays,
    text_lines,
    text_value,
)

# Flickr8k Audio


def _read_flickr8k_audio(parts: dict[str, epath.Path]) -> Listing:
    listing = Listing("flickr8k_audio")
    splits, pictures, order = (
        _flickr8k_splits(parts["splits"], listing),
        parts["pictures"],
        parts["recordings"],
    )
    captions = _flickr8k_captions(parts.get("captions"))
    wavs = order.parent / "wavs"
    speaker_file = order.parent / "wav2spk.txt"
    pairs = (line.split() for _, line in text_lines(speaker_file)) if speaker_file.exists() else ()
    speakers = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    unused, spoken = [], set()
    for number, line in text_lines(order):
        fields = line.split()
        if len(fields) != 3 or not fields[2].lstrip("#").isdigit():
            listing.notes.append(
                ("unreadable line", f"{order}:{number}", f"expected WAV JPG #K, found {line!r}")
            )
            continue
        audio, image, which = fields[0], fields[1], int(fields[2].lstrip("#"))
        spoken.add(image)
        if image not in splits:
            unused.append(wavs / audio)
            listing.notes.append(
                ("in no split", str(wavs / audio), f"{image} is in none of the lists of pictures")
            )
            continue
        listing.add(
            image=pictures / image,
            audio=wavs / audio,
            split=splits[image],
            image_id=image.rpartition(".")[0],
            caption=captions.get(image, {}).get(which, ""),
            speaker=speakers.get(audio, ""),
            where=f"{order}:{number}",
        )
    there = {path.name for path in pictures.iterdir()}
    for image in sorted(set(captions) - there):
        listing.notes.append(
            ("caption without picture", image, f"captions for it, but no such file in {pictures}")
        )
    for image in sorted(there - spoken):
        picture = image.lower().endswith((".jpg", ".jpeg", ".png"))
        kind, detail = (
            ("picture without caption", "no recording")
            if picture
            else ("stray file", "not a picture")
        )
        listing.notes.append((kind, str(pictures / image), detail))
    note_strays(listing, wavs, unused)
    return listing


def _flickr8k_splits(path, listing: Listing) -> dict[str, str]:
    """Picture -> split, from the three lists of names or from Karpathy's file."""
    names = {"train": "train", "dev": "validation", "val": "validation", "test": "test"}
    if path.suffix == ".json":
        entries = json_entries(path, "images")
        named = [
            (text_value(e, "filename", f"{path}, image {k}"), str(e.get("split")))
            for k, e in enumerate(entries)
        ]
    else:
        named = []
        for name in ("train", "dev", "test"):
            file = path.parent / f"Flickr_8k.{name}Images.txt"
            named += [(line.strip(), name) for _, line in text_lines(file)]
    splits: dict[str, str] = {}
    for image, name in named:
        split = names.get(name)
        if split and splits.setdefault(image, split) != split:
            listing.notes.append(("split leak", image, f"listed in {splits[image]} and in {split}"))
    return splits


def _flickr8k_captions(path) -> dict[str, dict[int, str]]:
    """Picture -> number of the caption -> text; from token file, Kaggle's CSV or Karpathy's JSON."""
    captions: dict[str, dict[int, str]] = defaultdict(dict)
    if path is None:
        return captions
    if path.suffix == ".json":
        for entry in json_entries(path, "images"):
            sentences = dicts(entry.get("sentences") or [], f"{path}, sentences")
            captions[text_value(entry, "filename", str(path))] = {
                k: str(s.get("raw", "")) for k, s in enumerate(sentences)
            }
    elif path.name == "captions.txt":
        for _, line in text_lines(path)[1:]:
            # Line by line, or one stray quote would swallow what follows it. Captions with a comma are not always
            # quoted: what follows the first comma is the caption.
            image, *text = next(csv.reader([line]))
            captions[image][len(captions[image])] = ",".join(text)
    else:
        for _, line in text_lines(path):
            name, _, text = line.partition("\t")
            image, _, which = name.rpartition("#")
            captions[image][int(which) if which.isdigit() else len(captions[image])] = text
    return captions


_FLICKR8K_TEXT = (
    "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_text.zip"
)
FLICKR8K_AUDIO = Layout(
    "flickr8k_audio",
    (
        Part(
            "recordings",
            ("flickr_audio/wav2capt.txt", "wav2capt.txt"),
            "https://groups.csail.mit.edu/sls/downloads/flickraudio/downloads/flickr_audio.tar.gz",
            4.2,
        ),
        Part(
            "pictures",
            ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images"),
            "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_Dataset.zip",
            1.1,
        ),
        Part(
            "splits",
            ("Flickr_8k.trainImages.txt", "dataset_flickr8k.json", "dataset.json"),
            _FLICKR8K_TEXT,
            0.003,
        ),
        Part(
            "captions",
            ("Flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json", "dataset.json"),
            _FLICKR8K_TEXT,
            0.003,
            optional=True,
        ),
    ),
    _read_flickr8k_audio,
    {"train": (6000, 30_000), "validation": (1000, 5000), "test": (1000, 5000)},
    "https://groups.csail.mit.edu/sls/downloads/flickraudio/",
    "recordings CC BY-SA; photographs for research and education",
)


class Flickr8kAudio(FilePairs):
    """Flickr8k Audio: 8,000 photographs with five spoken captions each, official split (Harwath and Glass, 2015)."""

    LAYOUT = FLICKR8K_AUDIO
    MANUAL_DOWNLOAD_INSTRUCTIONS = "See `c2f data prepare flickr8k_audio --dry-run`."
