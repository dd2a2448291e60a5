"""A data set is one file and a line of the registry: that of docs/extending.md is prepared and
read."""

import json
import sys

import numpy as np
import pytest
import tensorflow_datasets
from helpers.pages import python_blocks
from helpers.paths import ROOT
from helpers.published_sets import jpeg, put, wav

import c2f_jax.datasets
from c2f_jax.datasets import registry
from c2f_jax.datasets.prepare import dry_run, prepare
from c2f_jax.datasets.spoken_scenes import speech
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError


@pytest.fixture
def my_set(tmp_path, monkeypatch):
    """The file of the page and its line; returns the folder of what was downloaded."""
    (code,) = [b for b in python_blocks(ROOT / "docs" / "extending.md") if "FilePairs" in b]
    put(tmp_path / "package" / "my_set.py", code)
    monkeypatch.setattr(
        c2f_jax.datasets, "__path__", [*c2f_jax.datasets.__path__, str(tmp_path / "package")]
    )
    monkeypatch.setitem(registry.PUBLISHED, "my_set", "my_set:MySet")

    # TFDS refuses a second class of a name, and the tests of the pages run the block too.
    known = tensorflow_datasets.core.registered._DATASET_REGISTRY
    known.pop("my_set", None)

    folder, pairs = tmp_path / "downloads", []
    for k in range(6):
        put(folder / "images" / f"{k // 2}.jpg", jpeg(k // 2))
        put(folder / "recordings" / f"{k}.wav", wav(0.5, k))
        split = "test" if k > 3 else "train"
        pair = {"image": f"{k // 2}.jpg", "audio": f"{k}.wav", "split": split, "text": f"text {k}"}
        pairs.append(pair)
    put(folder / "pairs.json", json.dumps({"pairs": pairs}))
    yield folder
    known.pop("my_set", None)
    sys.modules.pop("c2f_jax.datasets.my_set", None)


def test_a_data_set_is_one_file_and_one_line(my_set, tmp_path):
    assert "train: 2 images, 4 recordings" in dry_run("my_set", manual_dir=str(my_set))
    assert "images.zip (2 GB)" in dry_run("my_set")
    data_dir = str(tmp_path / "tfds")
    with pytest.raises(UserError, match="my_set is not prepared in"):
        registry.load_pairs("my_set", "train", data_dir)
    assert prepare("my_set", manual_dir=str(my_set), data_dir=data_dir, progress=False) == "my_set"
    pairs = registry.load_pairs("my_set", "train", data_dir)
    np.testing.assert_array_equal(pairs.image_index, [0, 0, 1, 1])
    assert pairs.recording(3)["caption"] == "text 3" and pairs.image_id(1) == "1.jpg"
    assert len(registry.load_pairs("my_set", "test", data_dir)) == 2


@pytest.mark.parametrize("name", registry.PUBLISHED)
def test_names_of_file_layout_and_builder_agree(name):
    builder = registry.published_builder(name)
    assert builder.name == name == builder.LAYOUT.name == builder.__module__.rpartition(".")[2]


def test_workers_that_speak_use_the_rate_of_the_package():
    assert speech.SAMPLE_RATE == SAMPLE_RATE
