"""The published data sets as their owners lay them out: which parts they have, and their pairs as rows of a manifest.

Each reader takes the folders that hold the parts and finds these under any of the names that are in use; what is odd
about the listing itself (captions without a picture, stray files, pictures without captions) is noted, not raised.
"""

import csv
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence

from etils import epath

from c2f_jax.data.audio import read_bytes
from c2f_jax.errors import UserError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


@dataclasses.dataclass(frozen=True)
class Part:
    """A file or folder that a layout needs: any of `names`, in a given folder or one folder further down.

    source is where it is to be had; direct says that this is a link to a file, which a program may fetch.
    """

    what: str
    names: tuple[str, ...]
    source: str
    gigabytes: float | None = None
    direct: bool = True
    optional: bool = False

    def told(self) -> str:
        """What it is called, where it comes from and how large it is, in two lines."""
        size = "size not stated" if self.gigabytes is None else f"{self.gigabytes:g} GB"
        return f"{self.what}: {' or '.join(self.names)}\n    from {self.source} ({size})"


@dataclasses.dataclass
class Listing:
    """The pairs of a data set that was found on disk.

    Attributes:
      name: of the data set.
      rows: one dict a recording, as of a manifest: image, audio (paths), split, image_id, caption, speaker, where,
        samples (-1: unknown).
      notes: (kind, name, detail) of each oddity of the listing; the kinds are those of `c2f_jax.data.check`.
    """

    name: str
    rows: list[dict] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def add(self, *, image, audio, split, image_id, where, caption="", speaker="") -> None:
        """One recording."""
        self.rows.append(
            {
                "image": str(image),
                "audio": str(audio),
                "split": split,
                "image_id": image_id,
                "caption": caption.strip(),
                "speaker": str(speaker),
                "where": where,
                "samples": -1,
            }
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published data set: its parts, its reader, and (pictures, recordings) of each split as published."""

    name: str
    parts: tuple[Part, ...]
    read: Callable[[dict[str, epath.Path]], Listing]
    published: dict[str, tuple[int | None, int | None]]
    homepage: str
    licence: str

    def find(self, folders: Sequence) -> dict[str, epath.Path]:
        """Where each part is that is there: what -> path."""
        found = {}
        for part in self.parts:
            path = _find(folders, part.names)
            if path is not None:
                found[part.what] = path
        return found

    def missing(self, folders: Sequence) -> list[Part]:
        """The parts that are needed and not there."""
        found = self.find(folders)
        return [part for part in self.parts if part.what not in found and not part.optional]

    def listing(self, folders: Sequence) -> Listing:
        """The pairs found in the folders; `UserError` saying what is missing and where to get it."""
        missing = self.missing(folders)
        if missing:
            where = ", ".join(map(str, folders)) or "no folder was given"
            raise UserError(f"{self.name} lacks in {where}:\n" + "\n".join(f"  {part.told()}" for part in missing))
        return self.read(self.find(folders))


def _find(folders: Sequence, names: Sequence[str]) -> epath.Path | None:
    for folder in map(epath.Path, folders):
        for name in names:
            if (folder / name).exists():
                return folder / name
    for folder in map(epath.Path, folders):
        below = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
        for name in names:
            for path in below:
                if (path / name).exists():
                    return path / name
    return None


def _lines(path):
    """(line number, line) of a text file, empty lines left out."""
    try:
        text = read_bytes(str(path)).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from e
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _json(path, key: str) -> list[dict]:
    """The list of dicts under `key` of a JSON file."""
    try:
        entries = json.loads(read_bytes(str(path)))[key]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: not the JSON that was published ({type(e).__name__}: {e}); get it again") from e
    return _dicts(entries, f"{path}, under {key!r}")


def _dicts(values, where: str) -> list[dict]:
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return values
    raise UserError(f"{where}: expected a list of objects; get the file again")


def _value(entry: dict, key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: expected a text under {key!r}, found {value!r}; get the file again")
    return value


def _note_strays(listing: Listing, folder, also_listed: Sequence = ()) -> None:
    """Notes the files below a folder of recordings (on this machine: a bucket is not walked) that nothing names."""
    listed = {row["audio"] for row in listing.rows} | set(map(str, also_listed))
    below = (os.path.join(place, name) for place, _, names in os.walk(str(folder)) for name in names)
    listing.notes += [("stray file", path, "no recording of the listing") for path in sorted(set(below) - listed)]


# Flickr8k Audio


def _read_flickr8k_audio(parts: dict[str, epath.Path]) -> Listing:
    listing = Listing("flickr8k_audio")
    splits, pictures, order = _flickr8k_splits(parts["splits"], listing), parts["pictures"], parts["recordings"]
    captions = _flickr8k_captions(parts.get("captions"))
    wavs = order.parent / "wavs"
    speaker_file = order.parent / "wav2spk.txt"
    pairs = (line.split() for _, line in _lines(speaker_file)) if speaker_file.exists() else ()
    speakers = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    unused, spoken = [], set()
    for number, line in _lines(order):
        fields = line.split()
        if len(fields) != 3 or not fields[2].lstrip("#").isdigit():
            listing.notes.append(("unreadable line", f"{order}:{number}", f"expected WAV JPG #K, found {line!r}"))
            continue
        audio, image, which = fields[0], fields[1], int(fields[2].lstrip("#"))
        spoken.add(image)
        if image not in splits:
            unused.append(wavs / audio)
            listing.notes.append(("in no split", str(wavs / audio), f"{image} is in none of the lists of pictures"))
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
        listing.notes.append(("caption without picture", image, f"captions for it, but no such file in {pictures}"))
    for image in sorted(there - spoken):
        picture = image.lower().endswith((".jpg", ".jpeg", ".png"))
        kind, detail = ("picture without caption", "no recording") if picture else ("stray file", "not a picture")
        listing.notes.append((kind, str(pictures / image), detail))
    _note_strays(listing, wavs, unused)
    return listing


def _flickr8k_splits(path, listing: Listing) -> dict[str, str]:
    """Picture -> split, from the three lists of names or from Karpathy's file."""
    names = {"train": "train", "dev": "validation", "val": "validation", "test": "test"}
    if path.suffix == ".json":
        entries = _json(path, "images")
        named = [(_value(e, "filename", f"{path}, image {k}"), str(e.get("split"))) for k, e in enumerate(entries)]
    else:
        named = []
        for name in ("train", "dev", "test"):
            file = path.parent / f"Flickr_8k.{name}Images.txt"
            named += [(line.strip(), name) for _, line in _lines(file)]
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
        for entry in _json(path, "images"):
            sentences = _dicts(entry.get("sentences") or [], f"{path}, sentences")
            captions[_value(entry, "filename", str(path))] = {k: str(s.get("raw", "")) for k, s in enumerate(sentences)}
    elif path.name == "captions.txt":
        for _, line in _lines(path)[1:]:
            # Line by line, or one stray quote would swallow what follows it. Captions with a comma are not always
            # quoted: what follows the first comma is the caption.
            image, *text = next(csv.reader([line]))
            captions[image][len(captions[image])] = ",".join(text)
    else:
        for _, line in _lines(path):
            name, _, text = line.partition("\t")
            image, _, which = name.rpartition("#")
            captions[image][int(which) if which.isdigit() else len(captions[image])] = text
    return captions


_FLICKR8K_TEXT = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_text.zip"
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
        Part("splits", ("Flickr_8k.trainImages.txt", "dataset_flickr8k.json", "dataset.json"), _FLICKR8K_TEXT, 0.003),
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


# SpokenCOCO


def _read_spoken_coco(parts: dict[str, epath.Path]) -> Listing:
    listing = Listing("spoken_coco")
    path, recordings = parts["listing"], parts["recordings"].parent
    # Downloaded archives are unpacked apart, so the two years need not lie in one folder.
    pictures = {"train2014": parts["pictures"].parent, "val2014": parts["pictures of val2014"].parent}
    names = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
    if "ksplit" in path.name:
        sources = [(path.parent / f"SpokenCOCO_ksplit_{name}.json", name) for name in ("train", "val", "test")]
        split_of = place_of = None
    else:
        if "splits" not in parts:
            raise UserError(
                f"{path}: the official files have no test split; put Karpathy's dataset_coco.json (from "
                f"{KARPATHY}) beside them, or SpeechCLIP's SpokenCOCO_ksplit_train.json, _val.json and _test.json"
            )
        sources = [(path.parent / f"SpokenCOCO_{name}.json", name) for name in ("train", "val")]
        listed = enumerate(_json(parts["splits"], "images"))
        karpathy = [(_value(e, "filename", f"{parts['splits']}, image {k}"), str(e.get("split"))) for k, e in listed]
        split_of = {file: names.get(split) for file, split in karpathy}
        place_of = {file: place for place, (file, _) in enumerate(karpathy)}
    entries, unused = [], []
    for file, name in sources:
        for number, entry in enumerate(_json(file, "data")):
            where = f"{file}, entry {number}"
            image = _value(entry, "image", where)
            captions = _dicts(entry.get("captions") or [], f"{where}, captions")
            split = names[name] if split_of is None else split_of.get(image.rpartition("/")[2])
            if split is None:
                listing.notes.append(("in no split", image, f"not in {parts['splits'].name} ({where})"))
                unused += [recordings / str(caption.get("wav")) for caption in captions]
                continue
            if image.partition("/")[0] not in pictures:
                raise UserError(f"{where}: expected a picture below {' or '.join(pictures)}, found {image!r}")
            entries.append((captions, image, split, where))
    if place_of is not None:
        # Karpathy's order, which the five folds of a thousand test pictures are cut from.
        entries.sort(key=lambda item: place_of[item[1].rpartition("/")[2]])
        for file in sorted(place_of.keys() - {image.rpartition("/")[2] for _, image, *_ in entries}):
            listing.notes.append(("picture without caption", file, f"in {parts['splits'].name}, but no recording"))
    for captions, image, split, where in entries:
        if not captions:
            listing.notes.append(("picture without caption", image, f"no recording ({where})"))
        for number, caption in enumerate(captions):
            listing.add(
                image=pictures[image.partition("/")[0]] / image,
                audio=recordings / _value(caption, "wav", f"{where}, caption {number}"),
                split=split,
                image_id=image.rpartition("/")[2].rpartition(".")[0],
                caption=str(caption.get("text") or ""),
                speaker=caption.get("speaker") or "",
                where=f"{where}, caption {number}",
            )
    _note_strays(listing, parts["recordings"], unused)
    return listing


KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
SPOKEN_COCO = Layout(
    "spoken_coco",
    (
        Part(
            "listing",
            (
                "SpokenCOCO/SpokenCOCO_ksplit_train.json",
                "SpokenCOCO_ksplit_train.json",
                "SpokenCOCO/SpokenCOCO_train.json",
                "SpokenCOCO_train.json",
            ),
            "https://data.csail.mit.edu/placesaudio/SpokenCOCO.tar.gz",
            64,
        ),
        Part("recordings", ("SpokenCOCO/wavs", "wavs"), "https://data.csail.mit.edu/placesaudio/SpokenCOCO.tar.gz", 64),
        Part("pictures", ("train2014",), "http://images.cocodataset.org/zips/train2014.zip", 13.5),
        Part("pictures of val2014", ("val2014",), "http://images.cocodataset.org/zips/val2014.zip", 6.6),
        Part("splits", ("dataset_coco.json", "dataset.json"), KARPATHY, 0.04, optional=True),
    ),
    _read_spoken_coco,
    {"train": (113_287, None), "validation": (5000, None), "test": (5000, 25_031)},
    "https://groups.csail.mit.edu/sls/downloads/placesaudio/",
    "see the owners' pages for recordings and photographs",
)


# Places Audio


def _read_places_audio(parts: dict[str, epath.Path]) -> Listing:
    listing = Listing("places_audio")
    folder, audio_root, pictures = parts["listing"].parent, parts["recordings"].parent, parts["pictures"]
    files = {name: folder / f"{name}_2020.json" for name in ("train", *PLACES_2020)}
    if not files["train"].exists():
        files = {"train": folder / "train.json", "validation": folder / "val.json"}
    for split, file in files.items():
        if not file.exists():
            listing.notes.append(("missing split", str(file), f"no split {split}"))
            continue
        for number, entry in enumerate(_json(file, "data")):
            where = f"{file}, entry {number}"
            image = _value(entry, "image", where)
            listing.add(
                image=pictures / image,
                audio=audio_root / _value(entry, "wav", where),
                split=split,
                image_id=image.rpartition(".")[0],
                caption=str(entry.get("asr_text") or ""),
                speaker=entry.get("speaker") or "",
                where=where,
            )
    _note_strays(listing, parts["recordings"])
    return listing


PLACES_2020 = ("dev_seen", "dev_unseen", "test_seen", "test_unseen")
_PLACES = "https://data.csail.mit.edu/placesaudio/placesaudio_2020_splits.tar.gz"
PLACES_AUDIO = Layout(
    "places_audio",
    (
        Part(
            "listing",
            tuple(
                f"{folder}{file}"
                for file in ("train_2020.json", "train.json")
                for folder in ("metadata/", "PlacesAudio_400k_distro/metadata/", "")
            ),
            _PLACES,
            85,
        ),
        Part("recordings", ("wavs", "PlacesAudio_400k_distro/wavs"), _PLACES, 85),
        Part(
            "pictures",
            ("images", "PlacesAudio_400k_distro/images", "images256"),
            "http://places.csail.mit.edu/downloadData.html (registration)",
            direct=False,
        ),
    ),
    _read_places_audio,
    {"validation": (1000, 1000)},
    "https://groups.csail.mit.edu/sls/downloads/placesaudio/",
    "see the owners' pages for recordings and photographs",
)

LAYOUTS = {layout.name: layout for layout in (FLICKR8K_AUDIO, SPOKEN_COCO, PLACES_AUDIO)}


def layout_of(spec: str) -> Layout:
    """The layout that a folder of downloaded parts goes with; `UserError` for what is no published data set."""
    if spec not in LAYOUTS:
        raise UserError(f"{spec} is no published data set: --manual-dir goes with one of {', '.join(LAYOUTS)}")
    return LAYOUTS[spec]
