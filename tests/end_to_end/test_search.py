"""Indexing and searching folders as people have them: what is left out is counted and named, any
name can be printed, memory does not grow with the files, odd queries are said."""

import io
import os
import re
import subprocess
import sys
import weakref

import jax
import numpy as np
import pytest
import soundfile
from helpers.memory_source import png
from helpers.paths import CONFIGS
from PIL import Image

from c2f_jax import index as indexing
from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config
from c2f_jax.galleries.stores import open_index
from c2f_jax.inference import TrainedModel
from c2f_jax.main import main
from c2f_jax.training.parallel import replicate

FLAGS = ["--config.eval.batch_size=4", "--config.data.max_seconds=1.0"]
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
JPEG = png(PHOTO, "JPEG")
TIMES = np.arange(12_000) / 16_000
SPEECH = 0.3 * np.sin(1885 * TIMES) * abs(np.sin(9.4 * TIMES))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model: its answers are by chance, which is all that these tests need."""
    experiment = create_experiment(load_config(f"{CONFIGS}/spoken_scenes.py:runlocal", FLAGS))
    params = jax.jit(experiment.model.init)(jax.random.key(3), example_batch(experiment.data))
    workdir = tmp_path_factory.mktemp("run")
    return TrainedModel(experiment, replicate(params["params"]), 10, workdir, {})


@pytest.fixture
def c2f(model, tmp_path, capsys, monkeypatch):
    """Run a command with the model: its status, output and errors."""
    monkeypatch.setattr(TrainedModel, "load", lambda *_: model)

    def run(command, *arguments):
        if command == "search" and not any("--output" in str(a) for a in arguments):
            arguments = (*arguments, f"--output={tmp_path / 'answers.html'}")
        status = main([command, "--workdir=run", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def gallery(tmp_path):
    folder = tmp_path / "gallery"
    folder.mkdir()
    for name in ("a.jpg", "b.JPG"):
        (folder / name).write_bytes(JPEG)
    return folder


def wav(path, samples, rate=16_000):
    soundfile.write(path, np.asarray(samples), rate, subtype="FLOAT")
    return path


@pytest.fixture
def question(tmp_path):
    return wav(tmp_path / "question.wav", SPEECH)


def listed(path):
    return sorted(item.name for _, item in open_index(path).items())


def names(path):
    return [os.path.basename(name) for name in listed(path)]


def test_every_type_is_indexed_or_counted(c2f, gallery, tmp_path):
    for name in ("c.jfif", "d.jpe", "e.avif", "f.mpo", "g.heic"):  # all are JPEG
        (gallery / name).write_bytes(JPEG)
    for name in ("h.mov", "i.mov", "j.cr2", "k.svg", "noend", "l.txt"):
        (gallery / name).write_bytes(b"something else")
    status, out, _ = c2f("index", f"--gallery={gallery}", f"--output={tmp_path / 'i.index'}")
    assert status == 0 and "7 items indexed" in out
    types = "2 .mov, 1 .cr2, 1 .svg, 1 .txt, 1 without a suffix"
    assert f"left out: 6 files of other types: {types}\n" in out
    assert "note: wrong suffix, 2" in out and "e.avif" in out and "g.heic" in out
    assert names(tmp_path / "i.index") == sorted(
        ["a.jpg", "b.JPG", "c.jfif", "d.jpe", "e.avif", "f.mpo", "g.heic"]
    )


def test_types_whose_extra_is_missing_are_counted_in_one_line(c2f, gallery, tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    for name in ("c.heic", "d.HEIC", "e.hif"):
        (gallery / name).write_bytes(png(PHOTO, "HEIF"))
    output = f"--output={tmp_path / 'i.index'}"
    status, out, _ = c2f("index", f"--gallery={gallery}", output)
    assert status == 0 and "5 items indexed" in out and "left out" not in out
    output = f"--output={tmp_path / 'without.index'}"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        status, out, _ = c2f("index", f"--gallery={gallery}", output)
    assert status == 0 and "2 items indexed" in out
    assert out.count("left out") == 1
    assert "3 files of types that cannot be read: 2 .heic, 1 .hif; HEIC needs the extra" in out
    assert "pip install 'c2f_jax[heif]'" in out
    # The same command takes them when the extra is there.
    status, out, _ = c2f("index", f"--gallery={gallery}", output)
    assert status == 0 and "5 items indexed" in out and "3 read" in out


def test_damaged_files_are_named_one_by_one(c2f, gallery, tmp_path):
    (gallery / "c.png").write_bytes(b"not an image")
    (gallery / "d.png").write_bytes(b"")
    (gallery / "e.jpg").write_bytes(JPEG[:-400])
    (gallery / "f.jpg").symlink_to(gallery / "nowhere.jpg")
    os.mkfifo(gallery / "g.jpg")
    status, out, _ = c2f("index", f"--gallery={gallery}", f"--output={tmp_path / 'i.index'}")
    assert status == 0 and "2 items indexed" in out
    for name, reason in (
        ("c.png", "not a readable image"),
        ("d.png", "the file is empty"),
        ("e.jpg", "truncated"),
        ("f.jpg", "No such file"),
        ("g.jpg", "not a file"),
    ):
        assert re.search(f"left out: .*{name}: .*{reason}", out), out


def test_links_hidden_files_and_closed_folders(c2f, gallery, tmp_path, monkeypatch):
    below = gallery / "below"
    below.mkdir()
    (below / "c.png").write_bytes(png(PHOTO))
    (gallery / "again.jpg").symlink_to(gallery / "a.jpg")
    os.link(gallery / "b.JPG", gallery / "same.jpg")
    (gallery / "loop").symlink_to(gallery)
    (gallery / "also").symlink_to(below)
    (gallery / "._a.jpg").write_bytes(b"resources")
    (gallery / ".thumbnails").mkdir()
    (gallery / ".thumbnails" / "d.jpg").write_bytes(JPEG)
    closed = gallery / "closed"
    closed.mkdir()
    iterdir = type(closed).iterdir

    def refuse(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(type(closed), "iterdir", refuse)  # the superuser may open any folder
    status, out, _ = c2f("index", f"--gallery={gallery}", f"--output={tmp_path / 'i.index'}")
    assert status == 0 and "3 items indexed" in out
    assert names(tmp_path / "i.index") == ["a.jpg", "b.JPG", "c.png"]
    assert "left out: 2 more links to one file: again.jpg, same.jpg" in out
    assert "left out: 2 hidden files and folders: ._a.jpg, .thumbnails" in out
    assert "left out: 2 links to folders that are listed anyway" in out and "loop" in out
    assert "left out: 1 folders that cannot be opened (Permission denied)" in out


def test_a_link_to_a_folder_or_file_elsewhere_is_followed(c2f, gallery, tmp_path):
    album = tmp_path / "album"
    album.mkdir()
    (album / "c.jpg").symlink_to(gallery / "a.jpg")
    (album / "d").symlink_to(gallery)
    status, out, _ = c2f("index", f"--gallery={album}", f"--output={tmp_path / 'i.index'}")
    assert status == 0 and "2 items indexed" in out
    assert names(tmp_path / "i.index") == ["a.jpg", "b.JPG"]  # by the names of the files
    assert "left out: 1 more links to one file: c.jpg" in out


def test_a_folder_without_images_says_what_it_holds(c2f, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.mov").write_bytes(b"film")
    (folder / ".b.jpg").write_bytes(JPEG)
    status, _, errors = c2f("index", f"--gallery={folder}", f"--output={tmp_path / 'i.index'}")
    assert status == 2 and "contains no image that can be read" in errors
    assert "1 .mov" in errors and ".b.jpg" in errors
    (folder / "c.jpg").write_bytes(b"nothing")
    status, out, errors = c2f("index", f"--gallery={folder}", f"--output={tmp_path / 'i.index'}")
    assert status == 2 and "none of the 1 files can be read" in errors and "c.jpg" in out


NAMES = {
    "not UTF-8": (b"caf\xe9.png", "caf�.png"),
    "Latin 1 folder": (b"\xfcber/a.png", "a.png"),
    "half a pair": ("\udcff\udcfe.png".encode("utf-8", "surrogateescape"), "��.png"),
    "Chinese": ("蛙 青蛙.png".encode(), "蛙 青蛙.png"),
    "a new line": (b"new\nline\x1b[31m.png", "new�line�[31m.png"),
    "joined emoji": ("👩\u200d🚀.png".encode(), "👩\u200d🚀.png"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("indexed", [False, True])
def test_any_name_can_be_searched_and_shown(c2f, tmp_path, question, kind, indexed):
    raw, shown = NAMES[kind]
    folder = tmp_path / "folder"
    path = os.fsencode(folder) + b"/" + raw
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(png(PHOTO))
    with open(path + b".jpg", "wb") as file:
        file.write(b"damaged")
    where = [f"--gallery={folder}"]
    if indexed:
        assert c2f("index", *where, f"--output={tmp_path / 'i.index'}")[0] == 0
        where = [f"--index={tmp_path / 'i.index'}"]
    status, out, errors = c2f("search", *where, "--audio", question)
    assert (status, errors) == (0, "") and f"{shown}  (cosine" in out
    assert indexed or re.search(f"left out: .*{re.escape(shown)}.jpg: not a readable image", out)
    assert shown in (tmp_path / "answers.html").read_text("utf-8")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_output_of_any_encoding(encoding):
    program = (
        "import sys, c2f_jax.main as m, types\n"
        "args = types.SimpleNamespace(run=lambda args: print('蛙 caf\\udce9.png') or 0)\n"
        "parser = types.SimpleNamespace(parse_known_args=lambda argv: (args, []))\n"
        "m.create_parser = lambda: parser\n"
        "sys.exit(m.main([]))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = "蛙 caf?.png" if encoding == "utf-8" else "? caf?.png"
    assert done.stdout.decode(encoding).strip() == expected


def test_a_page_is_utf_8_whatever_the_locale(tmp_path):
    program = (
        "from c2f_jax.reports.html import write_page\n"
        f"write_page({str(tmp_path / 'page.html')!r}, '\\u86d9', '<p>caf\\udce9</p>')"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)
    assert "<title>蛙</title>" in (tmp_path / "page.html").read_text("utf-8")


def test_an_index_holds_small_copies_rather_than_files(c2f, tmp_path, question):
    folder = tmp_path / "folder"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    for number in range(6):
        Image.fromarray(np.roll(noise, number, 1)).save(folder / f"{number}.png")
    files = sum(path.stat().st_size for path in folder.iterdir())
    assert c2f("index", f"--gallery={folder}", f"--output={tmp_path / 'i.index'}")[0] == 0
    index = open_index(tmp_path / "i.index")
    thumbnails = [index.thumbnail(row) for row, _ in index.items()]
    assert sum(map(len, thumbnails)) < 0.05 * files
    assert all(Image.open(io.BytesIO(data)).size == (128, 128) for data in thumbnails)
    # The files may be gone when the index is searched.
    for path in folder.iterdir():
        path.unlink()
    status, out, _ = c2f("search", f"--index={tmp_path / 'i.index'}", "--audio", question)
    assert status == 0 and "5. " in out
    assert (tmp_path / "answers.png").exists()


def test_files_are_decoded_and_dropped_one_by_one(c2f, gallery, tmp_path, monkeypatch):
    """No more than one batch of decoded images is alive, whatever the size of the folder."""
    for number in range(20):
        (gallery / f"{number}.jpg").write_bytes(JPEG)
    seen, most = [], 0
    read_item = indexing.read_item

    def read(*arguments, **options):
        nonlocal most
        item = read_item(*arguments, **options)
        seen.append(weakref.ref(item.array))
        most = max(most, sum(array() is not None for array in seen))
        return item

    monkeypatch.setattr(indexing, "read_item", read)
    assert c2f("index", f"--gallery={gallery}", f"--output={tmp_path / 'i.index'}")[0] == 0
    assert len(seen) == 22 and most <= 5


@pytest.mark.parametrize("count", [0, 1, 80, 399])
def test_a_query_that_is_too_short_names_what_is_needed(c2f, gallery, tmp_path, count):
    path = wav(tmp_path / "q.wav", SPEECH[:count])
    status, out, errors = c2f("search", f"--gallery={gallery}", "--audio", path)
    assert status == 2 and "q.wav" in errors and out == ""
    if count:
        assert f"{count} samples at 16 kHz; 400 are needed" in errors and "record" in errors


@pytest.mark.parametrize("level", [0.0, 0.4, 1e-6])
def test_a_silent_query_is_refused(c2f, gallery, tmp_path, level):
    samples = np.full(8000, level) if level != 1e-6 else level * SPEECH
    path = wav(tmp_path / "q.wav", samples)
    status, _, errors = c2f("search", f"--gallery={gallery}", "--audio", path)
    assert status == 2 and "q.wav: silent: nothing can be heard: check the microphone" in errors


QUERIES = {
    "quiet at first": (
        np.concatenate([1e-3 * SPEECH] * 2 + [SPEECH]),
        "silence cut: 1.4 s before and 0.0 s after the sound",
    ),
    "nearly silent": (0.001 * SPEECH, "silence: nothing louder than -7"),
    "clipped": (np.clip(9 * SPEECH, -1, 1), r"clipped: \d+\.\d % of the samples"),
    "too long": (np.tile(SPEECH, 4), "over-long: 3.0 s; the first 1 s are heard"),
}


@pytest.mark.parametrize("kind", QUERIES)
def test_what_is_odd_about_a_query_is_said(c2f, gallery, tmp_path, kind):
    samples, words = QUERIES[kind]
    path = wav(tmp_path / "q.wav", samples)
    status, out, _ = c2f("search", f"--gallery={gallery}", "--audio", path)
    assert status == 0 and re.search(f"note: {words}", out)
    assert re.search(words, (tmp_path / "answers.html").read_text())


def test_a_usual_query_has_no_notes(c2f, gallery, question):
    status, out, _ = c2f("search", f"--gallery={gallery}", "--audio", question)
    assert status == 0 and "note:" not in out and "  2. " in out


@pytest.mark.parametrize("text", ["", "  ", "...", "?!"])
def test_nothing_to_say_is_refused(c2f, gallery, text):
    status, _, errors = c2f("search", f"--gallery={gallery}", "--say", text)
    assert status == 2 and "has no words: give a sentence" in errors


def test_a_long_sentence_is_said_to_be_cut(c2f, gallery):
    pytest.importorskip("espeakng_loader")
    status, out, _ = c2f("search", f"--gallery={gallery}", "--say", 9 * "a small red circle and ")
    assert status == 0 and "s; the first 1 s are heard" in out


def test_the_wrong_kind_of_file_names_the_right_option(c2f, gallery, tmp_path, question):
    photo = tmp_path / "photo.dat"
    photo.write_bytes(JPEG)
    status, _, errors = c2f("search", f"--gallery={gallery}", "--audio", photo)
    assert status == 2 and "photo.dat is an image, not a recording: ask with --image" in errors
    status, _, errors = c2f("search", f"--gallery={gallery}", "--image", question)
    assert status == 2 and "question.wav is a recording, not an image: ask with --audio" in errors
    for option in ("--audio", "--image"):
        for name, words in (("", "not a file"), ("gone.wav", "No such file")):
            status, _, errors = c2f("search", f"--gallery={gallery}", option, tmp_path / name)
            assert status == 2 and words in errors


def test_recordings_are_indexed_by_the_same_rules(c2f, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(JPEG)
    wav(folder / "a.wav", SPEECH)
    wav(folder / "b.wav", SPEECH[:80])
    wav(folder / "c.wav", np.tile(SPEECH, 3))
    wav(folder / "d.wav", np.zeros(8000))
    soundfile.write(folder / "e.aiff", SPEECH, 16_000)
    output = f"--output={tmp_path / 'i.index'}"
    status, out, _ = c2f("index", "--kind=speech", f"--gallery={folder}", output)
    assert status == 0 and "4 items indexed" in out
    assert re.search("left out: .*b.wav: too short: 80 samples at 16 kHz; 400 are needed", out)
    assert "left out: 1 files of other types: 1 .jpg" in out
    assert re.search("note: over-long, 1, .*c.wav .2.2 s; the first 1 s are heard", out)
    assert re.search("note: silence, 1, .*d.wav", out)
    photo = tmp_path / "q.png"
    photo.write_bytes(png(PHOTO.convert("RGBA")))
    status, out, _ = c2f("search", f"--index={tmp_path / 'i.index'}", "--image", photo)
    assert status == 0 and "  4. " in out and "note: transparency: shown on white" in out
    assert (tmp_path / "answers.html").read_text().count("<audio") >= 4


@pytest.mark.parametrize(
    "image, words",
    [
        (png(Image.new("RGB", (60, 80))), "one color: no two pixels"),
        (png(PHOTO.resize((640, 480)), "JPEG")[:8000] + bytes(999) + bytes([255, 217]), None),
    ],
)
def test_what_is_odd_about_an_image_query_is_said(c2f, tmp_path, image, words):
    folder = tmp_path / "speech"
    folder.mkdir()
    wav(folder / "a.wav", SPEECH)
    (tmp_path / "q.img").write_bytes(image)
    status, out, errors = c2f("search", f"--gallery={folder}", "--image", tmp_path / "q.img")
    if words:
        assert status == 0 and f"note: {words}" in out
    else:
        assert status == 2 and "q.img: not a readable image" in errors
