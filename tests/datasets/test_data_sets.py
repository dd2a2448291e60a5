"""The published layouts are read in every variant, prepared by their builders, and serve
training."""

import functools
import http.server
import json
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import CONFIGS
from helpers.published_sets import (
    BROKEN,
    COCO_SPLITS,
    GONE,
    LONG,
    ORPHAN,
    caption,
    flickr8k_audio,
    places_audio,
    spoken_coco,
)

from c2f_jax.data import loader
from c2f_jax.datasets import builder as builders
from c2f_jax.datasets.flickr8k_audio import FLICKR8K_AUDIO, Flickr8kAudio
from c2f_jax.datasets.layout import Layout, Part
from c2f_jax.datasets.places_audio import PLACES_2020, PLACES_AUDIO, PlacesAudio
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.datasets.spoken_coco import SPOKEN_COCO, SpokenCoco
from c2f_jax.errors import UserError


def named(listing, kind):
    return {Path(name).name for k, name, _ in listing.notes if k == kind}


@pytest.mark.parametrize(
    "images, captions",
    [
        ("Flicker8k_Dataset", "token"),
        ("Images", "kaggle"),
        ("Images", "karpathy"),
        ("Flickr8k_Dataset", "none"),
    ],
)
def test_flickr8k_audio_in_every_layout(tmp_path, images, captions):
    listing = FLICKR8K_AUDIO.listing([flickr8k_audio(tmp_path, images, captions)])
    assert listing.count_splits() == {
        "train": (8, 40),
        "validation": (2, 10),
        "test": (3, 15),
    }
    row = listing.rows[0]
    assert (
        row["image"] == f"{tmp_path}/{images}/pic00.jpg"
        and row["image_id"] == "pic00"
        and row["speaker"] == "1"
    )
    assert row["audio"] == f"{tmp_path}/flickr_audio/wavs/pic00_0.wav"
    for row in listing.rows:
        name, k = Path(row["audio"]).stem.rsplit("_", 1)
        told = row["caption"].removesuffix(" .")
        assert told == ("" if captions == "none" else caption(f"{name}.jpg", int(k)))
    assert named(listing, "stray file") == {"readme.txt"}
    if captions == "token":
        assert ORPHAN in named(listing, "caption without image")


def test_parts_are_found_one_folder_down_and_in_several_folders(tmp_path):
    flickr8k_audio(tmp_path / "a" / "flickr", odd=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "flickr" / "Flicker8k_Dataset").rename(tmp_path / "b" / "Images")
    assert len(FLICKR8K_AUDIO.listing([tmp_path / "a", tmp_path / "b"]).rows) == 65


def test_a_missing_part_is_told_with_its_source_and_size(tmp_path):
    flickr8k_audio(tmp_path, odd=False)
    (tmp_path / "Flickr_8k.trainImages.txt").unlink()
    with pytest.raises(
        UserError,
        match="(?s)parts are missing in.*splits: Flickr_8k.trainImages.txt.*Flickr8k_text.zip.*GB",
    ) as caught:
        FLICKR8K_AUDIO.listing([tmp_path])
    assert "flickr_audio.tar.gz" not in str(caught.value)


def test_lines_that_make_no_sense_are_noted(tmp_path):
    flickr8k_audio(tmp_path, odd=False)
    with open(tmp_path / "flickr_audio" / "wav2capt.txt", "a") as file:
        file.write("only_a_name.wav\nghost_0.wav ghost.jpg #0\n")
    with open(tmp_path / "Flickr_8k.testImages.txt", "a") as file:
        file.write("pic00.jpg\n")
    listing = FLICKR8K_AUDIO.listing([tmp_path])
    assert {
        kind: len(named(listing, kind)) for kind in ("unreadable line", "in no split", "split leak")
    } == {
        "unreadable line": 1,
        "in no split": 1,
        "split leak": 1,
    }
    assert len(listing.rows) == 65


