"""Small copies of the published data sets, laid out as their owners do, with the oddities that they
have."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from c2f_jax.datasets.registry import layout_of

# What is planted in the copy of Flickr8k Audio.
BROKEN, LONG, SHORT, GONE = "pic03_2.wav", "pic04_1.wav", "pic04_3.wav", "pic06.jpg"
DUPLICATE = ("pic00.jpg", "pic05.jpg")
ORPHAN = "2258277193_586949ec62.jpg.1"
FLICKR_SPLITS = {"train": range(8), "dev": range(8, 10), "test": range(10, 13)}


def wav(seconds, seed=0, rate=16_000):
    rng = np.random.default_rng(seed)
    count = round(seconds * rate)
    tone = 0.2 * np.sin(2 * np.pi * rng.uniform(150, 900) * np.arange(count) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone + rng.normal(0, 0.01, count), rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def jpeg(seed=0, size=(60, 45)):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def caption(image, k):
    return f"a dog, number {k} on the left of {image}"


def flickr8k_audio(folder, image_folder="Flicker8k_Dataset", captions="token", odd=True):
    """The corpus with 13 images of five recordings; returns the folder. captions: token, kaggle,
    karpathy or none."""
    images = [f"pic{k:02d}.jpg" for k in range(13)]
    split_of = {images[k]: name for name, numbers in FLICKR_SPLITS.items() for k in numbers}
    wavs = folder / "flickr_audio" / "wavs"
    order, speakers = [], []
    for number, image in enumerate(images):
        put(folder / image_folder / image, jpeg(0 if odd and image in DUPLICATE else number))
        for k in range(5):
            name = f"{image[:-4]}_{k}.wav"
            put(wavs / name, wav(0.5 + 0.05 * k, 10 * number + k))
            order.append(f"{name} {image} #{k}")
            speakers.append(f"{name} {number % 4 + 1}")
    if odd:
        put(wavs / BROKEN, b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00")
        put(wavs / LONG, wav(323.5, 1))
        put(wavs / SHORT, wav(0.23, 2))
        put(wavs / "readme.txt", "not audio")
        (folder / image_folder / GONE).unlink()
    put(folder / "flickr_audio" / "wav2capt.txt", "\n".join(order) + "\n")
    put(folder / "flickr_audio" / "wav2spk.txt", "\n".join(speakers) + "\n")
    if captions == "karpathy":
        entries = [
            {
                "filename": image,
                "split": split_of[image].replace("dev", "val"),
                "imgid": n,
                "sentences": [{"raw": caption(image, k)} for k in range(5)],
            }
            for n, image in enumerate(images)
        ]
        put(folder / "dataset.json", json.dumps({"images": entries, "dataset": "flickr8k"}))
        return folder
    for name in FLICKR_SPLITS:
        listed = [image for image in images if split_of[image] == name]
        put(folder / f"Flickr_8k.{name}Images.txt", "\n".join(listed) + "\n")
    named = [(image, k) for image in images for k in range(5)]
    if odd:
        named += [(ORPHAN, k) for k in range(5)]
    if captions == "token":
        put(
            folder / "Flickr8k.token.txt",
            "".join(f"{i}#{k}\t{caption(i, k)} .\n" for i, k in named),
        )
    elif captions == "kaggle":
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["image", "caption"])
        table.writerows([i, f"{caption(i, k)} ."] for i, k in named if i != ORPHAN)
        # Some rows are quoted by the writer, and one is not although it holds a comma.
        put(
            folder / "captions.txt",
            text.getvalue().replace(f'"{caption(images[0], 0)} ."', f"{caption(images[0], 0)} ."),
        )
    return folder


COCO_SPLITS = ("train", "restval", "train", "val", "test", "test", "train", "train")


def spoken_coco(folder, ksplit=False, images="", missing=True):
    """SpokenCOCO with 8 images: one test image has six captions, the image of the last is
    missing."""
    listing = {"train": [], "val": [], "test": []}
    karpathy = []
    for number, split in enumerate(COCO_SPLITS):
        year = "train2014" if split == "train" else "val2014"
        image = f"{year}/COCO_{year}_{number:012d}.jpg"
        if not (missing and number == 7):
            put(folder / images / image, jpeg(number))
        captions = []
        for k in range(6 if number == 5 else 5):
            uttid = f"m{number}spk{k}-3ABC_{number}_{k}"
            path = f"wavs/{'train' if year == 'train2014' else 'val'}/{k}/{uttid}.wav"
            put(folder / "SpokenCOCO" / path, wav(0.6, 100 + 10 * number + k))
            captions.append(
                {
                    "text": f"CAPTION {k} OF {number}",
                    "speaker": f"m{number}spk{k}",
                    "uttid": uttid,
                    "wav": path,
                }
            )
        name = {"restval": "train"}.get(split, split) if ksplit else year.removesuffix("2014")
        listing[name].append({"image": image, "captions": captions})
        karpathy.append(
            {"filename": image.split("/")[1], "filepath": year, "split": split, "cocoid": number}
        )
    for name, entries in listing.items():
        if entries or ksplit:
            stem = f"SpokenCOCO_ksplit_{name}" if ksplit else f"SpokenCOCO_{name}"
            put(
                folder / "SpokenCOCO" / f"{stem}.json",
                json.dumps({"data": entries[::-1] if not ksplit else entries}),
            )
    if not ksplit:
        put(folder / "dataset_coco.json", json.dumps({"images": karpathy, "dataset": "coco"}))
    return folder


def places_audio(folder, older=False, odd=True):
    """Places Audio with one recording an image; odd: one recording of the training split is
    empty."""
    files = (
        ["train", "val"]
        if older
        else ["train_2020", *(f"{p}_{s}_2020" for p in ("dev", "test") for s in ("seen", "unseen"))]
    )
    for place, name in enumerate(files):
        entries = []
        for k in range(8 if name.startswith("train") else 2):
            number = 20 * place + k
            image, path = f"a/abbey/gsun_{number:04d}.jpg", f"wavs/{place}/utterance_{number}.wav"
            put(folder / "images" / image, jpeg(200 + number))
            put(
                folder / path,
                b"" if odd and name.startswith("train") and k == 1 else wav(0.7, 300 + number),
            )
            entries.append(
                {
                    "uttid": f"A{k}-utt_{number}",
                    "speaker": f"A{k}",
                    "asr_text": f"an abbey {number}",
                    "wav": path,
                    "image": image,
                }
            )
        put(folder / "metadata" / f"{name}.json", json.dumps({"data": entries}))
    return folder


def odd_set(name, folder):
    """A published set with each oddity that they have planted in its training split: kind of
    finding -> file."""
    make = {
        "flickr8k_audio": flickr8k_audio,
        "spoken_coco": spoken_coco,
        "places_audio": places_audio,
    }[name]
    make(folder, **{"spoken_coco": {"missing": False, "ksplit": True}}.get(name, {"odd": False}))
    rows = [row for row in layout_of(name).listing([folder]).rows if row["split"] == "train"]
    first = [
        next(row for row in rows if row["image"] == image)
        for image in dict.fromkeys(r["image"] for r in rows)
    ]
    broken, long, short, one, gone, *_ = first
    put(Path(broken["audio"]), b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00")
    put(Path(long["audio"]), wav(323.5, 1))
    put(Path(short["audio"]), wav(0.23, 2))
    put(Path(one["image"]), Path(short["image"]).read_bytes())
    put(Path(broken["audio"]).parent / "readme.txt", "not audio")
    Path(gone["image"]).unlink()
    put(Path(one["audio"]).parent / "one_more.wav", wav(0.6, 3))
    if name == "flickr8k_audio":
        with open(folder / "flickr_audio" / "wav2capt.txt", "a") as file:
            file.write(f"one_more.wav {Path(one['image']).name} #5\n")
    else:
        path = Path(one["where"].partition(", entry")[0])
        listing = json.loads(path.read_text())
        entry = next(entry for entry in listing["data"] if one["image"].endswith(entry["image"]))
        if name == "spoken_coco":
            wave = entry["captions"][0]["wav"]
            entry["captions"].append(
                entry["captions"][0] | {"wav": f"{wave.rpartition('/')[0]}/one_more.wav"}
            )
        else:
            listing["data"].append(
                entry | {"wav": f"{entry['wav'].rpartition('/')[0]}/one_more.wav"}
            )
        path.write_text(json.dumps(listing))
    planted = {
        "unreadable": broken["audio"],
        "over-long": long["audio"],
        "very short": short["audio"],
        "missing file": gone["image"],
        "stray file": "readme.txt",
        "number of captions": one["image"],
        "duplicate image": one["image"],
    }
    return {kind: {Path(file).name} for kind, file in planted.items()}
