"""The index of a gallery: brought up to date without decoding again, stopped at any moment,
damaged, filtered; what is not its gallery or its model is refused."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from helpers.galleries import QUESTION, content, make_gallery, picture, untrained_model
from helpers.pages import python_blocks
from helpers.paths import ROOT

from c2f_jax import index as indexing
from c2f_jax.errors import UserError
from c2f_jax.galleries import chunk, gallery_index
from c2f_jax.galleries.stores import open_index
from c2f_jax.index import build_index
from c2f_jax.inference import TrainedModel
from c2f_jax.main import main
from c2f_jax.retrieval.calibration import Calibration
from c2f_jax.retriever import Retriever

CHUNK = 4  # items, so that there are several chunks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model: its answers are by chance, which is all that these tests need."""
    return untrained_model(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(indexing, "MOST_ROWS", CHUNK)


@pytest.fixture(params=["folder", pytest.param("lance", marks=pytest.mark.slow)])
def store(request):
    """What stores the rows."""
    if request.param == "lance":
        pytest.importorskip("lancedb", reason='needs pip install "c2f_jax[index]"')
    return request.param


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were decoded, since it was last cleared."""
    names, read_item = [], indexing.read_item

    def record(data, kind, file, name, **options):
        names.append(os.path.basename(name))
        return read_item(data, kind, file, name, **options)

    monkeypatch.setattr(indexing, "read_item", record)
    return names


@pytest.fixture
def gallery(tmp_path):
    return make_gallery(tmp_path / "gallery")


def names(index):
    return sorted(item.name for _, item in index.items())


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def test_what_has_not_changed_is_not_decoded_again(model, gallery, tmp_path, store, read, capsys):
    output = tmp_path / "index"
    index = build_index(model, output, gallery, store=store)
    assert index.complete and len(index) == 10 and len(read) == 11
    read.clear()
    before = files(output)
    build_index(model, output, gallery, store=store)
    assert read == [] and files(output).keys() == before.keys()
    assert "03.png: not a readable image" in capsys.readouterr().out, "named each time"

    (gallery / "11.png").write_bytes(picture(11))  # added
    (gallery / "04.png").write_bytes(picture(99))  # changed
    (gallery / "05.png").rename(gallery / "five.png")  # moved
    os.utime(gallery / "06.png")  # touched
    (gallery / "07.png").unlink()  # removed
    (gallery / "03.png").write_bytes(picture(3))  # repaired
    shutil.copy(gallery / "08.png", gallery / "copy.png")
    index = build_index(model, output, gallery, store=store)
    assert sorted(read) == ["03.png", "04.png", "11.png"]
    assert content(index) == content(build_index(model, tmp_path / "fresh", gallery, store=store))
    assert not index.left_out()

    # What was replaced takes no room.
    for number in range(6):
        (gallery / "04.png").write_bytes(picture(number))
        index = build_index(model, output, gallery, store=store)
    if store == "folder":
        assert len(index.alive) - len(index) <= CHUNK and len(index.chunks) <= 5
    else:
        assert index.contents["removed"] <= CHUNK + len(index) / 4


def test_a_moved_gallery_keeps_its_index_and_another_one_is_refused(
    model, gallery, tmp_path, store, read
):
    output = tmp_path / "index"
    build_index(model, output, gallery, store=store)
    moved = gallery.rename(tmp_path / "moved")
    read.clear()
    index = build_index(model, output, moved)
    assert read == [] and index.about.root == str(moved)

    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes(picture(50))
    before = files(output)
    with pytest.raises(UserError, match="is an index of .*moved, and nothing of it is in .*other"):
        build_index(model, output, other)
    with pytest.raises(UserError, match="is an index of image items, not of speech items"):
        build_index(model, output, "spoken_scenes/tiny", kind="speech")
    assert files(output) == before
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", other):
        with pytest.raises(UserError, match="holds something else"):
            build_index(model, path, moved)
    assert (tmp_path / "file").read_text() == "precious"


def write_manifest(folder, ids):
    """List the pictures of a gallery with a recording each, in the split test."""
    soundfile.write(folder / "question.wav", QUESTION, 16_000)
    lines = [
        {"image": f"{number:02d}.png", "audio": "question.wav", "split": "test", "image_id": name}
        for number, name in enumerate(ids)
    ]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_items_of_a_manifest_are_named_by_their_files(model, gallery, tmp_path, read):
    """Images of equal ids are two items; recordings of one file have only their numbers."""
    listed = write_manifest(gallery, ["cat", "cat", "dog"])
    index = build_index(model, tmp_path / "index", listed)
    assert names(index) == ["00.png", "01.png", "02.png"]
    read.clear()
    build_index(model, tmp_path / "index", listed)
    assert read == []

    retriever = Retriever(model, index)
    answers = retriever.search(QUESTION, where="image_id = 'cat'")
    paths = {str(gallery / "00.png"), str(gallery / "01.png")}
    assert {answer.path for answer in answers} == paths
    heard = build_index(model, tmp_path / "heard", listed, kind="speech")
    assert names(heard) == ["speech 0", "speech 1", "speech 2"]

    elsewhere = tmp_path / "lists" / "listed.jsonl"
    elsewhere.parent.mkdir()
    lines = map(json.loads, listed.read_text().splitlines())
    away = [
        line | {kind: str(gallery / line[kind]) for kind in ("image", "audio")} for line in lines
    ]
    elsewhere.write_text("".join(json.dumps(line) + "\n" for line in away))
    retriever.index(elsewhere, tmp_path / "away")
    assert {answer.path for answer in retriever.search(QUESTION, where="image_id = 'cat'")} == paths


def test_tokens_of_another_tool_are_indexed_with_their_images(gallery, tmp_path, read, capsys):
    """A model that takes nothing else indexes a data set, whose files it shows."""
    rng, cache = np.random.default_rng(0), tmp_path / "tokens.npz"
    tokens = rng.normal(size=(3, 4, 8)).astype(np.float16)
    keys = [f"{number:02d}.png" for number in range(3)]
    np.savez(cache, names=keys, tokens=tokens)
    listed = write_manifest(gallery, "abcd")  # the last of them has no tokens
    model = untrained_model(tmp_path / "run", image_tokens=cache)
    (gallery / "03.png").write_bytes(picture(3))
    output = tmp_path / "index"
    index = build_index(model, output, listed)
    assert names(index) == keys and index.thumbnail(0)
    assert "left out: 03.png: no features of 03.png" in capsys.readouterr().out
    expected = model.encode_items("image", list(tokens))
    np.testing.assert_allclose(index.encoded([0, 1, 2]).embeddings, expected.embedding, atol=1e-6)
    assert Retriever(model, index).search(QUESTION)[0].path.startswith(str(gallery))

    read.clear()
    build_index(model, output, listed)
    assert read == []
    np.savez(cache, names=[*keys, "03.png"], tokens=np.concatenate([tokens[[0, 2, 1]], tokens[:1]]))
    index = build_index(model, output, listed)
    assert sorted(read) == ["01.png", "02.png", "03.png"] and len(index) == 4

    with pytest.raises(UserError, match="takes image tokens of another tool.*tokens.npz"):
        build_index(model, tmp_path / "other", gallery)
    heard = build_index(model, tmp_path / "heard", listed, kind="speech")
    with pytest.raises(
        UserError, match="takes image tokens of another tool and cannot encode a query"
    ):
        Retriever(model, heard).search(np.zeros((8, 8, 3), np.uint8))


def test_one_process_changes_an_index_at_a_time(model, gallery, tmp_path, store):
    output = tmp_path / "index"
    index = build_index(model, output, gallery, store=store)
    with (
        index.locked(),
        pytest.raises(UserError, match="is being changed by another process"),
    ):
        build_index(model, output, gallery, store=store)


class Stopped(BaseException):
    """A kill: nothing catches it."""


def test_stopped_before_any_write_it_goes_on(model, gallery, tmp_path, monkeypatch, read):
    """What was written before is used, and the index is that of an undisturbed call, bit for bit;
    so it is when an index is brought up to date."""
    updated = tmp_path / "updated"

    def change(folder):
        shutil.copytree(gallery, folder)
        for number in (2, 8):
            (folder / f"{number:02d}.png").write_bytes(picture(70 + number))
        (folder / "01.png").unlink()
        for number in range(20, 26):
            (folder / f"{number}.png").write_bytes(picture(number))

    change(updated)
    writes = itertools.count()
    write_bytes, write_text = type(gallery_index.epath.Path()).write_bytes, None
    limit = None

    def counted(write):
        def wrapper(self, *arguments, **options):
            if limit is not None and next(writes) == limit:
                # Half of a file may be there.
                if isinstance(arguments[0], bytes):
                    write(self, arguments[0][: len(arguments[0]) // 2])
                raise Stopped
            return write(self, *arguments, **options)

        return wrapper

    path_type = type(gallery_index.epath.Path(tmp_path))
    write_bytes, write_text = path_type.write_bytes, path_type.write_text
    monkeypatch.setattr(path_type, "write_bytes", counted(write_bytes))
    monkeypatch.setattr(path_type, "write_text", counted(write_text))

    expected = build_index(model, tmp_path / "expected", gallery)
    shutil.copytree(tmp_path / "expected", tmp_path / "expected-updated")
    expected_update = build_index(model, tmp_path / "expected-updated", updated)
    decoded = set()
    for limit_now in itertools.count():
        output, writes, limit = tmp_path / f"{limit_now}", itertools.count(), limit_now
        try:
            build_index(model, output, gallery)
            break
        except Stopped:
            pass
        limit = None
        if output.exists() and not (output / "index.json").exists():
            shutil.rmtree(output)  # nothing was begun
        read.clear()
        index = build_index(model, output, gallery)
        decoded.add(len(read))
        assert content(index) == content(expected) and index.complete
        shutil.rmtree(output)
    assert limit_now > 10 and {0, 3, 7, 11} <= decoded

    for limit_now in itertools.count():
        output, limit = tmp_path / f"update-{limit_now}", None
        shutil.copytree(tmp_path / "expected", output)
        writes, limit = itertools.count(), limit_now
        try:
            build_index(model, output, updated)
            break
        except Stopped:
            pass
        # Meanwhile it can be searched.
        Retriever(model, open_index(output)).search(QUESTION)
        limit = None
        assert content(build_index(model, output, updated)) == content(expected_update)
        shutil.rmtree(output)
    assert limit_now > 8


@pytest.mark.slow
def test_killed_at_random_moments_it_equals_an_undisturbed_one(model, tmp_path, tiny_data_dir):
    gallery = make_gallery(tmp_path / "gallery", count=400)
    train = ["train", "--config=spoken_scenes:runlocal", f"--workdir={tmp_path / 'run'}"]
    train += [f"--config.data.data_dir={tiny_data_dir}", "--config.steps=1"]
    program = (
        "import sys; from c2f_jax import index, main; index.MOST_ROWS = 20;"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(*words):
        command = [sys.executable, "-c", program, *words]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start(*train).wait() == 0
    command = ["index", f"--workdir={tmp_path / 'run'}", f"--gallery={gallery}"]
    assert start(*command, f"--output={tmp_path / 'expected'}").wait() == 0
    rng, output, kills = random.Random(0), tmp_path / "killed", 0
    while kills < 30:
        process = start(*command, f"--output={output}")
        while not output.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            shutil.rmtree(output)
        kills += 1
    assert start(*command, f"--output={output}").wait() == 0
    found, expected = open_index(output), open_index(tmp_path / "expected")
    assert content(found) == content(expected) and found.complete


def test_any_flipped_byte_is_found(model, gallery, tmp_path):
    output = tmp_path / "index"
    build_index(model, output, gallery)
    for path in sorted(output.iterdir()):
        if path.name.endswith(".lock"):
            continue
        whole = path.read_bytes()
        step = max(1, len(whole) // 25)
        for place in [*range(0, len(whole), step), len(whole) - 1]:
            broken = bytearray(whole)
            broken[place] ^= 1
            path.write_bytes(broken)
            with pytest.raises(UserError, match="damaged|later c2f_jax"):
                open_index(output).verify()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="damaged"):
            open_index(output).verify()
        path.unlink()
        with pytest.raises(UserError, match="is missing|is not an index"):
            open_index(output).verify()
        path.write_bytes(whole)
    open_index(output).verify()


def test_damage_is_found_by_the_search_that_meets_it(model, gallery, tmp_path):
    output = tmp_path / "index"
    answer = Retriever(model, build_index(model, output, gallery)).search(QUESTION)[0]
    for path in output.glob("*.details.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start : len(data) - 1 : 7] = bytes(len(range(start, len(data) - 1, 7)))
        path.write_bytes(data)
    assert answer.match_logit is not None
    with pytest.raises(UserError, match="details.safetensors is damaged"):
        Retriever(model, open_index(output)).search(QUESTION)


@pytest.mark.parametrize(
    "where, expected",
    [
        ("name = '02.png'", ["02.png"]),
        ("width > 100", ["wide.png"]),
        ("date < '2021' and height = 30", ["00.png"]),
        ("name in ('01.png', '02.png') or camera is not null", None),
        ("1) union select row_of_index from items --", None),
        ("name = readfile('x')", None),
        ("", "all"),
        ("width < 0", []),
    ],
)
def test_a_condition_chooses_what_is_searched(model, gallery, tmp_path, store, where, expected):
    (gallery / "wide.png").write_bytes(picture(7, size=(120, 20)))
    os.utime(gallery / "00.png", (1.5e9, 1.5e9))
    retriever = Retriever(model)
    retriever.index(gallery, tmp_path / "index", store=store)
    if expected is None:
        with pytest.raises(UserError, match="Give a condition in SQL on name, date, height"):
            retriever.search(QUESTION, where=where)
        return
    found = retriever.search(QUESTION, where=where, top=20)
    answers = sorted(os.path.basename(answer.path) for answer in found)
    assert answers == (names(retriever.gallery) if expected == "all" else expected)


def test_three_lines_for_programs(model, gallery, tmp_path, store, capsys):
    retriever = Retriever(model)
    with pytest.raises(UserError, match="call index"):
        retriever.search(QUESTION)
    retriever.index(gallery, store=store)
    found = retriever.search(QUESTION)
    assert [answer.coarse_place for answer in found.coarse] == [1, 2, 3, 4, 5]
    assert sorted(answer.coarse_place for answer in found[:3]) == [1, 2, 3], "k = 3 are reranked"
    assert found[3].match_logit is None and os.path.exists(found[0].path)
    assert found[0].metadata["width"] == 40 and found.searched == 10
    assert found.seconds.keys() == {"read", "encode", "coarse", "fine"}

    path = tmp_path / "question.wav"
    soundfile.write(path, QUESTION, 16_000, subtype="FLOAT")
    for question in (path, str(path), path.read_bytes(), QUESTION.astype(np.float32)):
        assert list(retriever.search(question)) == list(found)
    coarse = retriever.search(QUESTION, rerank=0)
    assert [a.path for a in coarse] == [a.path for a in found.coarse]
    assert len(retriever.search(QUESTION, top=100)) == 10
    both = retriever.search_all([QUESTION, path])
    assert [[a.path for a in answers] for answers in both] == [[a.path for a in found]] * 2

    # Kept in the workdir, by the content of the gallery rather than by its spelling.
    indexes = list((model.workdir / "indexes").iterdir())
    link = tmp_path / "link"
    link.symlink_to(gallery)
    Retriever(model).index(link)
    assert list((model.workdir / "indexes").iterdir()) == indexes


@pytest.mark.parametrize(
    "question, problem",
    [
        (np.zeros(8000), "silent"),
        (QUESTION[:100], "too short: 100 samples"),
        (np.stack([QUESTION] * 2), r"must be \(S,\) floats"),
        (np.full(8000, np.nan), "not finite"),
        ((QUESTION * 32767).astype(np.int16), r"must be \(S,\) floats"),
        (b"", "empty|unreadable|not a"),
        (picture(0), "is an image, not a recording"),
    ],
)
def test_a_question_that_cannot_be_used_is_named(model, gallery, tmp_path, question, problem):
    retriever = Retriever(model)
    retriever.index(gallery, tmp_path / "index")
    with pytest.raises(UserError, match=problem):
        retriever.search(question)
    with pytest.raises(UserError, match="top must be"):
        retriever.search(QUESTION, top=0)


def test_probabilities_of_answers(model, gallery, tmp_path, capsys, monkeypatch):
    """Those of the calibration, for the number of items that were searched."""
    calibration = Calibration("joint", temperature=2.0, bias=0.5, gallery=20, pairs=100)
    calibrated = dataclasses.replace(model, calibrations={"s2i": calibration})
    retriever = Retriever(calibrated)
    retriever.index(gallery, tmp_path / "index")
    for where, searched in ((None, 10), ("name < '06'", 5)):
        found = retriever.search(QUESTION, where=where)
        assert found.searched == searched
        for answer in found[:3]:
            joint = answer.cosine / model.tau + answer.match_logit
            log_odds = joint / 2 + 0.5 - np.log(searched / 20)
            assert answer.probability == pytest.approx(1 / (1 + np.exp(-log_odds)), rel=1e-5)
        assert found[3].probability is None
    found = retriever.search(QUESTION)
    least = found[1].probability
    kept = retriever.search(QUESTION, min_probability=least)
    assert [a.path for a in kept] == [a.path for a in found[:2]]
    assert kept.coarse == found.coarse
    assert len(retriever.search(QUESTION, min_probability=1.0)) == 0

    monkeypatch.setattr(TrainedModel, "load", lambda *_: calibrated)
    path = tmp_path / "question.wav"
    soundfile.write(path, QUESTION, 16_000)
    words = ["search", "--workdir=run", f"--gallery={gallery}", "--audio", str(path)]
    page = tmp_path / "page.html"
    assert main([*words, "--min-probability=1", f"--output={page}"]) == 0
    assert "nothing matches" in capsys.readouterr().out
    assert "nothing matches" in page.read_text()
    with pytest.raises(UserError, match="gives no probabilities: SIM is left out"):
        retriever.search(QUESTION, rerank=0, min_probability=0.5)


def test_lines_of_json(model, gallery, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainedModel, "load", lambda *_: model)
    path = tmp_path / "question.wav"
    soundfile.write(path, QUESTION, 16_000)
    words = ["search", "--workdir=run", f"--gallery={gallery}", "--audio", str(path), str(path)]
    assert main([*words, "--json", "--where", "width = 40", "--rerank=2"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["query"] for line in lines] == [str(path)] * 2
    assert len(lines[0]["answers"]) == 5 and lines[0]["answers"][0]["match_logit"] is not None
    assert "03.png: not a readable image" in captured.err
    for wrong, problem in (("2", "from 0 to 1"), ("0.5", "was not evaluated")):
        assert main([*words, f"--min-probability={wrong}"]) == 2
        captured = capsys.readouterr()
        assert problem in captured.err and "indexed" not in captured.out, "before the gallery"
    assert main([*words, "--rerank=-1"]) == 2 and "--rerank=-1" in capsys.readouterr().err


def test_a_later_format_is_refused(model, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery_index, "VERSION", 2)
    build_index(model, tmp_path / "index", gallery)
    monkeypatch.undo()
    with pytest.raises(UserError, match="written by a later c2f_jax .format 2, this one reads 1"):
        open_index(tmp_path / "index")
    with pytest.raises(UserError, match="does not exist"):
        open_index(tmp_path / "nothing")
    assert chunk.Chunk


def test_a_table_without_lancedb_names_its_extra(model, gallery, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)  # importing it raises
    with pytest.raises(UserError, match=r'needs LanceDB: pip install "c2f_jax\[index\]"'):
        build_index(model, tmp_path / "index", gallery, store="lance")
    assert not (tmp_path / "index").exists()


def test_what_is_approximate_needs_a_table(model, gallery, tmp_path):
    with pytest.raises(UserError, match="give --store=lance with --approximate"):
        build_index(model, tmp_path / "index", gallery, approximate=True)
    assert not (tmp_path / "index").exists()
    retriever = Retriever(model, build_index(model, tmp_path / "index", gallery))
    with pytest.raises(UserError, match="is not prepared for approximate search"):
        retriever.search(QUESTION, approximate=True)


def test_the_documentation_reads_an_index(model, gallery, tmp_path, store, monkeypatch, capsys):
    """docs/search.md: with NumPy and safetensors alone, or with LanceDB."""
    index = build_index(model, tmp_path / "images.index", gallery, store=store)
    (gallery / "04.png").unlink()
    index = build_index(model, tmp_path / "images.index", gallery)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    _, of_a_folder, of_a_table = python_blocks(ROOT / "docs/search.md")
    exec(of_a_folder if store == "folder" else of_a_table, {})  # noqa: S102
    shown = capsys.readouterr().out
    for row, item in index.items() if store == "folder" else ():
        shape = index.tokens_of([row])[0].shape
        first = index.encoded([row]).embeddings[0, :3]
        assert f"{item.name} {first} {shape}" in shown
    assert "04.png" not in shown and "00.png" in shown