@pytest.mark.parametrize("ksplit", [False, True])
@pytest.mark.parametrize("images", ["", "mscoco_img"])
def test_spoken_coco_official_with_karpathy_and_ksplit(tmp_path, ksplit, images):
    listing = SPOKEN_COCO.listing([spoken_coco(tmp_path, ksplit, images)])
    assert listing.count_splits() == {
        "train": (5, 25),
        "validation": (1, 5),
        "test": (2, 11),
    }
    test = [row for row in listing.rows if row["split"] == "test"]
    assert [row["image_id"] for row in test] == ["COCO_val2014_000000000004"] * 5 + [
        "COCO_val2014_000000000005"
    ] * 6
    assert test[0]["caption"] == "CAPTION 0 OF 4" and test[0]["speaker"] == "m4spk0"
    assert all(Path(row["audio"]).exists() for row in listing.rows)
    assert COCO_SPLITS.count("test") == 2


def test_spoken_coco_in_several_folders(tmp_path):
    """As separate archives are unpacked: each year of images and the split files lie apart."""
    whole = spoken_coco(tmp_path / "coco", ksplit=True, missing=False)
    for name in ("train2014", "val2014"):
        (tmp_path / name).mkdir()
        (whole / name).rename(tmp_path / name / name)
    (tmp_path / "lists").mkdir()
    for path in (whole / "SpokenCOCO").glob("*.json"):
        path.rename(tmp_path / "lists" / path.name)
    folders = [whole, *(tmp_path / name for name in ("train2014", "val2014", "lists"))]
    listing = SPOKEN_COCO.listing(folders)
    assert len(listing.rows) == 41 and not listing.notes
    assert all(Path(row[column]).exists() for row in listing.rows for column in ("image", "audio"))


def test_one_stray_quote_in_kaggles_captions_costs_one_caption(tmp_path):
    path = flickr8k_audio(tmp_path, "Images", "kaggle", odd=False) / "captions.txt"
    lines = path.read_text().splitlines()
    lines[3] = 'pic00.jpg,"a caption, whose quote is never closed'
    path.write_text("\n".join(lines))
    rows = FLICKR8K_AUDIO.listing([tmp_path]).rows
    assert rows[2]["caption"] == "a caption, whose quote is never closed"
    assert rows[3]["caption"] == caption("pic00.jpg", 3) + " ." and all(
        row["caption"] for row in rows
    )


def test_official_spoken_coco_without_a_split_is_an_error(tmp_path):
    (spoken_coco(tmp_path) / "dataset_coco.json").unlink()
    with pytest.raises(UserError, match="no test split; put Karpathy's dataset_coco.json"):
        SPOKEN_COCO.listing([tmp_path])


@pytest.mark.parametrize("older", [False, True])
def test_places_audio_2020_and_older(tmp_path, older):
    listing = PLACES_AUDIO.listing([places_audio(tmp_path, older)])
    splits = ("validation",) if older else PLACES_2020
    assert listing.count_splits() == {
        "train": (8, 8),
        **{split: (2, 2) for split in splits},
    }
    assert listing.rows[0]["caption"] == "an abbey 0" and Path(listing.rows[0]["image"]).exists()


@pytest.mark.parametrize(
    "content", ["{", '{"data": 3}', '{"data": [3]}', '{"data": [{"image": 3}]}', "[]", "[" * 99999]
)
def test_damaged_listings_are_user_errors(tmp_path, content):
    spoken_coco(tmp_path, ksplit=True)
    (tmp_path / "SpokenCOCO" / "SpokenCOCO_ksplit_val.json").write_text(content)
    with pytest.raises(UserError, match="ksplit_val.json"):
        SPOKEN_COCO.listing([tmp_path])


def prepare(builder, folder, data_dir, **options):
    import tensorflow_datasets as tfds

    made = builder(data_dir=str(data_dir), progress=False, download=False, **options)
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(folder)))
    return made


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
    """The folder of the odd copy of Flickr8k Audio, and the TFDS directory that it was prepared
    in."""
    folder, data_dir = tmp_path_factory.mktemp("flickr"), tmp_path_factory.mktemp("tfds")
    prepare(Flickr8kAudio, flickr8k_audio(folder), data_dir, max_bad_share=0.1)
    return folder, data_dir


