"""Places Audio: reader, layout and TFDS builder."""

from etils import epath

from c2f_jax.data.listing import Listing
from c2f_jax.datasets.builder import FilePairs
from c2f_jax.datasets.layout import Layout, Part, json_entries, note_strays, text_value

PLACES_2020 = ("dev_seen", "dev_unseen", "test_seen", "test_unseen")


def _read(parts: dict[str, epath.Path]) -> Listing:
    """Read the pairs, which one JSON file per split lists, named as in 2020 or as before."""
    listing = Listing("places_audio")
    folder, images = parts["listing"].parent, parts["images"]
    audio_root = parts["recordings"].parent
    files = {name: folder / f"{name}_2020.json" for name in ("train", *PLACES_2020)}
    # The older release has two splits.
    if not files["train"].exists():
        files = {"train": folder / "train.json", "validation": folder / "val.json"}

    for split, file in files.items():
        if not file.exists():
            listing.note("missing split", file, f"no split {split}")
            continue
        for number, entry in enumerate(json_entries(file, "data")):
            where = f"{file}, entry {number}"
            image = text_value(entry, "image", where)
            listing.add(
                image=images / image,
                audio=audio_root / text_value(entry, "wav", where),
                split=split,
                image_id=image.rpartition(".")[0],
                caption=str(entry.get("asr_text") or ""),
                speaker=entry.get("speaker") or "",
                where=where,
            )
    note_strays(listing, parts["recordings"])
    return listing


_SOURCE = "https://data.csail.mit.edu/placesaudio/placesaudio_2020_splits.tar.gz"
PLACES_AUDIO = Layout(
    name="places_audio",
    parts=(
        Part(
            "listing",
            (
                "metadata/train_2020.json",
                "PlacesAudio_400k_distro/metadata/train_2020.json",
                "train_2020.json",
                "metadata/train.json",
                "PlacesAudio_400k_distro/metadata/train.json",
                "train.json",
            ),
            _SOURCE,
            85,
        ),
        Part("recordings", ("wavs", "PlacesAudio_400k_distro/wavs"), _SOURCE, 85),
        Part(
            "images",
            ("images", "PlacesAudio_400k_distro/images", "images256"),
            "http://places.csail.mit.edu/downloadData.html (registration)",
            direct=False,
        ),
    ),
    read=_read,
    published={"validation": (1000, 1000)},
    homepage="https://groups.csail.mit.edu/sls/downloads/placesaudio/",
    license="see the owners' pages for recordings and photographs",
)


class PlacesAudio(FilePairs):
    """Places Audio, the splits of 2020 or the older ones (Harwath, Torralba and Glass, 2016)."""

    LAYOUT = PLACES_AUDIO
