"""SpokenCOCO: reader, layout and TFDS builder."""

from etils import epath

from c2f_jax.data.manifest import Listing
from c2f_jax.datasets.builder import FilePairs
from c2f_jax.datasets.layout import Layout, Part, dicts, json_entries, note_strays, text_value
from c2f_jax.errors import UserError

# SpokenCOCO


def _read_spoken_coco(parts: dict[str, epath.Path]) -> Listing:
    listing = Listing("spoken_coco")
    path, recordings = parts["listing"], parts["recordings"].parent
    # Downloaded archives are unpacked apart, so the two years need not lie in one folder.
    pictures = {
        "train2014": parts["pictures"].parent,
        "val2014": parts["pictures of val2014"].parent,
    }
    names = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
    if "ksplit" in path.name:
        sources = [
            (path.parent / f"SpokenCOCO_ksplit_{name}.json", name)
            for name in ("train", "val", "test")
        ]
        split_of = place_of = None
    else:
        if "splits" not in parts:
            raise UserError(
                f"{path}: the official files have no test split; put Karpathy's dataset_coco.json (from "
                f"{KARPATHY}) beside them, or SpeechCLIP's SpokenCOCO_ksplit_train.json, _val.json and _test.json"
            )
        sources = [(path.parent / f"SpokenCOCO_{name}.json", name) for name in ("train", "val")]
        listed = enumerate(json_entries(parts["splits"], "images"))
        karpathy = [
            (text_value(e, "filename", f"{parts['splits']}, image {k}"), str(e.get("split")))
            for k, e in listed
        ]
        split_of = {file: names.get(split) for file, split in karpathy}
        place_of = {file: place for place, (file, _) in enumerate(karpathy)}
    entries, unused = [], []
    for file, name in sources:
        for number, entry in enumerate(json_entries(file, "data")):
            where = f"{file}, entry {number}"
            image = text_value(entry, "image", where)
            captions = dicts(entry.get("captions") or [], f"{where}, captions")
            split = names[name] if split_of is None else split_of.get(image.rpartition("/")[2])
            if split is None:
                listing.notes.append(
                    ("in no split", image, f"not in {parts['splits'].name} ({where})")
                )
                unused += [recordings / str(caption.get("wav")) for caption in captions]
                continue
            if image.partition("/")[0] not in pictures:
                raise UserError(
                    f"{where}: expected a picture below {' or '.join(pictures)}, found {image!r}"
                )
            entries.append((captions, image, split, where))
    if place_of is not None:
        # Karpathy's order, which the five folds of a thousand test pictures are cut from.
        entries.sort(key=lambda item: place_of[item[1].rpartition("/")[2]])
        for file in sorted(
            place_of.keys() - {image.rpartition("/")[2] for _, image, *_ in entries}
        ):
            listing.notes.append(
                ("picture without caption", file, f"in {parts['splits'].name}, but no recording")
            )
    for captions, image, split, where in entries:
        if not captions:
            listing.notes.append(("picture without caption", image, f"no recording ({where})"))
        for number, caption in enumerate(captions):
            listing.add(
                image=pictures[image.partition("/")[0]] / image,
                audio=recordings / text_value(caption, "wav", f"{where}, caption {number}"),
                split=split,
                image_id=image.rpartition("/")[2].rpartition(".")[0],
                caption=str(caption.get("text") or ""),
                speaker=caption.get("speaker") or "",
                where=f"{where}, caption {number}",
            )
    note_strays(listing, parts["recordings"], unused)
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
        Part(
            "recordings",
            ("SpokenCOCO/wavs", "wavs"),
            "https://data.csail.mit.edu/placesaudio/SpokenCOCO.tar.gz",
            64,
        ),
        Part("pictures", ("train2014",), "http://images.cocodataset.org/zips/train2014.zip", 13.5),
        Part(
            "pictures of val2014",
            ("val2014",),
            "http://images.cocodataset.org/zips/val2014.zip",
            6.6,
        ),
        Part("splits", ("dataset_coco.json", "dataset.json"), KARPATHY, 0.04, optional=True),
    ),
    _read_spoken_coco,
    {"train": (113_287, None), "validation": (5000, None), "test": (5000, 25_031)},
    "https://groups.csail.mit.edu/sls/downloads/placesaudio/",
    "see the owners' pages for recordings and photographs",
)


class SpokenCoco(FilePairs):
    """SpokenCOCO, the Karpathy split (Hsu, Harwath, Song and Glass, 2020)."""

    LAYOUT = SPOKEN_COCO
    MANUAL_DOWNLOAD_INSTRUCTIONS = "See `c2f data prepare spoken_coco --dry-run`."
