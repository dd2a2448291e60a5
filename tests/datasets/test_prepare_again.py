"""A prepared set is what its manifest lists: a second manifest, other files or more rows are never
answered with what was there before."""

import io
import json
import os

import numpy as np
import pytest
import soundfile
from helpers.published_sets import flickr8k_audio, wav
from PIL import Image

from c2f_jax.data_check.check import check_data
from c2f_jax.datasets.prepare import dry_run, prepare
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.errors import UserError
from c2f_jax.main import main


def make(folder, color, names="ab", **more):
    """A manifest of as many images of one color as there are names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), color).save(folder / f"{name}.png")
        soundfile.write(folder / f"{name}.wav", np.full(1600 + number, 0.1), 16_000)
        rows.append({"image": f"{name}.png", "audio": f"{name}.wav", "split": "test"} | more)
    return write(folder, rows)


def write(folder, rows):
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def prepared(tmp_path):
    """Prepare a manifest, in a call with more options."""

    def call(manifest, **options):
        return prepare(manifest, data_dir=str(tmp_path / "sets"), progress=False, **options)

    return call


def color_of(ready, row=0):
    return Image.open(io.BytesIO(load_pairs(ready, "test").image(row))).getpixel((0, 0))


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_a_second_manifest_never_gives_the_first_ones_data(tmp_path, prepared):
    one, two = make(tmp_path / "x" / "data", "red"), make(tmp_path / "y" / "data", "blue")
    ready = prepared(one)
    assert "manifest_pairs/data/" in ready and color_of(ready) == RED
    with pytest.raises(
        UserError, match=f"was made from {one}, not from {two}: give another --name"
    ):
        prepared(two)
    other = prepared(two, name="mine")
    assert "manifest_pairs/mine/" in other and color_of(other) == BLUE and color_of(ready) == RED
    assert prepared(one) == ready and prepared(two, name="mine") == other
    source = load_pairs(ready, "test")
    assert source.origin == f"{ready}, prepared from {one}"
    assert source.identity() != load_pairs(other, "test").identity()


@pytest.mark.parametrize(
    "spelling", ["./data/manifest.jsonl", "data/../data/manifest.jsonl", "data"]
)
def test_another_spelling_of_the_manifest_is_no_other_set(
    tmp_path, prepared, monkeypatch, spelling
):
    path = make(tmp_path / "data", "red")
    ready = prepared(path)
    stamp = os.stat(ready + "/dataset_info.json").st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert prepared(spelling) == ready
    assert os.stat(ready + "/dataset_info.json").st_mtime_ns == stamp


def change(folder, what):
    rows = [json.loads(line) for line in open(folder / "manifest.jsonl")]
    if what == "row":
        rows.append(rows[0] | {"audio": "b.wav"})
    elif what == "id":
        rows[1]["image_id"] = "a.png"
    elif what == "caption":
        rows[1]["caption"] = "new"
    elif what == "gone":
        rows = rows[:1]
    elif what == "split":
        rows[1]["split"] = "train"
    elif what == "file":
        Image.new("RGB", (8, 8), "blue").save(folder / "a.png")
    elif what == "file of equal size and time":
        path = folder / "b.wav"
        about = path.stat()
        soundfile.write(path, np.full(1601, 0.2), 16_000)
        assert path.stat().st_size == about.st_size
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    write(folder, rows)


@pytest.mark.parametrize(
    "what", ["row", "id", "caption", "gone", "split", "file", "file of equal size and time"]
)
def test_a_changed_manifest_is_made_anew(tmp_path, prepared, capsys, what):
    path = make(tmp_path / "data", "red")
    ready = prepared(path)
    before = load_pairs(ready, "test").identity()
    change(tmp_path / "data", what)
    assert prepared(path) == ready and "has changed" in capsys.readouterr().out
    assert load_pairs(ready, "test").identity() != before
    if what == "file":
        assert color_of(ready) == BLUE
    prepared(path)
    assert "has changed" not in capsys.readouterr().out


def test_reading_a_set_whose_manifest_has_changed_is_a_warning(tmp_path, prepared, caplog):
    ready = prepared(make(tmp_path / "data", "red"))
    load_pairs(ready, "test")
    assert "has changed" not in caplog.text
    change(tmp_path / "data", "row")
    load_pairs(ready, "test")
    assert "has changed since" in caplog.text and "c2f data prepare" in caplog.text


def test_an_interrupted_preparation_takes_no_shard_of_another_manifest(
    tmp_path, prepared, monkeypatch
):
    """Two folders whose relative paths are equal; the first preparation stops after its shards."""
    from c2f_jax.datasets.builder import ManifestPairs

    for name, color in (("x", "red"), ("y", "blue")):
        make(tmp_path / name / "data", color)
    with monkeypatch.context() as context:
        context.chdir(tmp_path / "x")
        context.setattr(ManifestPairs, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared("data/manifest.jsonl")
    monkeypatch.chdir(tmp_path / "y")
    assert color_of(prepared("data/manifest.jsonl")) == BLUE


def test_bad_lines_are_left_out_counted_and_named(tmp_path, prepared):
    path = make(tmp_path / "data", "red", [f"p{k}" for k in range(40)])
    with open(path, "a") as file:
        file.write('{"image": \n')
    assert f"left out: {path}:41: not JSON" in dry_run(path)
    with pytest.raises(UserError, match="1 of 81 items"):
        prepared(path)
    ready = prepared(path, max_bad_share=0.02)
    source = load_pairs(ready, "test", max_bad_share=0.02)
    assert list(source.bad_items.reasons) == [f"{path}:41"] and source.bad_items.total == 81
    report = check_data(ready, progress=False)
    assert report.severity == "warning"
    assert "1 lines or items were left out before" in report.text()


def test_what_is_left_out_of_a_prepared_set_is_printed(tmp_path, capsys):
    """A line that is cut off, a picture that is gone, and the one line of a split."""
    path = make(tmp_path / "data", "red", [f"p{k}" for k in range(40)])
    (tmp_path / "data" / "p7.png").unlink()
    with open(path, "a") as file:
        file.write('{"image": \n{"image": "p1.png", "split": "validation"}\n')
    sets = f"--data-dir={tmp_path / 'sets'}"
    assert main(["data", "prepare", path, sets, "--max-bad-share=0.2"]) == 0
    told = capsys.readouterr().out
    assert "split test: 3 of 82 items" in told and "prepared; use it" in told
    for part in (f"{path}:41: not JSON", f"{path}:42: 'audio' is missing", "p7.png: "):
        assert part in told


def test_the_names_on_the_command_line(tmp_path, capsys):
    path, sets = make(tmp_path / "my data", "red"), str(tmp_path / "sets")
    assert main(["data", "prepare", path, "--name=mine", "--dry-run"]) == 0
    assert "prepared as mine" in capsys.readouterr().out
    assert main(["data", "prepare", path, f"--data-dir={sets}", "--name=mine"]) == 0
    assert f"--config.data.name={sets}/manifest_pairs/mine/1.0.0" in capsys.readouterr().out
    assert main(["data", "prepare", path, f"--data-dir={sets}"]) == 0
    assert "manifest_pairs/my_data/1.0.0" in capsys.readouterr().out
    other = make(tmp_path / "my-data", "blue")
    assert main(["data", "prepare", other, f"--data-dir={sets}"]) == 2
    assert "give another --name" in capsys.readouterr().err
    os.rename(path, tmp_path / "my data" / "manifest.csv")
    write(tmp_path / "my data", [])
    with pytest.raises(UserError, match="manifest.jsonl and manifest.csv: name one"):
        prepare(str(tmp_path / "my data"), data_dir=sets)


def test_a_published_set_is_made_anew_from_other_downloads(tmp_path, prepared, capsys):
    folder = flickr8k_audio(tmp_path / "flickr")
    options = {"manual_dir": str(folder), "max_bad_share": 0.2}
    prepared("flickr8k_audio", **options)
    sets = str(tmp_path / "sets")
    before = load_pairs("flickr8k_audio", "test", sets).identity()
    prepared("flickr8k_audio", **options)
    prepared("flickr8k_audio")  # without the downloads there is nothing to compare with
    assert "has changed" not in capsys.readouterr().out
    recording = load_pairs("flickr8k_audio", "test", sets).recording(0)["audio"]
    for path in (folder / "flickr_audio" / "wavs").iterdir():
        if path.read_bytes() == recording:
            path.write_bytes(wav(0.5, 4711))
    prepared("flickr8k_audio", **options)
    assert "has changed" in capsys.readouterr().out
    assert load_pairs("flickr8k_audio", "test", sets).identity() != before
