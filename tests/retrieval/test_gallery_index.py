"""The saved index: it comes back as it was, and what is no whole index is one clear error."""

import numpy as np
import pytest

from c2f_jax.errors import UserError
from c2f_jax.retrieval.index import GalleryIndex


@pytest.fixture
def index():
    embeddings = np.eye(3, 4, dtype=np.float32)
    media = [b"one", b"", b"three"]
    tokens, lengths = np.ones((3, 2, 5)), np.full(3, 2, np.int32)
    return GalleryIndex("image", "run@7", ["a", "b", "c"], media, embeddings, tokens, lengths)


def test_an_index_comes_back_as_it_was_saved(index, tmp_path):
    index.save(tmp_path / "folder" / "index.npz")
    found = GalleryIndex.load(tmp_path / "folder" / "index.npz")
    assert (found.kind, found.model, found.names, found.media) == (
        "image",
        "run@7",
        index.names,
        index.media,
    )
    for name in ("embeddings", "tokens", "lengths"):
        np.testing.assert_array_equal(getattr(found, name), getattr(index, name))


@pytest.mark.parametrize(
    "damage", ["half", "flipped", "text", "empty", "other arrays", "fewer rows", "less media"]
)
def test_what_is_no_whole_index_is_named(index, tmp_path, damage):
    path = tmp_path / "index.npz"
    index.save(path)
    stored, content = dict(np.load(path)), path.read_bytes()
    if damage == "other arrays":
        np.savez(path, names=np.zeros(3))
    elif damage == "fewer rows":
        np.savez(path, **stored | {"tokens": stored["tokens"][:2]})
    elif damage == "less media":
        np.savez(path, **stored | {"media": stored["media"][:3]})
    else:
        flipped = content.replace(b"onethree", b"onethrea")
        path.write_bytes(
            {"half": content[: len(content) // 2], "flipped": flipped, "text": b"a", "empty": b""}[
                damage
            ]
        )
    with pytest.raises(
        UserError,
        match="index.npz is not a readable index: make it again with `c2f index`",
    ):
        GalleryIndex.load(path)


def test_a_missing_index_and_a_path_that_cannot_be_written_are_named(index, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        GalleryIndex.load(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match="cannot be written"):
        index.save(tmp_path)
