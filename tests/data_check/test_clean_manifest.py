"""`c2f data check --fix`: ids of equal images, leaks, outputs that cannot be written, odd names."""

import json
import os
import shutil

import pytest
from helpers.published_sets import jpeg, put, wav

from c2f_jax.data.manifest import load_manifest
from c2f_jax.data_check.check import check_data
from c2f_jax.data_check.clean_manifest import joined_ids, write_clean_manifest
from c2f_jax.main import main


def write_set(folder, rows, copies=()):
    """A manifest of (image, split, image_id); each row has a recording of its own."""
    for name in {image for image, _, _ in rows} - {copy for copy, _ in copies}:
        put(folder / name, jpeg(ord(name[-5])))
    for copy, of in copies:
        shutil.copy(folder / of, folder / copy)
    lines = []
    for number, (image, split, name) in enumerate(rows):
        put(folder / f"{number}.wav", wav(0.3, number))
        row = {"image": image, "audio": f"{number}.wav", "split": split, "image_id": name}
        lines.append(json.dumps(row) + "\n")
    (folder / "m.jsonl").write_text("".join(lines))
    return str(folder / "m.jsonl")


def read(path):
    return [json.loads(line) for line in open(path)]


def test_ids_of_equal_images_are_joined_with_all_their_images(tmp_path, capsys):
    """x is a copy of a, and y of c: A, X, C become one id, since c has X, too. D stays, and so do
    the ids of another split."""
    rows = [
        ("a.jpg", "train", "A"), ("x.jpg", "train", "X"), ("b.jpg", "train", "X"),
        ("c.jpg", "train", "C"), ("y.jpg", "train", "X"), ("d.jpg", "train", "D"),
        ("e.jpg", "test", "X"),
    ]  # fmt: skip
    path = write_set(tmp_path, rows, [("x.jpg", "a.jpg"), ("y.jpg", "c.jpg")])
    clean = str(tmp_path / "clean.jsonl")
    assert main(["data", "check", path, f"--fix={clean}"]) == 1
    assert "image_ids of train joined" in (told := capsys.readouterr().out) and "'X' with " in told
    before, after = (load_manifest(name, "train") for name in (path, clean))
    assert len({*before.image_ids[:3]}) == 2
    assert len({*after.image_ids[:5]}) == 1 and len({*after.image_ids}) == 2
    assert [row["image_id"] for row in read(clean)][-2:] == ["D", "X"]
    assert "duplicate image" not in check_data(clean, progress=False).counts()


def test_an_image_that_is_a_copy_in_one_split_and_a_leak_in_another(tmp_path):
    """By name both times; then two copies in test of one image in train, which match each other."""
    rows = [(name, "train", "") for name in ("a.jpg", "x.jpg", "b.jpg")]
    rows += [(name, "test", "") for name in ("x.jpg", "y.jpg", "c.jpg")]
    path = write_set(tmp_path, rows, [("x.jpg", "a.jpg"), ("y.jpg", "a.jpg")])
    report = check_data(path, progress=False)
    write_clean_manifest(report, tmp_path / "clean.jsonl")
    kept = [(row["image"], row["image_id"]) for row in read(tmp_path / "clean.jsonl")]
    assert kept == [("b.jpg", "b.jpg"), ("x.jpg", "x.jpg"), ("y.jpg", "x.jpg"), ("c.jpg", "c.jpg")]
    assert joined_ids(report, "test") == {"y.jpg": "x.jpg"}


@pytest.mark.parametrize("option", ["--output", "--fix"])
def test_an_output_that_cannot_be_written_is_told_before_anything_is_read(tmp_path, option, capsys):
    path = write_set(tmp_path, [("a.jpg", "train", "")])
    for place in (tmp_path / "a.jpg" / "x.jsonl", "/proc/x.jsonl"):
        assert main(["data", "check", path, f"{option}={place}"]) == 2
        told = capsys.readouterr()
        assert f"{option}={place} cannot be written" in told.err and not told.out
    assert main(["data", "check", path, f"--output={tmp_path}/a.jpg"]) == 2
    assert sorted(os.listdir(tmp_path)) == ["0.wav", "a.jpg", "m.jsonl"]


def test_a_manifest_is_read_in_a_folder_whose_name_is_not_unicode(tmp_path, capsys):
    folder = tmp_path / "caf\udce9" / "data"
    folder.mkdir(parents=True)
    path = write_set(folder, [("a.jpg", "train", ""), ("../b.jpg", "train", "")])
    shutil.move(path, folder / "manifest.jsonl")
    path = str(folder / "manifest.jsonl")
    for data in (path, str(folder)):
        assert main(["data", "check", data, f"--fix={tmp_path}/clean.jsonl"]) == 2
        told = capsys.readouterr()
        assert "give a file in that folder" in told.err and not told.out
    assert main(["data", "check", path, f"--fix={folder}/clean.jsonl", f"--output={folder}"]) == 0
    assert [row["image"] for row in read(folder / "clean.jsonl")] == ["a.jpg", "../b.jpg"]
    told = capsys.readouterr().out
    assert "passed" in told and "\udce9" not in told


def test_names_cannot_move_the_cursor(tmp_path, capsys):
    put(tmp_path / "a.jpg", jpeg(1))
    rows = [{"image": "a.jpg", "audio": f"\x1b[2J\n{k}.wav", "split": "train"} for k in range(2)]
    put(tmp_path / rows[0]["audio"], wav(0.3))
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", f"{tmp_path}/m.jsonl"]) == 3
    told = capsys.readouterr().out
    assert "\ufffd[2J\ufffd1.wav" in told and "\x1b" not in told
    assert main(["data", "check", f"{tmp_path}/\x1b.jsonl"]) == 2
    assert "/\ufffd.jsonl: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "long"])
def test_a_limit_that_is_no_number_is_refused(tmp_path, value, capsys):
    with pytest.raises(SystemExit):
        main(["data", "check", "m.jsonl", f"--max-seconds={value}"])
    assert "is not a finite number" in capsys.readouterr().err
