"""An index in a table of LanceDB: the answers of the folder, approximate search, interruption at
each write, damage. The tests of test_index.py run with it too."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.galleries import QUESTION, content, make_gallery, picture, untrained_model
from helpers.paths import ROOT

from c2f_jax import index as indexing
from c2f_jax.errors import UserError
from c2f_jax.galleries import index_table
from c2f_jax.galleries.gallery_index import About
from c2f_jax.galleries.item import EncodedItems, Item
from c2f_jax.galleries.stores import create_index, open_index
from c2f_jax.index import build_index
from c2f_jax.retriever import Retriever

lancedb = pytest.importorskip("lancedb", reason='needs pip install "c2f_jax[index]"')
D, W = 16, 8


def about(chunk_rows=64):
    return About("image", "photos", None, "run, step 1", "f" * 16, {}, D, W, 5, chunk_rows)


def rows_of(rng, names, integers=False):
    """Items and rows; integers make many equal scores and exact products."""
    count = len(names)
    embeddings = rng.integers(-1, 2, (count, D)) if integers else rng.standard_normal((count, D))
    if not integers:
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    lengths = rng.integers(0, 6, count).astype(np.int32)
    tokens = rng.standard_normal((lengths.sum(), W)).astype(index_table.ml_dtypes.bfloat16)
    items = [Item(name, [[], name], {"width": n, "date": "2025"}) for n, name in enumerate(names)]
    thumbnails = [name.encode(errors="replace") for name in names]
    return items, EncodedItems(thumbnails, embeddings.astype(np.float32), tokens, lengths)


def add(index, rng, names, integers=False, replaced=()):
    items, encoded = rows_of(rng, names, integers)
    index.add(items, encoded, replaced)


def stored(index):
    """Name -> all that is stored of it."""
    found = {}
    for row, item in index.items():
        rows = index.encoded([row])
        parts = rows.embeddings.tobytes(), rows.tokens.tobytes(), rows.thumbnails[0]
        found[item.name] = *parts, item.metadata, item.stamp
    return found


def test_both_stores_give_the_same_answers(tmp_path):
    """Ties by row, conditions, tokens in any order, names that are not UTF-8."""
    indexes = []
    for store in ("folder", "lance"):
        index, rng = create_index(tmp_path / store, about(), store), np.random.default_rng(0)
        for start in range(0, 200, 50):
            names = [f"{n}\udcff.png" if n == 7 else f"{n}.png" for n in range(start, start + 50)]
            add(index, rng, names, integers=True)
        index.remove(["3.png", "60.png"])
        index.finish("photos", None)
        indexes.append(open_index(tmp_path / store))
    folder, lance = indexes
    queries = np.random.default_rng(1).integers(-1, 2, (6, D)).astype(np.float32)
    for where, k in itertools.product(
        (None, "width > 20 and name like '1%.PNG'", "width < 0"), (9,)
    ):
        scores, rows = lance.search(queries, k, where)
        expected, expected_rows = folder.search(queries, k, where)
        np.testing.assert_array_equal(scores, expected)
        named = [
            [index.item(row).name for row in found.flat]
            for index, found in ((lance, rows), (folder, expected_rows))
        ]
        assert named[0] == named[1]
    assert len(np.unique(scores)) <= 9 and stored(folder) == stored(lance)
    rows = rows_of_names(lance, ["50.png", "2.png", "50.png"])
    same = rows_of_names(folder, ["50.png", "2.png", "50.png"])
    for part, expected in zip(lance.tokens(rows), folder.tokens(same), strict=True):
        np.testing.assert_array_equal(part, expected)
    assert lance.thumbnail(rows[0]) == b"50.png"
    with pytest.raises(UserError, match="is not prepared for approximate search: make an index by"):
        folder.search(queries, 3, approximate=True)
    with pytest.raises(UserError, match="is not prepared for approximate search"):
        lance.search(queries, 3, approximate=True)


def rows_of_names(index, names):
    known = {item.name: row for row, item in index.items()}
    return [known[name] for name in names]


class Stopped(BaseException):
    """A kill: nothing catches it."""


@contextlib.contextmanager
def stop_before(monkeypatch, limit):
    """Stop before or after the write of that number: of the table or of the header."""
    from lancedb.table import LanceTable

    count = itertools.count()

    def counted(write):
        def wrapper(*arguments, **options):
            if next(count) == limit:
                raise Stopped
            result = write(*arguments, **options)
            if next(count) == limit:
                raise Stopped
            return result

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("add", "delete", "restore", "optimize", "create_index"):
            patch.setattr(LanceTable, name, counted(getattr(LanceTable, name)))
        database = lancedb.db.LanceDBConnection
        patch.setattr(database, "create_table", counted(database.create_table))
        header = index_table.IndexTable.write_header
        patch.setattr(index_table.IndexTable, "write_header", counted(header))
        yield


@pytest.mark.slow
def test_stopped_at_any_write_the_last_version_is_whole(tmp_path, monkeypatch):
    """An index is what it was before the step or after it, is searched, and can be changed."""
    monkeypatch.setattr(index_table, "FEWEST", 100)
    monkeypatch.setattr(index_table, "ROWS_OF_PARTITION", 50)
    folder, rng = tmp_path / "index", np.random.default_rng(0)
    index = create_index(folder, about(chunk_rows=8), "lance")
    for start in range(0, 120, 8):
        add(index, rng, [f"{n}" for n in range(start, start + 8)])
    index.build_approximate()
    steps = {
        "add": lambda i: add(i, np.random.default_rng(5), ["x", "5"], replaced=["5"]),
        "remove": lambda i: i.remove(["7", "8", "no such"]),
        "finish": lambda i: i.finish("photos", None),  # so many parts are written anew
    }
    query = np.eye(1, D, dtype=np.float32)
    for name, step in steps.items():
        before = stored(open_index(folder))
        shutil.copytree(folder, tmp_path / f"after-{name}")
        index = open_index(tmp_path / f"after-{name}")
        step(index)
        after = stored(open_index(tmp_path / f"after-{name}"))
        assert stored(index) == after, "as it is in the process that changed it"
        for limit in itertools.count():
            copy = tmp_path / f"{name}-{limit}"
            shutil.copytree(folder, copy)
            with stop_before(monkeypatch, limit):
                try:
                    step(open_index(copy))
                    break
                except Stopped:
                    pass
            opened = open_index(copy)
            opened.verify()
            assert stored(opened) in (before, after)
            opened.search(query, 5)
            assert opened.search(query, 5, approximate=True)[1].shape == (1, 5)
            if stored(opened) == before:
                step(opened)
                assert stored(open_index(copy)) == after
            shutil.rmtree(copy)
        assert limit >= 4
        step(open_index(folder))


def test_approximate_search_finds_the_nearest(tmp_path, monkeypatch):
    """With all partitions it is exact; the rows added since are found; a condition is exact."""
    monkeypatch.setattr(index_table, "FEWEST", 300)
    monkeypatch.setattr(index_table, "ROWS_OF_PARTITION", 100)
    index, rng = create_index(tmp_path / "index", about(512), "lance"), np.random.default_rng(0)
    add(index, rng, [f"{n}" for n in range(2000)])
    index.build_approximate()
    index = open_index(tmp_path / "index")
    add(index, rng, ["late"])
    index.remove(["4", "5"])
    queries = np.concatenate([index.encoded([2000]).embeddings, rows_of(rng, "abc")[1].embeddings])
    exact = index.search(queries, 30)
    with monkeypatch.context() as patch:
        patch.setattr(index_table, "FEWEST_PROBED", 20)
        found = index.search(queries, 30, approximate=True)
    np.testing.assert_array_equal(found[1], exact[1])
    np.testing.assert_allclose(found[0], exact[0], atol=1e-6)
    assert found[1][0, 0] == 2000
    monkeypatch.setattr(index_table, "FEWEST_PROBED", 1)
    some = index.search(queries, 30, approximate=True)[1]
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(some, exact[1], strict=True)])
    assert 0.1 < recall < 1, "that some are missed is what makes it fast"
    assert index.search(queries, 1500, approximate=True)[1].shape == (4, 1500), "k are found"
    assert (index.search(queries, 9, "width > 1000", True)[1] > 1000).all()

    # Divided anew once many rows are not in a partition, and not before.
    def indexed():
        return index._table.index_stats("embedding_idx").num_unindexed_rows

    index.finish("photos", None)
    assert indexed() == 1
    add(index, rng, [f"new {n}" for n in range(400)])
    index.finish("photos", None)
    assert indexed() == 0


@pytest.mark.slow
def test_any_flipped_byte_is_found_or_harmless(tmp_path):
    """In a process of its own, where damage may do what it likes to LanceDB."""
    folder = tmp_path / "index"
    index, rng = create_index(folder, about(), "lance"), np.random.default_rng(0)
    add(index, rng, [f"{n}" for n in range(12)])
    index.remove(["3"])
    index.finish("photos", None)
    program = f"""
import pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/end_to_end")!r}]
from test_index_table import stored, open_index, UserError
folder = pathlib.Path({str(folder)!r})
whole = stored(open_index(folder))
counts = dict(found=0, harmless=0)
for path in sorted(folder.rglob("*")):
    if not path.is_file() or path.name.endswith((".lock", ".txn")):
        continue
    data = path.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 60)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            index = open_index(folder)
            index.verify()
            assert stored(index) == whole, (path, place)
            counts["harmless"] += 1
        except UserError as error:
            assert "damaged" in str(error) or "later c2f_jax" in str(error), error
            counts["found"] += 1
    path.write_bytes(data)
print(counts)
assert counts["found"] > 100
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


@pytest.mark.slow
def test_an_index_of_files_is_the_same_in_both_stores(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "MOST_ROWS", 4)
    model, gallery = untrained_model(tmp_path / "run"), make_gallery(tmp_path / "gallery")
    answers, contents = [], []
    for store in ("folder", "lance"):
        index = build_index(model, tmp_path / store, gallery, store=store)
        contents.append(content(index))
        found = Retriever(model, open_index(tmp_path / store)).search(QUESTION, top=20)
        answers.append([(a.path, a.cosine, a.match_logit, a.coarse_place) for a in found])
    assert answers[0] == answers[1] and contents[0] == contents[1]
    (gallery / "04.png").write_bytes(picture(99))
    assert build_index(model, tmp_path / "lance", gallery).store == "lance"
    for store in ("folder", "lance"):
        other = "folder" if store == "lance" else "lance"
        with pytest.raises(UserError, match=f"is stored in {store}, not in {other}: leave out"):
            build_index(model, tmp_path / store, gallery, store=other)
    with pytest.raises(UserError, match="give --store=lance with --approximate"):
        build_index(model, tmp_path / "third", gallery, approximate=True)
    with pytest.raises(UserError, match="approximate search needs --store=lance"):
        build_index(model, tmp_path / "folder", gallery, approximate=True)
