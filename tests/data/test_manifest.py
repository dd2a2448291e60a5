"""Anyone's own data: reading JSONL and CSV manifests, and what is said when they are wrong."""

import csv
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from c2f_jax.data.source import BadItems
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.errors import UserError


@pytest.fixture
def files(tmp_path):
    """Three recordings and two images, one of them with a space and another alphabet in its
    name."""
    for k in range(3):
        soundfile.write(tmp_path / f"{k}.wav", np.full(1600 * (k + 1), 0.1), 16_000)
    for name in ("frog.png", "жаба 2.png"):
        Image.new("RGB", (8, 8), "green").save(tmp_path / name)
    return tmp_path


ROWS = [
    {
        "image": "frog.png",
        "audio": "0.wav",
        "split": "train",
        "caption": 'Жаба, "зелена"',
        "speaker": "a",
        "seconds": 0.1,
    },
    {
        "image": "жаба 2.png",
        "audio": "1.wav",
        "split": "train",
        "caption": "蛙",
        "speaker": "b",
        "seconds": 0.2,
    },
    {
        "image": "frog.png",
        "audio": "2.wav",
        "split": "train",
        "caption": "ضفدع",
        "speaker": "a",
        "seconds": 0.3,
    },
    {
        "image": "frog.png",
        "audio": "0.wav",
        "split": "test",
        "caption": "",
        "speaker": "",
        "seconds": 0.1,
    },
]


def write(folder, rows, kind="jsonl", encoding="utf-8"):
    path = folder / f"manifest.{kind}"
    with open(path, "w", encoding=encoding, newline="") as file:
        if kind == "jsonl":
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        else:
            columns = list({column: None for row in rows for column in row})
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)
    return str(path)


def without(rows, *columns):
    return [{k: v for k, v in row.items() if k not in columns} for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_manifest_is_read(files, kind, encoding):
    pairs = load_pairs(write(files, ROWS, kind, encoding), "train")
    assert len(pairs) == 3 and pairs.num_images == 2
    np.testing.assert_array_equal(pairs.image_index, [0, 1, 0])
    np.testing.assert_array_equal(pairs.image_ids, [0, 1])
    np.testing.assert_array_equal(pairs.num_samples, [1600, 3200, 4800])
    assert pairs.image_index.dtype == pairs.image_ids.dtype == pairs.num_samples.dtype == np.int32
    assert pairs.recording(0) == {
        "audio": f"{files}/0.wav",
        "caption": 'Жаба, "зелена"',
        "speaker": "a",
    }
    assert pairs.image(1) == f"{files}/жаба 2.png" and pairs.image_id(1).endswith("жаба 2.png")
    assert pairs.split == "train" and not pairs.bad_items.reasons


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_optional_columns_may_be_absent(files, kind):
    pairs = load_pairs(write(files, without(ROWS, "caption", "speaker", "seconds"), kind), "train")
    np.testing.assert_array_equal(pairs.num_samples, [-1, -1, -1])
    assert pairs.recording(2)["caption"] == "" and pairs.recording(2)["speaker"] == ""


def test_equal_image_ids_join_different_images(files):
    rows = [{**row, "image_id": 7} for row in ROWS]
    pairs = load_pairs(write(files, rows), "train")
    assert pairs.num_images == 2
    np.testing.assert_array_equal(
        pairs.image_index, [0, 1, 0]
    )  # each recording keeps its own image
    np.testing.assert_array_equal(pairs.image_ids, [0, 0])
    assert pairs.image_id(0) == pairs.image_id(1) == "7"


def test_absolute_paths_and_a_manifest_in_the_working_directory(files, monkeypatch):
    rows = [{**ROWS[0], "image": str(files / "frog.png")}, ROWS[1]]
    write(files, rows)
    monkeypatch.chdir(files)
    pairs = load_pairs("manifest.jsonl", "train")
    assert pairs.image(0) == str(files / "frog.png") and pairs.recording(1)["audio"] == "1.wav"


def error_of(path, split="train", **options):
    with pytest.raises(UserError) as caught:
        load_pairs(path, split, **options)
    return str(caught.value)


def test_unknown_split_lists_those_present(files):
    message = error_of(write(files, ROWS), "dev")
    assert "'dev'" in message and "train (3)" in message and "test (1)" in message


def test_empty_manifests(files):
    assert "no rows" in error_of(write(files, []))
    assert "no column image, audio, split" in error_of(write(files, [], "csv"))


def test_a_missing_manifest_and_a_wrong_suffix(files):
    assert "nowhere.jsonl: cannot be read" in error_of(str(files / "nowhere.jsonl"))
    assert "ends in .jsonl or .csv" in error_of(str(files / "data.parquet"))


@pytest.mark.parametrize("column", ["image", "audio", "split"])
def test_a_missing_column_is_named(files, column):
    renamed = [{("picture" if k == column else k): v for k, v in row.items()} for row in ROWS]
    message = error_of(write(files, renamed))
    assert f"manifest.jsonl:1: '{column}' is missing" in message and "picture" in message
    message = error_of(write(files, renamed, "csv"))
    assert f"manifest.csv:1: no column {column}" in message and "picture" in message


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"image": "frog.png", "audio": ', "not JSON"),
        ('["frog.png", "0.wav", "train"]', "must be a JSON object"),
        (
            '{"image": "frog.png", "audio": 3, "split": "train"}',
            "'audio' must be a non-empty string, not 3",
        ),
        (
            '{"image": "", "audio": "0.wav", "split": "train"}',
            "'image' must be a non-empty string, not ''",
        ),
        (
            '{"image": "frog.png", "audio": "0.wav", "split": "train", "seconds": "long"}',
            "above 0, not 'long'",
        ),
        (
            '{"image": "frog.png", "audio": "0.wav", "split": "train", "seconds": -1}',
            "above 0, not -1",
        ),
    ],
)
def test_a_wrong_line_is_named_with_its_number(files, line, reason):
    path = write(files, ROWS[:2])
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + line + "\n")  # line 3 is blank, which is fine
    message = error_of(path)
    assert "manifest.jsonl:4: " in message and reason in message


