"""Search of a gallery that stays on the devices, here on four of the CPU, against float64."""

import itertools

import jax
import numpy as np
import pytest

from c2f_jax.retrieval import device_search
from c2f_jax.retrieval.device_search import DeviceGallery


@pytest.mark.parametrize("devices, count, k", [(4, 61, 7), (4, 3, 3), (1, 40, 40), (3, 50, 1)])
def test_it_is_that_of_float64(monkeypatch, devices, count, k):
    """In any order of blocks, with ties across shards, gaps in the rows, queries in parts."""
    monkeypatch.setattr(device_search, "MOST_SCORES", 2 * -(-count // devices))
    rng = np.random.default_rng(count)
    gallery = rng.integers(-1, 2, (count + 9, 4)).astype(np.float32)  # exact products, many ties
    queries = rng.integers(-1, 2, (5, 4)).astype(np.float32)
    removed = rng.permutation(count + 9)[:9]
    alive = np.ones(count + 9, bool)
    alive[removed] = False
    numbers = 10 + 3 * np.arange(count + 9)  # of the rows
    order = np.roll(np.arange(count + 9), 7)
    cuts = [0, 2, 2, 9, count + 9]
    parts = [order[a:b] for a, b in itertools.pairwise(cuts)]
    blocks = ((numbers[part], gallery[part], alive[part]) for part in parts)
    found = DeviceGallery(blocks, count, 4, jax.devices()[:devices])
    exact = queries.astype(np.float64) @ gallery.astype(np.float64).T

    living = np.flatnonzero(alive)
    for chosen, most in ((living, k), (living[::2], min(k, len(living[::2])))):
        scores, rows = found.top_k(queries, most, None if len(chosen) == count else numbers[chosen])
        expected = chosen[np.argsort(-exact[:, chosen], axis=1, kind="stable")[:, :most]]
        np.testing.assert_array_equal(rows, numbers[expected])
        np.testing.assert_array_equal(scores, np.take_along_axis(exact, expected, 1))
    # On other devices than a TPU what may be approximate is exact.
    np.testing.assert_array_equal(
        found.top_k(queries, k, approximate=True)[0], found.top_k(queries, k)[0]
    )
    assert found.top_k(queries, 0)[1].shape == (5, 0)


def test_approximate_top_k_of_shards_has_its_recall():
    """``approx_max_k``, which the CPU computes too: by hand, since only a TPU takes it."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((4000, 8)).astype(np.float32)
    queries = rng.standard_normal((6, 8)).astype(np.float32)
    found = DeviceGallery([(np.arange(4000), gallery, np.ones(4000, bool))], 4000, 8)
    wanted = jax.device_put(np.ones(4000, bool), found._sharding)
    scores, places = device_search._top_k_of_shards(
        queries, found._embeddings, wanted, 50, True, found._sharding.mesh
    )
    rows = device_search._merge(np.asarray(scores), np.asarray(places), 50)[1]
    exact = np.argsort(-(queries @ gallery.T), axis=1)[:, :50]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(rows, exact, strict=True)]) > 0.9


def test_an_index_searches_on_its_devices(monkeypatch, tmp_path):
    """The path of accelerators through an index: the same answers, and those of its last state."""
    from c2f_jax.galleries.gallery_index import About
    from c2f_jax.galleries.item import EncodedItems, Item
    from c2f_jax.galleries.stores import create_index

    about = About("image", "photos", None, "run", "f", {}, 4, 2, 3, 8)
    index, rng = create_index(tmp_path / "index", about), np.random.default_rng(0)

    def add(names):
        embeddings = rng.integers(-1, 2, (len(names), 4)).astype(np.float32)
        tokens = index.nothing().tokens
        lengths = np.zeros(len(names), np.int32)
        items = [Item(name, [[], name], {"width": len(name)}) for name in names]
        index.add(items, EncodedItems([b""] * len(names), embeddings, tokens, lengths), [])

    query = np.ones((2, 4), np.float32)
    for names in ("abcdefgh", ["xx", "yy", "zz"], "ijklmn"):
        add(names)
        index.remove("c")
        for where in (None, "width > 1"):
            expected = index.search(query, 6, where)
            with monkeypatch.context() as patch:
                patch.setattr(DeviceGallery, "fits", lambda *_: True)
                index.__dict__.pop("_on_devices", None)
                found = index.search(query, 6, where)
                assert isinstance(index._on_devices, DeviceGallery)
            index.__dict__["_on_devices"] = None
            for part, same in zip(found, expected, strict=True):
                np.testing.assert_array_equal(part, same)
