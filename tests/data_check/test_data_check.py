"""`c2f data check` names each planted oddity, writes its reports, mends manifests; `c2f data
prepare` and dry run."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.published_sets import (
    BROKEN,
    DUPLICATE,
    GONE,
    LONG,
    ORPHAN,
    SHORT,
    flickr8k_audio,
    jpeg,
    odd_set,
    places_audio,
    put,
    spoken_coco,
    wav,
)
from PIL import Image

from c2f_jax.config.files import load_config, save_config
from c2f_jax.data.feature_cache import write_shard
from c2f_jax.data.loader import BatchOptions, image_batches, speech_batches, train_batches
from c2f_jax.data_check.check import RunLimits, check_data
from c2f_jax.data_check.clean_manifest import write_clean_manifest
from c2f_jax.data_check.findings import KINDS
from c2f_jax.datasets.config import DataConfig
from c2f_jax.datasets.prepare import dry_run, prepare
from c2f_jax.datasets.registry import PUBLISHED, is_data_set, load_pairs
from c2f_jax.errors import UserError
from c2f_jax.main import main


def found(report):
    """Kind -> the names of the files found."""
    names = {}
    for finding in report.findings:
        names.setdefault(finding.kind, set()).add(Path(finding.name).name)
    return names


@pytest.fixture(scope="module")
def flickr_report(tmp_path_factory):
    folder = flickr8k_audio(tmp_path_factory.mktemp("flickr"))
    return check_data("flickr8k_audio", manual_dir=str(folder), progress=False)


def test_each_oddity_of_flickr8k_audio_is_named(flickr_report):
    names = found(flickr_report)
    assert names.pop("missing file") == {GONE}
    assert names.pop("unreadable") | names.pop("truncated", set()) == {BROKEN}
    assert names.pop("over-long") == {LONG}
    assert names.pop("duplicate image") == {DUPLICATE[1]}
    assert names.pop("caption without image") == {ORPHAN, GONE}
    assert names.pop("stray file") == {"readme.txt"}
    assert names.pop("very short") == {SHORT}
    assert "train, images" in names.pop("count differs")
    assert not names
    assert flickr_report.severity == "error"
    train = flickr_report.splits["train"]
    assert (train["images"], train["recordings"], train["usable"]) == (8, 40, 34)
    assert train["seconds"]["min"] == pytest.approx(0.23) and train["seconds"][
        "max"
    ] == pytest.approx(323.5)
    assert train["captions_per_image"] == {"5": 8}


def test_spoken_coco_and_places(tmp_path):
    report = check_data(
        "spoken_coco", manual_dir=str(spoken_coco(tmp_path / "coco")), progress=False
    )
    assert found(report)["missing file"] == {"COCO_train2014_000000000007.jpg"}
    assert report.splits["test"]["captions_per_image"] == {"5": 1, "6": 1}
    assert "test, recordings" in found(report)["count differs"]
    report = check_data(
        "places_audio", manual_dir=str(places_audio(tmp_path / "places")), progress=False
    )
    assert found(report) == {"zero length": {"utterance_1.wav"}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_set_with_every_oddity_is_told_and_trains(name, tmp_path):
    """The seven oddities that the published sets have, in each of them: named, left out or kept,
    and trained on."""
    planted = odd_set(name, tmp_path / "set")
    report = check_data(name, manual_dir=str(tmp_path / "set"), progress=False)
    names = found(report)
    assert all(planted[kind] <= names[kind] for kind in planted)
    assert "5 to 6" in report.text() or "1 to 2" in report.text()
    prepare(
        name,
        manual_dir=str(tmp_path / "set"),
        data_dir=str(tmp_path / "tfds"),
        max_bad_share=0.4,
        progress=False,
    )
    pairs = load_pairs(name, "train", str(tmp_path / "tfds"), max_bad_share=0.4)
    bad = {Path(item).name for item in pairs.bad_items.reasons}
    assert bad == planted["missing file"] | planted["unreadable"]
    options = BatchOptions(batch_size=4, image_size=16, bucket_seconds=(1.0,), seed=0, threads=0)
    batches = train_batches(pairs, options)
    assert all(np.isfinite(next(batches)[1]["waveform"]).all() for _ in range(len(pairs) // 4 + 1))


def test_a_folder_with_a_manifest_is_checked_as_that_manifest(tmp_path, capsys):
    put(tmp_path / "a.jpg", jpeg(1))
    put(tmp_path / "a.wav", wav(0.5))
    path = manifest(tmp_path, [{"image": "a.jpg", "audio": "a.wav", "split": "train"}])
    assert main(["data", "check", str(tmp_path)]) == 0
    assert path in capsys.readouterr().out
    assert main(["data", "check", "no" * 3000]) == 2
    for command in ("check", "prepare"):
        assert main(["data", command, path, "--manual-dir", str(tmp_path)]) == 2
        assert "--manual-dir needs one of flickr8k_audio" in capsys.readouterr().err
    assert main(["data", "check", path, "--fix", "clean.txt"]) == 2
    told = capsys.readouterr()
    assert "ends in .jsonl" in told.err and not told.out  # said before anything is decoded


def test_a_leak_is_fixed_with_all_copies_of_an_image(tmp_path):
    """An image that is twice in train, by one image_id or two, and again in test: both are dropped
    from train."""
    rows = [{"image": f"{k}.jpg", "audio": f"{k}.wav", "split": "train"} for k in range(6)]
    for k in range(6):
        put(tmp_path / f"{k}.jpg", jpeg(0 if k in (2, 4) else k))
        put(tmp_path / f"{k}.wav", wav(0.5, k))
    rows[4]["image_id"], rows[5]["split"] = rows[0]["image"], "test"
    put(tmp_path / "5.jpg", jpeg(0))
    path = manifest(tmp_path, rows)
    report = check_data(path, progress=False)
    assert found(report)["duplicate image"] == {"2.jpg"} and found(report)["repeated image"] == {
        "4.jpg"
    }
    write_clean_manifest(report, tmp_path / "clean.jsonl")
    left = [json.loads(line)["image"] for line in open(tmp_path / "clean.jsonl")]
    assert left == ["1.jpg", "3.jpg", "5.jpg"]
    assert check_data(str(tmp_path / "clean.jsonl"), progress=False).severity == "note"


def manifest(folder, rows):
    path = folder / "manifest.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" if isinstance(row, dict) else row + "\n" for row in rows)
    )
    return str(path)


@pytest.fixture
def oddities(tmp_path):
    """A manifest with one of everything that can be wrong with files; 40 good pairs beside."""
    rows = [
        {"image": f"good{k}.jpg", "audio": f"good{k}.wav", "split": "train", "image_id": f"g{k}"}
        for k in range(40)
    ]
    for k in range(40):
        put(tmp_path / f"good{k}.jpg", jpeg(1000 + k))
        put(tmp_path / f"good{k}.wav", wav(0.3, 1000 + k))

    def odd(image, audio, split="train", **more):
        rows.append({"image": image, "audio": audio, "split": split, **more})

    nan = np.full(8000, 0.1)
    nan[5] = np.nan
    for name, content in {
        "cut.wav": wav(1.0)[:9000],
        "text.wav": b"hello",
        "none.wav": b"",
        "short.wav": wav(0.02),
        "long.wav": wav(31),
        "dup.wav": wav(0.3, 1000),
        "cut.jpg": jpeg(1)[:700],
        "dup.jpg": jpeg(1003),
        "rate.wav": wav(0.5, 5, 8000),
        "leak.wav": wav(0.3, 77),
        "leak.jpg": jpeg(1004),
    }.items():
        put(tmp_path / name, content)
    soundfile.write(tmp_path / "nan.wav", nan, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "zero.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 16_000)
    soundfile.write(
        tmp_path / "stereo.wav", np.stack([0.1 * np.sin(np.arange(8000))] * 2, 1), 16_000
    )
    Image.new("RGB", (8, 9)).save(tmp_path / "tiny.png")
    Image.open(tmp_path / "good5.jpg").save(tmp_path / "again.png")
    for k, audio in enumerate(
        ("cut", "text", "none", "short", "long", "dup", "rate", "nan", "zero", "silence", "stereo")
    ):
        odd(f"good{k}.jpg", f"{audio}.wav", image_id=f"g{k}")
    odd("gone.jpg", "good1.wav")
    odd("cut.jpg", "good2.wav")
    odd("dup.jpg", "good4.wav")
    odd("again.png", "good6.wav")
    odd("tiny.png", "good7.wav")
    odd("good8.jpg", "good8.wav", image_id="another")
    odd("leak.jpg", "leak.wav", split="validation")
    put(tmp_path / "leak2.jpg", jpeg(1004))
    put(tmp_path / "leak2.wav", wav(0.3, 78))
    odd("leak2.jpg", "leak2.wav", split="test")
    return manifest(tmp_path, [*rows, "{not json"])


def test_each_oddity_of_a_manifest_is_named(oddities):
    names = found(check_data(oddities, progress=False))
    expected = {
        "missing file": {"gone.jpg"},
        "unreadable": {"text.wav"},
        "truncated": {"cut.wav", "cut.jpg"},
        "zero length": {"zero.wav", "none.wav"},
        "too short": {"short.wav"},
        "not numbers": {"nan.wav"},
        "unreadable line": {"manifest.jsonl:60"},
        "two image ids": {"good8.jpg"},
        "split leak": {"leak.jpg", "leak2.jpg"},
        "silence": {"silence.wav"},
        "over-long": {"long.wav"},
        "duplicate image": {"dup.jpg", "again.png"},
        "other sample rate": {"rate.wav"},
        "stereo": {"stereo.wav"},
        "tiny image": {"tiny.png"},
        "one color": {"tiny.png"},
    }
    assert names.pop("number of captions") == {
        f"good{k}.jpg" for k in range(11)
    }  # most images have one
    again = names.pop("duplicate recording")
    assert "dup.wav" in again and names == expected
    assert set(names) <= set(KINDS)


def test_fix_writes_a_manifest_that_passes_and_trains(oddities, capsys):
    folder = Path(oddities).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (
        main(
            [
                "data",
                "check",
                oddities,
                "--fix",
                str(folder / "clean.jsonl"),
                "--output",
                str(folder / "out"),
            ]
        )
        == 3
    )
    clean = str(folder / "clean.jsonl")
    assert {name: (folder / name).read_bytes() for name in before} == before
    rows = [json.loads(line) for line in open(clean)]
    assert all(not Path(row["image"]).is_absolute() and row["seconds"] > 0 for row in rows)
    report = check_data(clean, progress=False)
    assert report.severity == "warning" and set(report.counts()) == {
        "silence",
        "duplicate recording",
        "other sample rate",
        "stereo",
        "tiny image",
        "one color",
        "repeated image",
        "number of captions",
    }
    ids = {row["image"]: row["image_id"] for row in rows}
    assert ids["dup.jpg"] == "g3" and ids["again.png"] == "g5"
    assert [row["image"] for row in rows if row["split"] != "train"] == ["leak2.jpg"]
    assert "good4.jpg" not in {row["image"] for row in rows}  # the same image, in train
    assert len(load_pairs(clean, "train")) == len(rows) - 1

    page = (folder / "out" / "check.html").read_text()
    for part in (
        "Data check",
        "silence.wav",
        "<audio controls",
        "data:image/png;base64",
        "histogram",
        "unreadable line",
    ):
        assert part in page
    told = json.loads((folder / "out" / "check.json").read_text())
    assert told["severity"] == "error" and len(told["findings"]) == sum(told["counts"].values())
    assert "errors found" in capsys.readouterr().out

    assert main(["data", "check", oddities, "--fix", clean]) == 2  # nothing is overwritten
    assert "exists" in capsys.readouterr().err


def test_exit_codes_follow_the_severity(tmp_path):
    for k in range(3):
        put(tmp_path / f"{k}.jpg", jpeg(50 + k))
        put(tmp_path / f"{k}.wav", wav(0.5, 50 + k))
    rows = [{"image": f"{k}.jpg", "audio": f"{k}.wav", "split": "train"} for k in range(3)]
    assert main(["data", "check", manifest(tmp_path, rows)]) == 0
    assert main(["data", "check", manifest(tmp_path, rows), "--max-seconds=0.4"]) == 1
    assert (
        main(["data", "check", manifest(tmp_path, [*rows, {**rows[0], "audio": "gone.wav"}])]) == 3
    )
    assert main(["data", "check", str(tmp_path / "nothing.jsonl")]) == 2


def test_a_prepared_manifest_loads_by_its_directory_and_is_checked(oddities, tmp_path):
    data_dir = str(tmp_path / "tfds")
    with pytest.raises(UserError, match="not JSON"):
        prepare(oddities, data_dir=data_dir, progress=False)
    write_clean_manifest(check_data(oddities, progress=False), tmp_path / "set" / "manifest.jsonl")
    ready = prepare(str(tmp_path / "set"), data_dir=data_dir, progress=False)
    assert (
        "/set/" in ready
        and prepare(str(tmp_path / "set"), data_dir=data_dir, progress=False) == ready
    )
    prepared, listed = (
        load_pairs(ready, "train"),
        load_pairs(str(tmp_path / "set" / "manifest.jsonl"), "train"),
    )
    assert (
        is_data_set(ready)
        and is_data_set("spoken_scenes/tiny")
        and not is_data_set(str(tmp_path / "set"))
    )
    assert len(prepared) == len(listed) and prepared.num_images == listed.num_images
    assert len(set(prepared.image_ids)) == len(set(listed.image_ids)) < prepared.num_images
    report = check_data(ready, progress=False)
    assert report.severity == "warning" and report.splits["train"]["usable"] == len(prepared)
    with pytest.raises(UserError, match="is prepared: fix the folder or manifest"):
        write_clean_manifest(report, tmp_path / "no.jsonl")


def test_the_dry_run_tells_what_is_missing_and_writes_nothing(tmp_path, capsys):
    told = dry_run("spoken_coco")
    for part in (
        "missing  listing",
        "SpokenCOCO.tar.gz (64 GB)",
        "train2014.zip (13.5 GB)",
        "84.1 GB",
        "--download",
    ):
        assert part in told
    told = dry_run("places_audio")
    assert "size not stated" in told and "--download" not in told and "85 GB to fetch" in told
    flickr8k_audio(tmp_path / "flickr")
    before = sorted(tmp_path.rglob("*"))
    assert (
        main(
            [
                "data",
                "prepare",
                "flickr8k_audio",
                "--dry-run",
                "--manual-dir",
                str(tmp_path / "flickr"),
                "--data-dir",
                str(tmp_path / "tfds"),
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "train: 8 images, 40 recordings" in told and "1 listed files are missing" in told
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="give one of flickr8k_audio"):
        dry_run("nonsense")
    with pytest.raises(UserError, match="no configuration 'nonsense'; it has"):
        dry_run("spoken_scenes/nonsense")


def test_the_command_prepares(tmp_path, capsys):
    folder, data_dir = flickr8k_audio(tmp_path / "flickr"), str(tmp_path / "tfds")
    command = [
        "data",
        "prepare",
        "flickr8k_audio",
        "--manual-dir",
        str(folder),
        "--data-dir",
        data_dir,
    ]
    assert main(command) == 2
    assert "2 of 48 items cannot be used" in capsys.readouterr().err
    assert main([*command, "--max-bad-share=0.1"]) == 0
    assert "use it with --config.data.name=flickr8k_audio" in capsys.readouterr().out
    assert len(load_pairs("flickr8k_audio", "test", data_dir)) == 15
    assert (
        main(["data", "check", "flickr8k_audio", "--data-dir", data_dir]) == 1
    )  # warnings: duplicate, long, counts
    assert "left out" in capsys.readouterr().out


def left_out_by_reading(path, split):
    """Names of what evaluation and an epoch of training leave out, and the recordings in use."""
    source = load_pairs(path, split, max_bad_share=1.0)
    options = {"batch_size": 4, "threads": 0}
    speech, images = np.zeros(len(source), bool), np.zeros(source.num_images, bool)
    for batch in speech_batches(source, seconds_max=1.0, **options):
        speech[batch["index"][batch["valid"]]] = True
    for batch in image_batches(source, image_size=16, **options):
        images[batch["index"][batch["valid"]]] = True
    used = np.flatnonzero(speech & images[source.image_index])
    evaluation = set(source.bad_items.reasons)
    if split == "train":
        source = load_pairs(path, split, max_bad_share=1.0)
        training = BatchOptions(image_size=16, bucket_seconds=(1.0,), seed=0, **options)
        for _, batch in itertools.islice(train_batches(source, training), 2 * len(source)):
            assert set(batch["image_id"]) <= set(source.image_ids[source.image_index[used]])
        assert set(source.bad_items.reasons) == evaluation
    return evaluation, [source.recording_name(int(index)) for index in used]


def test_what_the_check_lists_as_left_out_is_what_training_and_evaluation_leave_out(oddities):
    report = check_data(oddities, progress=False)
    for split, source in report.sources.items():
        names = set(report.not_listed) if split == "train" else set(source.bad_items.reasons)
        for finding in report.findings:
            if finding.split == split and "left out" in KINDS[finding.kind][1]:
                names.add(finding.name)
        usable = [k for k in range(len(source)) if k not in report.left_out[split]]
        left_out, used = left_out_by_reading(oddities, split)
        assert names == left_out and len(used) == report.splits[split]["usable"]
        assert used == [source.recording_name(k) for k in usable]
    listed = sum(len(source) for source in report.sources.values()) + len(report.not_listed)
    assert listed == len(open(oddities).readlines())
    assert "8 of 58 recordings are left out; 2 lines or items were left out" in report.text()


def test_fix_says_what_it_drops(oddities, capsys):
    clean = str(Path(oddities).parent / "clean.jsonl")
    main(["data", "check", oddities, "--fix", clean])
    told = capsys.readouterr().out
    written = len(open(clean).readlines())
    assert f"{written} pairs written: {clean}\n  left out: 2 lines that cannot be used" in told
    counts = [int(line.split()[2]) for line in told.splitlines() if line.startswith("  left out: ")]
    assert written + sum(counts) == len(open(oddities).readlines())


def test_the_listing_s_oddities_are_in_the_report(tmp_path):
    rows = []
    for k in range(5):
        put(tmp_path / f"{k}.jpg", jpeg(50 + k))
        put(tmp_path / f"{k}.wav", wav(0.5, 50 + k))
        rows.append({"image": f"{k}.jpg", "audio": f"{k}.wav", "split": "train", "image_id": "x"})
    rows[0] |= {"image": "./0.jpg", "speaker": "nan", "seconds": 2.5}
    rows.append(rows[0] | {"image": "0.jpg"})
    rows[3] |= {"split": "Train", "Caption": "a", "length": 3}
    report = check_data(manifest(tmp_path, rows), progress=False)
    names = {kind: report.counts()[kind] for kind in report.counts()}
    assert names == {
        "shared image_id": 1,
        "missing value": 1,
        "misspelled column": 1,
        "splits alike": 1,
        "other length": 2,
        "duplicate recording": 1,
        "number of captions": 1,
        "ignored column": 1,
        "other spelling": 1,
        "image_id in two splits": 1,
    }
    assert report.severity == "warning" and report.splits["train"]["images"] == 4


@pytest.fixture
def run(tmp_path):
    """A function that saves the configuration of a run with options."""

    def save(*overrides):
        given = [f"--config.data.{word}" for word in overrides if "batch" not in word]
        given += [f"--config.{word}" for word in overrides if "batch" in word]
        save_config(load_config("spoken_scenes", given), tmp_path / "run")
        return f"--workdir={tmp_path}/run"

    return save


def test_a_set_is_judged_with_the_limits_of_a_run(tmp_path, run, capsys):
    rows = []
    for k in range(6):
        put(tmp_path / f"{k}.jpg", jpeg(50 + k))
        put(tmp_path / f"{k}.wav", wav(0.4 + 0.1 * k, 50 + k))
        split = ("train", "train", "train", "train", "dev", "extra")[k]
        rows.append({"image": f"{k}.jpg", "audio": f"{k}.wav", "split": split})
    put(tmp_path / "3.wav", b"damaged")
    path = manifest(tmp_path, rows)

    def found_with(*overrides):
        output = tmp_path / "out"
        status = main(["data", "check", path, run(*overrides), f"--output={output}"])
        assert status == 3, capsys.readouterr().err
        report = json.loads((output / "check.json").read_text())
        return {
            (finding["kind"], Path(finding["name"]).name): finding["detail"]
            for finding in report["findings"]
            if finding["kind"] not in ("unreadable", "other spelling")
        }

    # Images are 60 x 45.
    wide = found_with(
        "validation_split=dev", "test_split=extra", "max_seconds=9", "bucket_seconds=9",
        "image_size=32", "batch_size=4", "max_bad_share=0.3",
    )  # fmt: skip
    assert wide == {}
    tight = found_with(
        "validation_split=dev", "max_seconds=0.75", "bucket_seconds=0.55",
        "image_size=48", "batch_size=5", "max_bad_share=0.1",
    )  # fmt: skip
    assert tight.pop(("over-long", "2.wav")) == "0.6 s, over 0.55 s"
    assert tight.pop(("over-long", "4.wav")) == "0.8 s, over 0.75 s"
    assert tight.pop(("over-long", "5.wav")) == "0.9 s, over 0.75 s"
    assert tight.pop(("missing split", "test")) == "there are train, dev, extra"
    assert tight.pop(("unused split", "extra")) == "1 recordings"
    assert tight.pop(("too many left out", "train")) == "1 of 4; 0 are allowed"
    assert tight.pop(("too few recordings", "train")) == "4; a batch has 5"
    assert {kind for kind, _ in tight} == {"enlarged image"} and len(tight) == 6


def test_a_cache_that_lacks_items_is_named(tmp_path, run, capsys):
    rows = []
    for k in range(3):
        put(tmp_path / f"{k}.jpg", jpeg(50 + k))
        put(tmp_path / f"{k}.wav", wav(0.5, 50 + k))
        rows.append({"image": f"{k}.jpg", "audio": f"{k}.wav", "split": "train"})
    path = manifest(tmp_path, rows)
    source = load_pairs(path, "train")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "card.json").write_text('{"samples_per_token": 320}')
    tokens = [(f"{k}.wav", np.ones((2, 3))) for k in range(2)]
    records = {f"{k}.wav": source.stamp("speech", k).record() for k in range(2)}
    write_shard(tmp_path / "cache", "train-speech-00000", tokens, (3,), records)
    put(tmp_path / "1.wav", wav(0.5, 99))
    limits = RunLimits(DataConfig(path, speech_features=str(tmp_path / "cache")), 1)
    report = check_data(path, run=limits, progress=False)
    assert found(report)["no features"] == {"1.wav", "2.wav"} and report.left_out["train"] == {1, 2}
    with pytest.raises(SystemExit):
        main(["data", "check", path, "--workdir=run", "--max-seconds=3"])
    assert main(["data", "check", path, f"--workdir={tmp_path}/nowhere"]) == 2
    assert "no training run" in capsys.readouterr().err
