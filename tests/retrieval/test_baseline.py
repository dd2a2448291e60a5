"""Embeddings of another model, from files: recall as a plain loop counts it, and one error for each
thing that can be wrong."""

import hashlib
import json

import numpy as np
import pytest
from helpers.memory_source import Memory
from helpers.pages import python_blocks
from helpers.paths import ROOT

import c2f_jax
from c2f_jax.errors import UserError
from c2f_jax.evaluate import evaluate_baseline
from c2f_jax.main import main
from c2f_jax.retrieval.baseline import number_ids, read_embeddings, read_ids
from c2f_jax.retrieval.protocols import PROTOCOLS, open_protocol
from c2f_jax.retrieval.result import EvaluationResult

IMAGES, WIDTH = 40, 12
OF_IMAGE = np.random.default_rng(1).permutation(np.repeat(np.arange(IMAGES), 3))


class Shuffled(Memory):
    """Three recordings of each image, in no order, as the splits of published sets have them."""

    def __init__(self):
        super().__init__(np.full(len(OF_IMAGE), 1600), per_image=3)
        self.image_index = OF_IMAGE.astype(np.int32)


def embeddings(seed=0, noise=1.2):
    """Rows of any length, near those of their images."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(IMAGES, WIDTH))
    speech = image[OF_IMAGE] + noise * rng.normal(size=(len(OF_IMAGE), WIDTH))
    scale = rng.uniform(0.1, 9, size=(len(OF_IMAGE), 1))
    return (scale * speech).astype(np.float32), image.astype(np.float32)


def recall_by_hand(queries, gallery, correct, cut):
    """R@cut: cosines in float64, one query after another."""
    found = 0
    for query, row in zip(queries.astype(float), correct, strict=True):
        norms = np.linalg.norm(gallery.astype(float), axis=1) * np.linalg.norm(query)
        best = np.argsort(-(gallery.astype(float) @ query) / norms, kind="stable")[:cut]
        found += bool(row[best].any())
    return 100 * found / len(queries)


@pytest.fixture
def files(tmp_path):
    """A pair of embedding files and a pair of id files."""
    speech, image = embeddings()
    paths = {}
    ids = {"speech_ids": OF_IMAGE, "image_ids": np.arange(IMAGES)}
    for name, rows in {"speech": speech, "image": image, **ids}.items():
        paths[name] = tmp_path / f"{name}.npy"
        np.save(paths[name], rows)
    return paths


def test_recall_is_that_of_a_plain_loop():
    speech, image = embeddings()
    result = evaluate_baseline(speech, image, Shuffled())
    correct = OF_IMAGE[:, None] == np.arange(IMAGES)
    for cut in (1, 5, 10):
        s2i = recall_by_hand(speech, image, correct, cut)
        i2s = recall_by_hand(image, speech, correct.T, cut)
        assert 0 < s2i < 100
        assert result.coarse.speech_to_image[f"R@{cut}"].value == pytest.approx(s2i)
        assert result.coarse.image_to_speech[f"R@{cut}"].value == pytest.approx(i2s)
    low, high = result.coarse.speech_to_image["R@1"].interval
    assert low < result.coarse.speech_to_image["R@1"].value < high
    assert result.fine is None and result.queries.gallery_recordings == 3 * IMAGES


def test_ids_of_any_kind_give_the_same_as_the_data_set():
    speech, image = embeddings()
    names = np.array([f"picture {number:02}.jpg" for number in range(IMAGES)])
    expected = evaluate_baseline(speech, image, Shuffled()).coarse
    for ids in (names, np.arange(IMAGES) + 7, np.arange(IMAGES, dtype=np.uint8)):
        assert evaluate_baseline(speech, image, (ids[OF_IMAGE], ids)).coarse == expected


def test_the_page_and_the_json_name_the_files(files, tmp_path):
    page = tmp_path / "out" / "page.html"
    result = evaluate_baseline(files["speech"], files["image"], Shuffled(), output=page)
    stored = json.loads(page.with_suffix(".json").read_text())
    about = stored["baseline"]["speech"]
    assert about["file"] == str(files["speech"]) and not about["was_normalized"]
    of_file = hashlib.blake2b(files["speech"].read_bytes(), digest_size=16).hexdigest()
    assert about["content"] == of_file
    assert EvaluationResult.from_json(stored) == result
    text = page.read_text()
    assert "speech.npy, 120 rows of 12 numbers" in text and "normalized here" in text
    assert "memory, train split" in text and "caption 3" in text and text.count("<audio") > 8
    assert "(SIC)" not in text and "(SIM)" not in text
    table = result.table()
    assert "speech -> image: 120 queries, gallery of 40\n" in table and "SIC" not in table
    assert about["content"][:8] in table


def test_arrays_have_the_hash_of_the_file_that_they_would_make(files):
    array = np.load(files["image"])
    assert read_embeddings(array, "it").content == read_embeddings(files["image"], "").content


def test_normalized_rows_are_left_alone():
    _, image = embeddings()
    unit = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32)
    kept = read_embeddings(unit, "unit")
    assert kept.was_normalized and np.array_equal(kept.rows, unit)
    large = read_embeddings(1e300 * unit.astype(np.float64), "large")
    assert not large.was_normalized
    np.testing.assert_allclose(large.rows, unit, atol=1e-6)


def test_protocols_take_a_baseline(tmp_path):
    """MTEB's gallery has the images of other splits, after those of the test split."""
    speech, image = embeddings()

    def load(name, split):
        if split == "validation":
            raise UserError("no such split")
        source = Shuffled()
        source.split = split
        return source

    protocol = PROTOCOLS["mteb"]
    source = open_protocol(protocol, load, "memory")
    more = np.random.default_rng(5).normal(size=(IMAGES, WIDTH)).astype(np.float32)
    gallery = np.concatenate([image, more])
    output = tmp_path / "page.html"
    result = evaluate_baseline(speech, gallery, source, protocol=protocol, output=output)
    correct = OF_IMAGE[:, None] == np.arange(2 * IMAGES)
    recall = recall_by_hand(speech, gallery, correct, 1)
    assert result.coarse.speech_to_image["R@1"].value == pytest.approx(recall)
    table = result.table()
    assert "NOT the published number" in table and "trained on" not in table
    assert "40 queries have no correct item there" in table


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda speech, image: (image, speech), "look swapped; give the recordings first"),
        (lambda speech, image: (speech[:-1], image), "has 119 rows, but .* has 120 recordings"),
        (lambda speech, image: (speech, image[1:]), "has 39 rows, but .* has 40 images"),
        (lambda speech, image: (speech[:, 1:], image), "rows of 11 numbers, .* of 12"),
        (lambda speech, image: (speech[0], image), r"shape \(12,\)"),
        (lambda speech, image: (speech[:, None], image), r"shape \(120, 1, 12\)"),
        (lambda speech, image: (speech[:0], image), r"shape \(0, 12\)"),
        (lambda speech, image: (speech, image.astype(np.float16)), "is float16"),
        (lambda speech, image: (speech, image.astype(int)), "is int64, not float32"),
        (lambda speech, image: (speech, image.astype(complex)), "is complex128"),
        (lambda speech, image: (speech, np.where(image > 2, np.nan, image)), "contain NaN"),
        (lambda speech, image: (speech, np.where(image > 2, np.inf, image)), "or infinity"),
        (
            lambda speech, image: (speech * (OF_IMAGE != 3)[:, None], image),
            "3 of 120 rows are zero",
        ),
        (lambda speech, image: (list(map(list, speech)), image[:, :0]), r"shape \(40, 0\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate_baseline(*change(*embeddings()), Shuffled())
    assert len(str(error.value)) < 300


def test_files_that_are_no_table_are_refused(files, tmp_path):
    speech = np.load(files["speech"])
    ragged = np.empty(2, object)
    ragged[:] = [speech[0], speech[1, :5]]
    bad = tmp_path / "bad.npy"
    contents = {
        "Python objects, as np.save writes rows of unequal length": lambda: np.save(
            bad, ragged, allow_pickle=True
        ),
        "not a whole .npy file": lambda: bad.write_bytes(files["speech"].read_bytes()[:-9]),
        "not a whole .npy file .No data left": lambda: bad.write_bytes(b""),
        "not a whole .npy file .*pickle": lambda: bad.write_text("1 2 3"),
        "archive of several arrays": lambda: np.savez(open(bad, "wb"), speech=speech),
    }
    for message, write in contents.items():
        write()
        with pytest.raises(UserError, match=message):
            read_embeddings(bad, "")
    with pytest.raises(UserError, match="there is no such file"):
        read_embeddings(tmp_path / "none.npy", "")


def test_ids_that_do_not_name_rows_are_refused(files, tmp_path):
    for ids, message in (
        (np.arange(4.0), "float64"),
        (np.zeros((4, 1), int), "shape"),
        ([], "one id for each row"),
    ):
        with pytest.raises(UserError, match=message):
            number_ids(ids, np.arange(4))
    with pytest.raises(UserError, match="numbers, those of the images text"):
        number_ids(np.arange(4), ["0", "1"])
    with pytest.raises(UserError, match="no recording shares its id"):
        evaluate_baseline(*embeddings(), (OF_IMAGE, np.arange(IMAGES) + 1000))
    text = tmp_path / "ids.txt"
    text.write_text("a\n\nb\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        read_ids(text)
    text.write_text(" a.jpg\r\nb.jpg\n")
    assert read_ids(text).tolist() == ["a.jpg", "b.jpg"]
    with pytest.raises(UserError, match="cannot be read as text"):
        read_ids(tmp_path / "none.txt")
    signed, unsigned = number_ids(np.array([-1, 5]), np.array([2**64 - 1, 5], np.uint64))
    assert signed[1] == unsigned[1] and len({*signed, *unsigned}) == 3


def test_the_documented_cascade_makes_files_that_the_command_takes(tmp_path, monkeypatch):
    """With a cascade that reads the row from the samples and from the pixels."""
    source = Shuffled()
    code = python_blocks(ROOT / "docs/harnesses.md", "py")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(c2f_jax, "load_pairs", lambda name, split: source, raising=False)
    places = {
        "transcribe": lambda waveform: round(float(waveform[0]) * 1024) - 1,
        "embed_text": lambda row: np.eye(IMAGES)[OF_IMAGE[row]],
        "embed_image": lambda image: np.eye(IMAGES)[image.getpixel((0, 0))[0]],
    }
    exec(code, places)  # noqa: S102
    np.savetxt("speech.txt", source.image_ids[OF_IMAGE], fmt="%d")
    np.savetxt("image.txt", source.image_ids, fmt="%d")
    words = "evaluate --baseline speech.npy image.npy --speech-ids=speech.txt --image-ids=image.txt"
    assert main(words.split()) == 0
    stored = json.loads((tmp_path / "speech-ids.json").read_text())
    assert stored["coarse"]["mean_recall"] == 100 and stored["baseline"]["image"]["was_normalized"]


def test_the_command_needs_no_run(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--baseline", str(files["speech"]), str(files["image"])]
    ids = ["--speech-ids", str(files["speech_ids"]), "--image-ids", str(files["image_ids"])]
    assert main([*words, *ids]) == 0
    shown = capsys.readouterr().out
    assert "120 queries, gallery of 40" in shown and f"page: {tmp_path}/speech-ids.html" in shown
    stored = json.loads((tmp_path / "speech-ids.json").read_text())
    recall = evaluate_baseline(*embeddings(), Shuffled()).coarse.speech_to_image["R@1"].value
    assert stored["coarse"]["speech_to_image"]["R@1"] == recall

    for more, message in (
        ([], "name the data set by --data or --protocol, or give --speech-ids"),
        (ids[:2], "--speech-ids alone"),
        ([*ids, "--data=spoken_scenes"], "leave out --data"),
        ([*ids, "--k=8"], "--k is for a run"),
        ([*ids, "--process-id=0"], "--process-id is for a run"),
        ([*ids, "--workdir=run"], "--workdir is for a run"),
        ([*ids, "--step=10"], "--step is for a run"),
        ([*ids, "--output=page.txt"], "ends in .html"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    for alone in (["evaluate"], ["evaluate", "--workdir=run", *ids]):
        assert main(alone) == 2
        assert "--baseline" in capsys.readouterr().err