def test_a_prepared_set_holds_the_files_as_found(flickr):
    folder, data_dir = flickr
    pairs = load_pairs("flickr8k_audio", "train", str(data_dir), max_bad_share=0.1)
    assert pairs.num_images == 7 and len(pairs) == 34 and pairs.name == "flickr8k_audio"
    assert {Path(name).name for name in pairs.bad_items.reasons} == {BROKEN, GONE}
    rows = [row for row in FLICKR8K_AUDIO.listing([folder]).rows if row["split"] == "train"]
    rows = [
        row for row in rows if Path(row["audio"]).name != BROKEN and Path(row["image"]).name != GONE
    ]
    for index, row in enumerate(rows):
        recording = pairs.recording(index)
        assert recording["audio"] == Path(row["audio"]).read_bytes()
        assert (recording["caption"], recording["speaker"]) == (row["caption"], row["speaker"])
        image = int(pairs.image_index[index])
        assert (
            pairs.image(image) == Path(row["image"]).read_bytes()
            and pairs.image_id(image) == row["image_id"]
        )
        if Path(row["audio"]).name == LONG:
            assert pairs.num_samples[index] == 323.5 * 16_000
    assert pairs.num_samples.min() == round(0.23 * 16_000)
    np.testing.assert_array_equal(np.bincount(pairs.image_index), [5, 5, 5, 4, 5, 5, 5])


def test_a_prepared_set_trains_and_evaluates(flickr):
    _, data_dir = flickr
    pairs = load_pairs("flickr8k_audio", "train", str(data_dir), max_bad_share=0.1)
    options = loader.BatchOptions(
        batch_size=8, image_size=16, bucket_seconds=(0.6, 1.0), seed=0, threads=2
    )
    batches = loader.train_batches(pairs, options)
    seen = Counter()
    for _ in range(8):
        _, batch = next(batches)
        assert (
            np.isfinite(batch["waveform"]).all()
            and batch["image"].any()
            and batch["speech_lengths"].min() >= 3680
        )
        seen.update(batch["image_id"].tolist())
    assert len(seen) == 7
    test = load_pairs("flickr8k_audio", "test", str(data_dir))
    (speech,) = loader.speech_batches(test, batch_size=16, seconds_max=1.0, threads=0)
    assert speech["valid"].sum() == 15


def test_too_many_bad_items_stop_and_keep_what_is_done(tmp_path, flickr):
    folder, _ = flickr
    with pytest.raises(UserError, match=f"(?s)flickr8k_audio, split train: 2 of 48 items.*{GONE}"):
        prepare(Flickr8kAudio, folder, tmp_path)
    kept = {path.name for path in (tmp_path / ".parts").rglob("train-*")}
    assert kept == {"train-00000", "train-00000.json"}
    with pytest.raises(UserError, match="is not prepared in"):
        load_pairs("flickr8k_audio", "train", str(tmp_path))


