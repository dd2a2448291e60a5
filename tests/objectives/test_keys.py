"""Random streams and key sites: none shared by two purposes, and nothing drawn beside them."""

import ast
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.stats import hypergeom

import c2f_jax
from c2f_jax.data.batch_plan import plan_epoch
from c2f_jax.objectives.keys import Site, Stream, fold_keys, host_rng, row_keys, run_keys, step_key
from c2f_jax.train import shuffled_images

PACKAGE = Path(c2f_jax.__file__).parent
# Files whose own generators made data that is on users' disks; each says so where it makes one.
FIXED = {
    "datasets/spoken_scenes/builder.py",
    "datasets/spoken_scenes/speech.py",
    "exported/programs.py",
    "pretrained/extract_features.py",
    "search.py",
    "serving/service.py",
}
MAKERS = {"default_rng", "SeedSequence", "RandomState", "fold_in", "split", "PRNGKey", "seed"}


def calls(path):
    """Dotted names of what a file calls, with their line numbers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_two_purposes_share_a_number():
    for purposes in (Stream, Site):
        numbers = [int(purpose) for purpose in purposes.__members__.values()]
        assert len(set(numbers)) == len(numbers), purposes


def test_the_package_draws_through_keys_alone():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "objectives/keys.py":
            continue
        for called, node in calls(path):
            *module, function = called.split(".")
            if function in MAKERS and (
                "random" in module or function in ("default_rng", "fold_in")
            ):
                assert name in FIXED, f"{name}, line {node.lineno}: {called} in place of keys.py"
                found.add(name)
    assert found == FIXED


def test_each_purpose_is_used_and_takes_as_many_integers_everywhere():
    """A site that took a layer number here and none there could meet another site's key."""
    counts, first = defaultdict(set), {"host_rng": 2, "fold_keys": 2}
    for path in PACKAGE.rglob("*.py"):
        if path.name == "keys.py":
            continue
        text = path.read_text(encoding="utf-8")
        for purposes in (Stream, Site):
            for purpose in purposes:
                if f"{purposes.__name__}.{purpose.name}" in text:
                    counts[purpose.name] |= set()
        for called, node in calls(path):
            if called in first and isinstance(node.args[1], ast.Attribute):
                counts[node.args[1].attr].add(len(node.args) - first[called])
    assert set(counts) == {purpose.name for purposes in (Stream, Site) for purpose in purposes}
    assert all(len(numbers) <= 1 for numbers in counts.values()), counts


def test_streams_differ_whatever_integers_follow():
    drawn = set()
    seeds, numbers = (0, 1, 5, 2**40), ((), (0,), (1,), (0, 0), (1, 0), (0, 1), (2**33, 1))
    for seed in seeds:
        for stream in Stream:
            for more in numbers:
                drawn.add(host_rng(seed, stream, *more).integers(2**62))
    assert len(drawn) == len(seeds) * len(Stream) * len(numbers)
    again = [host_rng(np.int64(3), Stream.CROPS, np.int32(1), 2).integers(2**62) for _ in range(2)]
    assert again[0] == again[1] == host_rng(3, Stream.CROPS, 1, 2).integers(2**62)


def test_sites_differ_from_each_other_and_from_layers():
    keys = row_keys(step_key(run_keys(0)[1], 7), np.arange(2))
    folded = [fold_keys(keys, site) for site in Site]
    folded += [fold_keys(keys, Site.BLOCK, layer) for layer in range(48)]
    folded += [fold_keys(keys, Site.LAYER_DROP, layer) for layer in range(48)]
    words = np.concatenate([jax.random.key_data(key) for key in [keys, *folded]])
    assert len(np.unique(words, axis=0)) == len(words)
    assert fold_keys(None, Site.MLP) is None


def test_raw_and_typed_run_keys_give_the_same_steps():
    key = run_keys(3)[1]
    raw = step_key(jax.random.key_data(key), 4)
    np.testing.assert_array_equal(jax.random.key_data(raw), jax.random.key_data(step_key(key, 4)))


@pytest.mark.parametrize("seed", range(3))
def test_wrong_captions_are_spread_over_the_batches_of_every_epoch(seed):
    """The counts of wrong captions in the batches are those of draws without replacement."""
    recordings, size, share = 6000, 64, 0.3
    wrong = shuffled_images(np.arange(recordings), share, seed) != np.arange(recordings)
    assert wrong.sum() == share * recordings
    expected = hypergeom(recordings, int(wrong.sum()), size)
    for epoch in range(6):
        plan, _ = plan_epoch(
            np.full(recordings, 100),
            batch_size=size,
            bucket_samples=[100],
            seed=seed,
            epoch=epoch,
        )
        counts = wrong[plan].sum(axis=1)
        assert len(counts) == 93 and 0 < counts.min() and counts.max() < size
        # Chance of a batch this far out, over 93 batches of 18 epochs: below 1e-4.
        assert expected.cdf(counts.min()) > 1e-8 and expected.sf(counts.max() - 1) > 1e-8
        # Means of 93 counts and their variance, each within five of its standard deviations.
        assert abs(counts.mean() - expected.mean()) < 5 * expected.std() / 93**0.5
        assert abs(counts.var() / expected.var() - 1) < 5 * (2 / 92) ** 0.5
