"""Places Audio: reader, layout and TFDS builder."""

from etils import epath

from c2f_jax.data.manifest import Listing
from c2f_jax.datasets.builder import FilePairs
from c2f_jax.datasets.layout import Layout, Part, json_entries, note_strays, text_value

# Places Audio


def _read_places_audio(parts: dict[str, epath.Path]) -> Listing:
    listing = Listing("places_audio")
    folder, audio_root, pictures = (
        parts["listing"].parent,
        parts["recordings"].parent,
        parts["pictures"],
    )
    files = {name: folder / f"{name}_2020.json" for name in ("train", *PLACES_2020)}
    if not files["train"].exists():
        files = {"train": folder / "train.json", "validation": folder / "val.json"}
    for split, file in files.items():
        if not file.exists():
            listing.notes.append(("missing split", str(file), f"no split {split}"))
            continue
        for number, entry in enumerate(json_entries(file, "data")):
            where = f"{file}, entry {number}"
            image = text_value(entry, "image", where)
            listing.add(
                image=pictures / image,
                audio=audio_root / text_value(entry, "wav", where),
                split=split,
                image_id=image.rpartition(".")[0],
                caption=str(entry.get("asr_text") or ""),
                speaker=entry.get("speaker") or "",
                where=where,
            )
    note_strays(listing, parts["recordings"])
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


class PlacesAudio(FilePairs):
    """Places Audio, the splits of 2020 or the older ones (Harwath, Torralba and Glass, 2016)."""

    LAYOUT = PLACES_AUDIO
    MANUAL_DOWNLOAD_INSTRUCTIONS = "See `c2f data prepare places_audio --dry-run`."