def test_an_interrupted_preparation_goes_on(tmp_path, flickr, monkeypatch):
    folder, data_dir = flickr
    monkeypatch.setattr(builders, "SHARD_IMAGES", 3)
    read, real = [], builders._read_record

    def dying(rows, bad):
        if len(read) == 7:
            raise KeyboardInterrupt
        read.append(rows[0]["image"])
        return real(rows, bad)

    monkeypatch.setattr(builders, "_read_record", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(Flickr8kAudio, folder, tmp_path, threads=1, max_bad_share=0.1)
    before = read.copy()
    monkeypatch.setattr(
        builders,
        "_read_record",
        lambda rows, bad: read.append(rows[0]["image"]) or real(rows, bad),
    )
    builder = prepare(Flickr8kAudio, folder, tmp_path, threads=3, max_bad_share=0.1)
    assert len(read) - len(before) == 13 - 6  # two shards of three were whole
    assert builder.info.splits["train"].num_shards == 3 and not (tmp_path / ".parts").exists()
    whole = load_pairs("flickr8k_audio", "train", str(data_dir), max_bad_share=0.1)
    resumed = load_pairs("flickr8k_audio", "train", str(tmp_path), max_bad_share=0.1)
    np.testing.assert_array_equal(whole.num_samples, resumed.num_samples)
    for index in range(len(whole)):
        assert whole.recording(index) == resumed.recording(index)


def test_parts_of_another_listing_are_not_taken(tmp_path, monkeypatch):
    first, second = (
        flickr8k_audio(tmp_path / "one", odd=False),
        flickr8k_audio(tmp_path / "two", odd=False),
    )
    monkeypatch.setattr(
        builders.FilePairs, "_finish", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        prepare(Flickr8kAudio, first, tmp_path / "tfds")
    monkeypatch.undo()
    (second / "Flicker8k_Dataset" / "pic00.jpg").write_bytes(
        (first / "Flicker8k_Dataset" / "pic01.jpg").read_bytes()
    )
    prepare(Flickr8kAudio, second, tmp_path / "tfds")
    pairs = load_pairs("flickr8k_audio", "train", str(tmp_path / "tfds"))
    assert pairs.image(0) == pairs.image(1)


def test_a_mended_file_is_read_again(tmp_path):
    """A preparation that ended with too many bad items goes on, and takes what was mended in the
    meantime."""
    folder = flickr8k_audio(tmp_path / "flickr")
    with pytest.raises(UserError, match="2 of 48"):
        prepare(Flickr8kAudio, folder, tmp_path / "tfds")
    wavs = folder / "flickr_audio" / "wavs"
    (wavs / BROKEN).write_bytes((wavs / "pic00_0.wav").read_bytes())
    (folder / "Flicker8k_Dataset" / GONE).write_bytes(
        (folder / "Flicker8k_Dataset" / "pic01.jpg").read_bytes()
    )
    prepare(Flickr8kAudio, folder, tmp_path / "tfds")
    assert len(load_pairs("flickr8k_audio", "train", str(tmp_path / "tfds"))) == 40


def test_spoken_coco_and_places_prepare(tmp_path):
    prepare(SpokenCoco, spoken_coco(tmp_path / "coco"), tmp_path / "tfds", max_bad_share=0.1)
    test = load_pairs("spoken_coco", "test", str(tmp_path / "tfds"))
    np.testing.assert_array_equal(np.bincount(test.image_index), [5, 6])
    train = load_pairs("spoken_coco", "train", str(tmp_path / "tfds"), max_bad_share=0.1)
    assert [Path(name).name for name in train.bad_items.reasons] == [
        "COCO_train2014_000000000007.jpg"
    ]
    prepare(PlacesAudio, places_audio(tmp_path / "places"), tmp_path / "tfds", max_bad_share=0.1)
    assert len(load_pairs("places_audio", "dev_seen", str(tmp_path / "tfds"))) == 2
    train = load_pairs("places_audio", "train", str(tmp_path / "tfds"), max_bad_share=0.1)
    assert len(train) == 7 and [Path(name).name for name in train.bad_items.reasons] == [
        "utterance_1.wav"
    ]


def test_tfds_knows_the_builders(flickr):
    import tensorflow_datasets as tfds

    _, data_dir = flickr
    source = tfds.data_source(
        "flickr8k_audio",
        split="validation",
        data_dir=str(data_dir),
        builder_kwargs={"file_format": "array_record"},
    )
    assert len(source) == 2 and len(source[0]["recordings"]["audio"]) == 5


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_parts_with_a_direct_link_are_fetched(tmp_path, monkeypatch):
    """From a server on the loopback address, in the archives that the owners publish."""
    folder, served = flickr8k_audio(tmp_path / "flickr", odd=False), tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "flickr_audio.tar.gz", "w:gz") as archive:
        archive.add(folder / "flickr_audio", "flickr_audio")
    for name, members in (
        ("Flickr8k_Dataset.zip", "Flicker8k_Dataset/*"),
        ("Flickr8k_text.zip", "Flickr*.txt"),
    ):
        with zipfile.ZipFile(served / name, "w") as archive:
            for path in folder.glob(members):
                archive.write(path, path.relative_to(folder))
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(served))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        parts = tuple(
            Part(
                p.what,
                p.names,
                f"http://127.0.0.1:{server.server_port}/{p.source.rsplit('/', 1)[1]}",
                p.gigabytes,
                p.direct,
                p.optional,
            )
            for p in FLICKR8K_AUDIO.parts
        )
        layout = Layout(**{**vars(FLICKR8K_AUDIO), "parts": parts})
        monkeypatch.setattr(Flickr8kAudio, "LAYOUT", layout)
        Flickr8kAudio(data_dir=str(tmp_path / "tfds"), progress=False).download_and_prepare()
    finally:
        server.shutdown()
        server.server_close()
    pairs = load_pairs("flickr8k_audio", "test", str(tmp_path / "tfds"))
    assert (
        len(pairs) == 15
        and pairs.recording(0)["caption"] == "a dog, number 0 on the left of pic10.jpg ."
    )


