"""A bad line costs itself alone; one file is one item however its name is spelled; what names
nothing is no identity."""

import csv
import itertools
import json
import os
import unicodedata

import numpy as np
import pytest
import soundfile
from PIL import Image

from c2f_jax.data.listing import read_listing
from c2f_jax.data.manifest import load_manifest
from c2f_jax.errors import UserError
from c2f_jax.main import main

GOOD = "a.png,a.wav,test,fine\n"
HEADER = "image,audio,split,caption\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two pairs; the working directory is their folder."""
    for color, name in enumerate("ab"):
        Image.new("RGB", (8, 8), (color * 200, 0, 0)).save(tmp_path / f"{name}.png")
        soundfile.write(tmp_path / f"{name}.wav", np.full(1600 + color, 0.1), 16_000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(rows, name="m.jsonl"):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def pair(name="a", **more):
    return {"image": f"{name}.png", "audio": f"{name}.wav", "split": "test", **more}


def read(content, name="m.csv"):
    if isinstance(content, str):
        content = content.encode()
    with open(name, "wb") as file:
        file.write(content)
    return read_listing(name, strict=False)


def places(listing):
    return [note.name for note in listing.notes if note.kind == "unreadable line"]


@pytest.mark.parametrize(
    "bad",
    [
        'b.png,b.wav,test,"a "big" one"\n',
        'b.png,b.wav,test,"never closed\n',
        'b.png,"b.wav,test,never closed either\n',
        'b.png,b.wav,test,"closed" later"\n',
        "b.png,b.wav,test\n",
        "b.png,b.wav,test,one, two\n",
        "b.png,,test,no audio\n",
        "b.png,b\0.wav,test,zero\n",
        "b.png,b.wav,test,caf\udce9\n",
        "b.png,b.wav,test,\udcff\udcfe\n",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_bad_line_of_a_csv_costs_itself_alone(folder, bad, end):
    text = (HEADER + GOOD + bad + GOOD * 5).replace("\n", end)
    listing = read(text.encode("utf-8", "surrogateescape"))
    assert len(listing.rows) == 6 and places(listing) == ["m.csv:3"]
    assert list(listing.left_out) == ["m.csv:3"]
    with pytest.raises(UserError, match="m.csv:3: "):
        read_listing("m.csv")


def test_quoted_lines_are_read_and_those_that_swallow_rows_are_not(folder):
    text = HEADER + 'a.png,a.wav,test,"two\nlines, with ""quotes"""\n' + GOOD
    assert [row["caption"] for row in read(text).rows] == ['two\nlines, with "quotes"', "fine"]
    # A quote of line 2 is closed by one of line 4: line 3 would be lost without a word.
    text = HEADER + 'a.png,a.wav,test,"open\n' + GOOD + 'b.png,b.wav,test,close"\n' + GOOD
    listing = read(text)
    assert places(listing) == ["m.csv:2"]
    assert [row["caption"] for row in listing.rows] == ["fine", 'close"', "fine"]


@pytest.mark.parametrize("columns", itertools.permutations(("image", "audio", "split", "caption")))
@pytest.mark.parametrize(
    "caption", ["a dog\nruns 1", "a dog,\n\nruns, fast", 'a "dog"\nruns, 1, 2']
)
def test_captions_of_several_lines_in_any_column(folder, columns, caption):
    rows = [pair(caption=text) for text in ("fine", caption, caption, "fine")]
    with open("m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    listing = read_listing("m.csv")
    assert [row["caption"] for row in listing.rows] == ["fine", caption, caption, "fine"]


def test_a_row_that_is_swallowed_from_the_first_column_on(folder):
    """Quotes that are opened in line 3 and closed in line 4, each before a whole row."""
    good = "fine,a.png,a.wav,test\n"
    text = (
        "caption,image,audio,split\n" + good + '"open,b.png,b.wav,test\nclose",a.png,a.wav,test\n'
    )
    listing = read(text + good)
    assert places(listing) == ["m.csv:3"]
    assert [row["caption"] for row in listing.rows] == ["fine", 'close"', "fine"]


@pytest.mark.parametrize("url", ["file:///data/a.png", "https://example.org/a.png", "HTTP://a.png"])
def test_a_url_is_told_to_be_one(folder, url):
    listing = read_listing(jsonl([pair(), pair(image=url)]), strict=False)
    (reason,) = listing.left_out_of("test").values()
    assert "is a URL of" in reason and url in reason and len(listing.rows) == 1
    with pytest.raises(UserError, match="is a URL of https"):
        read_listing("https://example.org/m.jsonl")
    assert main(["data", "check", "https://example.org/data"]) == 2


def test_a_split_with_characters_that_are_not_seen_is_like_the_one_without(folder):
    rows = [pair(), pair(), pair("b", split="\u200btest"), pair("b", split="te\u00adst")]
    notes = [note.detail for note in read_listing(jsonl(rows)).notes if note.kind == "splits alike"]
    assert len(notes) == 2 and r"'\u200btest', which is not 'test'" in notes[0]


@pytest.mark.parametrize(
    "bad",
    [
        b'{"image": "b.png", "audio": \n',
        b'{"image": "b.png", "audio": "b.wav", "split": "test"} {}\n',
        b'{"image": "b.png", "audio": "b.wav", "split": "test", "caption": "caf\xe9"}\n',
        b'{"image": "b.png", "image": "a.png", "audio": "b.wav", "split": "test"}\n',
        b'{"image": "b\\u0000.png", "audio": "b.wav", "split": "test"}\n',
        b'{"image": "b.png", "audio": "b.wav", "split": "test", "image_id": [1]}\n',
        b'{"image": "b.png", "audio": "b.wav", "split": "test", "image_id": true}\n',
        b'{"image": "b.png", "audio": "b.wav", "split": "test", "image_id": 1e300}\n',
        b'{"image": NaN, "audio": "b.wav", "split": "test"}\n',
        b"\0\0\0\0\n",
    ],
)
def test_a_bad_line_of_jsonl_costs_itself_alone(folder, bad):
    good = json.dumps(pair()).encode() + b"\n"
    listing = read(good + bad + good * 30, "m.jsonl")
    assert len(listing.rows) == 31 and places(listing) == ["m.jsonl:2"]


def test_bad_lines_are_counted_and_limited_as_bad_items_are(folder):
    """Those of a known split count in it alone."""
    rows = [pair()] * 150 + [pair("b", seconds="long")] + [pair(split="train")] * 150
    path = jsonl(rows)
    source = load_manifest(path, "test")
    assert len(source) == 150
    assert list(source.bad_items.reasons) == ["m.jsonl:151"] and source.bad_items.total == 151
    assert "above 0, not 'long'" in source.bad_items.reasons["m.jsonl:151"]
    assert not load_manifest(path, "train").bad_items.reasons
    with open(path, "a") as file:
        file.write("{\n{\n")
    with pytest.raises(UserError, match="3 of 153 items cannot be used"):
        load_manifest(path, "test")
    assert len(load_manifest(path, "test", max_bad_share=0.02)) == 150


@pytest.mark.parametrize(
    "content, reason",
    [
        (HEADER.encode("utf-16"), "m.csv: UTF-16"),
        ((HEADER + GOOD).encode("utf-16-le"), "m.csv: UTF-16"),
        (HEADER.encode("utf-32"), "m.csv: UTF-16 or UTF-32"),
        (HEADER.replace(",", ";"), "semicolons separate its columns"),
        (HEADER.replace(",", "\t"), "tabs separate its columns"),
        (HEADER.replace(",", ", "), "write 'audio' for ' audio'"),
        (HEADER.title(), "write 'image' for 'Image'"),
        ("image,image,audio,split\n", "2 columns 'image'"),
        ('{"image": "a.png", "audio": "a.wav", "split": "test"}\n', "ends in .jsonl"),
        ('"image,audio,split\n', "the header is not CSV"),
        ("", "the header has nothing"),
    ],
)
def test_a_csv_that_is_none_is_said_to_be_what_it_is(folder, content, reason):
    with pytest.raises(UserError, match=reason):
        read(content)


@pytest.mark.parametrize(
    "content, reason",
    [
        (json.dumps([pair(), pair("b")]), "one JSON array"),
        (json.dumps([pair(), pair("b")], indent=1), "one JSON array"),
        (HEADER + GOOD, "ends in .csv"),
        ('"split","audio","image"\n', "ends in .csv"),
        (json.dumps(pair()).encode("utf-16"), "UTF-16"),
    ],
)
def test_jsonl_that_is_none_is_said_to_be_what_it_is(folder, content, reason):
    with pytest.raises(UserError, match=reason):
        read(content, "m.jsonl")


def test_byte_order_marks_and_headers_of_joined_files(folder):
    part = ("\ufeff" + HEADER + GOOD).encode()
    listing = read(part * 3)
    assert len(listing.rows) == 3 and not listing.notes
    assert len(read(("\ufeff" + json.dumps(pair()) + "\r\n") * 3, "m.jsonl").rows) == 3


def notes(listing):
    return {note.kind: note.detail for note in listing.notes}


def test_columns_and_splits_that_are_nearly_right_are_named(folder, caplog):
    path = jsonl([pair(Speaker="x", colour="red"), pair("b", split="Test"), pair("b")])
    found = notes(read_listing(path))
    assert "write 'speaker'" in found["misspelled column"]
    assert "'colour'" in found["ignored column"]
    assert "1 rows of the split 'Test', which is not 'test'" in found["splits alike"]
    assert len(load_manifest(path, "test")) == 2
    assert "'Speaker' is not read" in caplog.text and "'Test'" in caplog.text
    assert "colour" not in caplog.text


NOTHING = [float("nan"), None, "", "nan", "None", "null", "NaN", "<NA>", "N/A"]


@pytest.mark.parametrize("value", NOTHING)
def test_what_names_nothing_is_no_identity(folder, value):
    path = jsonl(
        [pair("a", image_id=value, speaker=value, seconds=value), pair("b", image_id=value)]
    )
    source = load_manifest(path, "test")
    assert source.image_ids.tolist() == [0, 1] and source.recording(0)["speaker"] == ""
    assert source.num_samples.tolist() == [-1, -1] and source.image_id(1) == "b.png"
    written = value in ("", None) or isinstance(value, float)
    assert ("missing value" in notes(read_listing(path))) != written


@pytest.mark.parametrize("value", ["nan", "None", "NULL"])
def test_the_same_in_a_csv_with_a_warning(folder, value, caplog):
    rows = "".join(f"{name}.png,{name}.wav,test,{value}\n" for name in "abab")
    with open("m.csv", "w") as file:
        file.write("image,audio,split,image_id\n" + rows)
    assert load_manifest("m.csv", "test").image_ids.tolist() == [0, 1]
    assert f"image_id '{value}' of 4 rows is read as missing" in caplog.text


def test_one_identity_for_nearly_all_images_is_a_warning(folder, caplog):
    path = jsonl([pair("a", image_id="x"), pair("b", image_id="x")])
    assert load_manifest(path, "test").image_ids.tolist() == [0, 0]
    assert "2 of 2 images have the image_id 'x'" in caplog.text


def test_a_number_is_one_identity_however_it_is_written(folder):
    for name in ("c", "d"):
        os.link("a.wav", f"{name}.wav")
        Image.new("RGB", (8, 8), "green").save(f"{name}.png")
    ids = {"a": 1, "b": "1", "c": 1.0, "d": " 1.0 "}
    source = load_manifest(jsonl([pair(n, image_id=i, speaker=i) for n, i in ids.items()]), "test")
    assert source.image_ids.tolist() == [0] * 4 and source.recording(3)["speaker"] == "1"
    ids = {"a": 1, "b": "01", "c": 1.5, "d": -1}
    source = load_manifest(jsonl([pair(n, image_id=i) for n, i in ids.items()]), "test")
    assert source.image_ids.tolist() == [0, 1, 2, 3]
    ids = {"a": "caf\u00e9", "b": "cafe\u0301", "c": "cafe", "d": "Caf\u00e9"}
    source = load_manifest(jsonl([pair(n, image_id=i) for n, i in ids.items()]), "test")
    assert source.image_ids.tolist() == [0, 0, 1, 2]


def spellings(folder):
    """Ways to write a.png, each of which the disk has."""
    (folder / "x").mkdir()
    os.symlink("a.png", "soft.png")
    os.link("a.png", "hard.png")
    os.symlink(".", "here")
    return [
        "a.png",
        "./a.png",
        "x/../a.png",
        ".//a.png",
        ".\\a.png",
        "x\\..\\a.png",
        " a.png",
        str(folder / "a.png"),
        "soft.png",
        "hard.png",
        "here/a.png",
    ]


def test_one_picture_however_its_name_is_spelled(folder):
    rows = [pair("a", image=name) for name in spellings(folder)] + [pair("b")]
    source = load_manifest(jsonl(rows), "test")
    assert source.num_images == 2 and source.image_ids.tolist() == [0, 1]
    assert source.image_index.tolist() == [0] * 11 + [1]
    assert not source.bad_items.reasons
    listing = read_listing("m.jsonl")
    listing.resolve()
    assert len([note for note in listing.notes if note.kind == "other spelling"]) == 10


def test_the_other_unicode_form_of_a_name_is_found(folder):
    composed, split_up = (
        unicodedata.normalize(form, "caf\u00e9 \u00fc.png") for form in ("NFC", "NFD")
    )
    os.rename("a.png", composed)
    os.rename("b.png", "x" + split_up)
    names = [composed, split_up, "x" + composed, "x" + split_up]
    source = load_manifest(jsonl([pair(image=name) for name in names]), "test")
    assert source.image_index.tolist() == [0, 0, 1, 1] and not source.bad_items.reasons


def test_an_image_without_an_id_has_that_of_its_other_rows(folder):
    rows = [pair(), pair(image="./a.png", image_id="x"), pair("b", image_id=float("nan"))]
    source = load_manifest(jsonl(rows), "test")
    assert [source.image_id(row) for row in range(2)] == ["x", "b.png"]
    rows = [pair(image_id="x")] * 200 + [pair(image="./a.png", image_id="y")]
    source = load_manifest(jsonl(rows), "test")
    assert (
        len(source) == 200 and "'y' here and 'x' before" in source.bad_items.reasons["m.jsonl:201"]
    )


def test_files_of_different_folders_stay_different(folder):
    """A link to a folder: x/../a.png is another file than a.png."""
    (folder / "far" / "away").mkdir(parents=True)
    os.symlink("far/away", "x")
    Image.new("RGB", (8, 8), "blue").save("far/a.png")
    source = load_manifest(jsonl([pair(), pair(image="x/../a.png")]), "test")
    assert source.num_images == 2 and source.image_ids.tolist() == [0, 1]
    assert len({source.image_key(0), source.image_key(1)}) == 2


def test_a_data_set_is_known_by_its_content(folder):
    def identity(rows):
        return load_manifest(jsonl(rows), "test").identity()

    (folder / "x").mkdir()
    first = identity([pair(), pair("b")])
    assert identity([pair(image="./a.png", caption="new"), pair("b", audio="x/../b.wav")]) == first
    assert identity([pair("b"), pair()]) != first
    assert identity([pair(), pair("b", image_id="a.png")]) != first
    # Another recording of equal length and time.
    about = os.stat("b.wav")
    soundfile.write("b.wav", np.full(1601, 0.2), 16_000)
    os.utime("b.wav", ns=(about.st_atime_ns, about.st_mtime_ns))
    changed = identity([pair(), pair("b")])
    assert changed != first and {**changed, "content": ""} == {**first, "content": ""}
    os.utime("b.wav")  # touched, and moved
    os.mkdir("moved")
    for name in ("a.png", "a.wav", "b.png", "b.wav"):
        os.rename(name, f"moved/{name}")
    os.chdir("moved")
    assert identity([pair(), pair("b")]) == changed


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("seed", range(100))
def test_damage_to_one_line_spares_all_others(folder, kind, seed):
    """Bytes of a line replaced, inserted or removed, its line end kept."""
    rng = np.random.default_rng(seed)
    captions = ['""', "fine", '"a, b"', '"say ""hi"""', '"two, ""three"""', ""]
    lines = []
    for number in range(30):
        caption = captions[rng.integers(len(captions))]
        if kind == "csv":
            lines.append(f"{number}.png,{number}.wav,test,{caption}".encode())
        else:
            lines.append(json.dumps(pair(str(number), caption=caption)).encode())
    hit = int(rng.integers(30))
    damaged = bytearray(lines[hit])
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(damaged)))
        byte = rng.choice(list(b'",\\\0\xe9\xff{}[]: x'))
        damaged[place : place + int(rng.integers(2))] = bytes([byte] * int(rng.integers(1, 3)))
    lines[hit] = bytes(damaged)
    header = HEADER.encode() if kind == "csv" else b""
    listing = read(header + b"\n".join(lines) + b"\n", f"m.{kind}")

    found = [
        row["audio"]
        for row in listing.rows
        if row["where"] != f"m.{kind}:{hit + 1 + (kind == 'csv')}"
    ]
    assert found == [f"{number}.wav" for number in range(30) if number != hit]
    assert len(listing.rows) + len(listing.left_out) == 30