def test_a_csv_row_with_an_unquoted_comma_is_named(files):
    path = write(files, without(ROWS[:1], "caption"), "csv")
    with open(path, "a", encoding="utf-8") as file:
        file.write("frog.png,1.wav,train,a,0.2,more\n")
    assert "manifest.csv:3: " in error_of(path)


def test_text_that_is_not_utf8(files):
    (files / "manifest.csv").write_bytes(
        "image,audio,split\nfrög.png,0.wav,train\n".encode("latin-1")
    )
    assert "not UTF-8" in error_of(str(files / "manifest.csv"))


def test_one_image_with_two_ids_is_an_error(files):
    rows = [{**ROWS[0], "image_id": "x"}, {**ROWS[2], "image_id": "y"}]
    message = error_of(write(files, rows))
    assert "manifest.jsonl:2" in message and "'y' here" in message and "'x' before" in message


def test_any_missing_file_stops_a_small_set(files):
    rows = [*ROWS, {**ROWS[0], "audio": "gone.wav"}]
    message = error_of(write(files, rows))
    assert (
        "1 of 4 items" in message
        and "gone.wav: no such file" in message
        and "manifest.jsonl:5" in message
    )


def test_a_few_missing_files_of_a_large_set_are_left_out_and_named(files):
    rows = [ROWS[k % 3] for k in range(300)]
    rows[7] = {**rows[7], "audio": "gone.wav"}
    rows[8] = {**rows[8], "image": "gone.png"}
    pairs = load_pairs(write(files, rows), "train")
    assert len(pairs) == 298
    assert {name.rpartition("/")[2] for name in pairs.bad_items.reasons} == {"gone.wav", "gone.png"}
    rows[9:12] = [{**row, "audio": f"gone{k}.wav"} for k, row in enumerate(rows[9:12])]
    message = error_of(write(files, rows))
    assert "5 of 300 items" in message and "3 allowed" in message and "gone.wav" in message
    assert len(load_pairs(write(files, rows), "train", max_bad_share=0.02)) == 295


def test_the_allowed_share_holds_while_training_too(files):
    """A source without missing files keeps the share that was asked for."""
    pairs = load_pairs(write(files, [ROWS[k % 3] for k in range(300)]), "train", max_bad_share=0.1)
    assert pairs.bad_items.allowed == 30 and pairs.bad_items.total == 300


def test_bad_items_of_another_split_do_not_matter(files):
    rows = [*ROWS, {**ROWS[0], "audio": "gone.wav", "split": "other"}]
    assert len(load_pairs(write(files, rows), "train")) == 3


@pytest.mark.parametrize(
    "total, share, allowed",
    [
        (99, 0.01, 0),
        (100, 0.01, 1),
        (100, 0.0, 1),
        (1000, 0.01, 10),
        (50, 0.1, 5),
    ],
)
def test_how_many_bad_items_are_allowed(total, share, allowed):
    bad = BadItems("a set", total, share)
    for k in range(allowed):
        bad.add(f"item {k}", "broken")
        bad.add(f"item {k}", "broken, met again")
    assert len(bad) == allowed
    with pytest.raises(UserError, match=f"a set: {allowed + 1} of {total} items"):
        bad.add("one more", "broken")