def test_nothing_is_fetched_unless_asked(tmp_path):
    with pytest.raises(UserError, match="(?s)recordings: .*flickr_audio.tar.gz.*4.2 GB.*images: "):
        prepare(Flickr8kAudio, tmp_path / "empty", tmp_path / "tfds")


@pytest.mark.parametrize("name", ["flickr8k_audio", "spoken_coco", "places_audio"])
def test_the_shipped_configuration_with_light_encoders_opens(name):
    from c2f_jax.config.experiment import create_experiment
    from c2f_jax.config.files import load_config

    path = CONFIGS / f"{name}.py"
    experiment = create_experiment(load_config(f"{path}:light"))
    assert experiment.data.name == name and experiment.data.max_padding == 0.1
    with pytest.raises(
        UserError,
        match="after the colon, 'small' must be one of light, base, large, base_finetuned",
    ):
        load_config(f"{path}:small")


@pytest.mark.slow
def test_one_command_trains_and_evaluates_zero_shot(tmp_path, flickr, capsys):
    """Trained on SpokenCOCO, evaluated on Flickr8k Audio by protocol and on a manifest, then again
    by `evaluate`."""
    import shutil

    from c2f_jax.main import main

    data_dir = tmp_path / "tfds"
    shutil.copytree(flickr[1], data_dir)
    prepare(SpokenCoco, spoken_coco(tmp_path / "coco"), data_dir, max_bad_share=0.1)
    runlocal = CONFIGS / "spoken_scenes.py"
    command = [
        "train",
        f"--config={runlocal}:runlocal",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.name=spoken_coco",
        f"--config.data.data_dir={data_dir}",
        "--config.data.max_bad_share=0.1",
        "--config.batch_size=8",
        "--config.data.max_padding=0.3",
        "--config.data.augment.time_masks=1",
        "--config.data.augment.flip=0.5",
        "--config.steps=2",
        "--config.method.warm_up_steps=0",
        "--zero-shot",
    ]
    assert main([*command, "nonsense"]) == 2 and not (tmp_path / "run").exists()
    assert main([*command, "flickr8k_1k"]) == 0
    told = capsys.readouterr().out
    assert (
        "zero-shot: flickr8k_1k" in told
        and "NOT the published number" in told
        and "trained on spoken_coco" in told
    )
    result = json.loads(
        (tmp_path / "run" / "eval" / "flickr8k_audio-test-flickr8k_1k.json").read_text()
    )
    assert result["protocol"]["pictures"] == 3 and result["protocol"]["recordings"] == 15
    evaluate = ["evaluate", f"--workdir={tmp_path / 'run'}"]
    assert main([*evaluate, "--protocol=mteb"]) == 0
    assert "nDCG@10" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "eval" / "flickr8k_audio-test-mteb.json").read_text())
    assert result["queries"]["gallery_images"] == 3 + 7 + 2
    assert main([*evaluate, "--protocol=flickr8k"]) == 2
    assert "no protocol 'flickr8k'" in capsys.readouterr().err
