"""The embedded data set: scenes, captions, voices, and the prepared TFDS splits."""

import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from c2f_jax.datasets.registry import load_pairs
from c2f_jax.datasets.spoken_scenes import builder, scenes, source, speech
from c2f_jax.errors import UserError

OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    directory = tmp_path_factory.mktemp("tfds")
    load_pairs("spoken_scenes/tiny", "train", str(directory))
    return str(directory)


def facts_told(sentence: str) -> frozenset:
    """What a listener learns from a caption, by a grammar written independently of the one that
    speaks."""
    nouns = re.findall(r"\ba (\w+) (\w+) (\w+)", sentence)
    small = {
        "small": True,
        "little": True,
        "tiny": True,
        "large": False,
        "big": False,
        "huge": False,
    }
    objects = [
        scenes.SceneObject("small" if small[size] else "large", color, shape)
        for size, color, shape in nouns
    ]
    relations = re.findall(r"\b(above|below|under|left|right)\b", sentence)
    relations = ["below" if word == "under" else word for word in relations]
    assert len(relations) == len(objects) - 1
    told = [(objects[0], relations[0], objects[1])]
    if len(objects) == 3:
        told.append(
            (objects[1] if "which is" in sentence else objects[0], relations[1], objects[2])
        )
    return frozenset(
        (a, r, b) if r in ("above", "left") else (b, OPPOSITE[r], a) for a, r, b in told
    )


def draw(count, seed=0):
    rng = np.random.default_rng(seed)
    return [scenes.draw_scene(rng) for _ in range(count)], rng


def test_every_caption_tells_the_whole_scene():
    described, rng = draw(400)
    for scene in described:
        for _ in range(3):
            sentence = scenes.caption(scene, rng)
            assert facts_told(sentence) == scene.facts(), sentence


def test_captions_of_a_crowded_scene_tell_each_pair_of_neighbours():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = scenes.draw_crowded_scene(rng)
        told = [facts_told(scenes.caption(scene, rng)) for _ in range(60)]
        assert frozenset().union(*told) == scene.facts() and {len(facts) for facts in told} == {1}


def test_no_caption_of_a_crowded_scene_is_true_of_another_one_to_be_ranked():
    config = builder.SpokenScenes.builder_configs["crowded"]
    seen = set()
    test = builder.distinct_scenes(config, "test", np.random.default_rng(0), seen)
    assert len(test) == len(seen) == 500
    assert max(Counter(fact for scene in test for fact in scene.facts()).values()) == 1


def test_captions_vary():
    (scene,), rng = draw(1)
    assert len({scenes.caption(scene, rng) for _ in range(60)}) > 10


def test_scenes_have_the_stated_make_up():
    described, _ = draw(3000)
    counts = Counter(len(s.objects) for s in described)
    assert set(counts) == {2, 3}
    assert abs(counts[2] / 3000 - 3 / 4) < 0.04
    for scene in described:
        assert len(set(scene.objects)) == len(scene.objects)
        if len(scene.objects) == 3:
            assert len({r in ("above", "below") for r in scene.relations}) == 2
    seen = [o for s in described for o in s.objects]
    assert {o.color for o in seen} == set(scenes.COLORS) and {o.shape for o in seen} == set(
        scenes.SHAPES
    )


def test_facts_ignore_the_order_of_telling():
    a, b, c = (scenes.SceneObject("small", color, "star") for color in ("red", "blue", "green"))
    assert scenes.Scene((a, b), ("above",)).facts() == scenes.Scene((b, a), ("below",)).facts()
    assert scenes.Scene((a, b), ("above",)).facts() != scenes.Scene((b, a), ("above",)).facts()
    assert (
        scenes.Scene((a, b, c), ("left", "below")).facts()
        == scenes.Scene((a, c, b), ("below", "left")).facts()
    )
    assert (
        scenes.Scene((a, b, c), ("left", "below")).facts()
        != scenes.Scene((b, a, c), ("right", "below")).facts()
    )


@pytest.mark.parametrize("relation", list(OPPOSITE))
@pytest.mark.parametrize("size", ["small", "large"])
def test_the_picture_shows_the_relation(relation, size):
    red, blue = (
        scenes.SceneObject(size, "red", "circle"),
        scenes.SceneObject("large", "blue", "square"),
    )
    for seed in range(10):
        picture = scenes.draw_image(
            scenes.Scene((red, blue), (relation,)), np.random.default_rng(seed)
        ).astype(int)
        assert picture.shape == (64, 64, 3)
        masks = [picture[..., 0] - picture[..., 2] > 90, picture[..., 2] - picture[..., 0] > 90]
        (red_x, red_y), (blue_x, blue_y) = [np.argwhere(m)[:, ::-1].mean(0) for m in masks]
        assert {
            "above": red_y < blue_y - 9,
            "below": red_y > blue_y + 9,
            "left": red_x < blue_x - 9,
            "right": red_x > blue_x + 9,
        }[relation]
        expected = np.pi * scenes.RADII[size] ** 2
        assert 0.7 * expected < masks[0].sum() < 1.35 * expected


def test_no_object_leaves_the_picture_or_touches_another():
    described, rng = draw(500)
    for scene in described:
        radii = [1.1 * scenes.RADII[o.size] for o in scene.objects]
        places = scenes._layout(scene, radii, rng)
        for i, (place, radius) in enumerate(zip(places, radii, strict=True)):
            assert (place - radius >= 0).all() and (place + radius <= 64).all()
            for other, other_radius in zip(places[:i], radii[:i], strict=True):
                assert np.linalg.norm(place - other) > 0.99 * (radius + other_radius)


def test_the_objects_of_a_crowded_scene_stay_in_their_quarters():
    rng = np.random.default_rng(0)
    reach = 1.1 * max(scenes.RADII.values())
    for _ in range(200):
        places = scenes._grid_layout(rng)
        for (x, y), (left, top) in zip(places, [(0, 0), (32, 0), (0, 32), (32, 32)], strict=True):
            assert (
                left <= x - reach
                and x + reach <= left + 32
                and top <= y - reach
                and y + reach <= top + 32
            )


def test_every_shape_can_be_told_from_every_other():
    outlines = {}
    for shape in scenes.SHAPES:
        picture = scenes.draw_image(
            scenes.Scene((scenes.SceneObject("large", "red", shape),), ()), np.random.default_rng(0)
        ).astype(int)
        outlines[shape] = picture[..., 0] - picture[..., 2] > 90
    for a in scenes.SHAPES:
        assert outlines[a].sum() > 60
        assert all((outlines[a] ^ outlines[b]).sum() > 40 for b in scenes.SHAPES if a != b)


def test_speakers_of_the_splits_are_disjoint_and_exist():
    loader = pytest.importorskip("espeakng_loader")
    everyone = [variant for split in speech.VARIANTS.values() for variant in split]
    assert len(everyone) == len(set(everyone))
    present = {p.name for p in (Path(loader.get_data_path()) / "voices" / "!v").iterdir()}
    assert set(everyone) <= present
    for accent in speech.ACCENTS:
        speech.speak(
            "a red star", voice=f"{accent}+f3", rate=200, pitch=50, pitch_range=50, level=-20
        )


def utterances(count, split="train"):
    described, rng = draw(count, seed=3)
    return [{"text": scenes.caption(s, rng), **speech.draw_voice(rng, split)} for s in described]


def test_an_utterance_does_not_depend_on_what_was_spoken_before_or_where():
    pytest.importorskip("espeakng_loader")
    every = utterances(40)
    forward = [speech.speak(**u) for u in every]
    backward = [speech.speak(**u) for u in every[::-1]][::-1]
    assert forward == backward
    assert list(speech.speak_all(every, processes=1)) == forward
    assert list(speech.speak_all(every, processes=3)) == forward
    assert len({audio for audio, _ in forward}) == 40


def test_spoken_audio_is_as_documented():
    pytest.importorskip("espeakng_loader")
    for u in utterances(12, "test"):
        audio, samples = speech.speak(**u)
        wave, rate = soundfile.read(io.BytesIO(audio))
        assert rate == 16_000 and wave.shape == (samples,) and 0.5 * rate < samples <= 5 * rate
        level = 20 * np.log10(np.sqrt(np.mean(wave**2)))
        assert abs(wave).max() < 0.96 and u["level"] - 6 < level < u["level"] + 0.1


def test_long_sentences_are_spoken_faster_and_never_exceed_five_seconds():
    pytest.importorskip("espeakng_loader")
    manner = {"voice": "en-us+m1", "rate": 170, "pitch": 50, "pitch_range": 50, "level": -22.0}
    sentence = (
        "a small red circle above a large blue square and to the left of a large yellow triangle"
    )
    _, samples = speech.speak(sentence + " and below a ring", **manner)
    assert 3.5 * 16_000 < samples <= 4.5 * 16_000
    _, samples = speech.speak(sentence * 8, **manner)
    assert samples == 5 * 16_000


def test_a_failing_worker_names_the_reason():
    pytest.importorskip("espeakng_loader")
    bad = {
        "text": "hello",
        "voice": "xx+nobody",
        "rate": 200,
        "pitch": 50,
        "pitch_range": 50,
        "level": -20.0,
    }
    with pytest.raises(RuntimeError, match=r"no voice 'xx\+nobody'"):
        list(speech.speak_all([bad], processes=1))


def test_stopping_early_leaves_no_process_behind():
    pytest.importorskip("espeakng_loader")
    psutil = pytest.importorskip("psutil")
    before = set(psutil.Process().children())
    spoken = speech.speak_all(utterances(200), processes=2)
    next(spoken)
    assert len(set(psutil.Process().children()) - before) == 2
    spoken.close()
    assert set(psutil.Process().children()) <= before


def test_a_process_that_has_spoken_leaves_no_files(tmp_path):
    pytest.importorskip("espeakng_loader")
    code = (
        "import runpy, sys; speech = runpy.run_path(sys.argv[1]);"
        "print(len(list(speech['speak_all']([eval(sys.argv[2])]))))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code, speech.__file__, repr(utterances(1)[0])],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "1" and not list(tmp_path.iterdir())


def test_workers_import_neither_jax_nor_tensorflow():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='worker');"
        "print([m for m in ('jax', 'tensorflow', 'c2f_jax') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, speech.__file__], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_splits_are_complete_and_disjoint(data_dir):
    found = {
        split: load_pairs("spoken_scenes/tiny", split, data_dir)
        for split in ("train", "validation", "test")
    }
    assert {s: (len(p), p.num_images) for s, p in found.items()} == {
        "train": (128, 64),
        "validation": (32, 16),
        "test": (32, 16),
    }
    keys, variants = [], {}
    for split, pairs in found.items():
        recordings = [pairs.recording(i) for i in range(len(pairs))]
        variants[split] = {r["speaker"].split("+")[1] for r in recordings}
        for i, r in enumerate(recordings):
            assert soundfile.info(io.BytesIO(r["audio"])).frames == pairs.num_samples[i]
        for row in range(pairs.num_images):
            of_row = [r for r, j in zip(recordings, pairs.image_index, strict=True) if j == row]
            told = {facts_told(r["caption"]) for r in of_row}
            assert (
                len(of_row) == 2 and len(told) == 1
            )  # both captions of a picture tell the same scene
            assert len({r["speaker"] for r in of_row}) == 2
            keys.append(told.pop())
        assert pairs.image_id(5) == f"{split}-00005"
        with Image.open(io.BytesIO(pairs.image(5))) as picture:
            assert picture.size == (64, 64) and picture.format == "PNG"
    assert len(keys) == len(set(keys)) == 96
    assert (
        not variants["train"] & variants["test"] and not variants["train"] & variants["validation"]
    )
    assert not variants["validation"] & variants["test"]
    assert found["train"].num_samples.max() <= 5 * 16_000


def test_a_second_call_makes_nothing(data_dir, monkeypatch):
    monkeypatch.setattr(speech, "speak_all", lambda *a, **k: pytest.fail("spoken again"))
    assert len(load_pairs("spoken_scenes/tiny", "test", data_dir)) == 32


def digest(data_dir, split="validation"):
    pairs = load_pairs("spoken_scenes/tiny", split, data_dir)
    blobs = [pairs.recording(i)["audio"] for i in range(len(pairs))] + [
        pairs.image(j) for j in range(pairs.num_images)
    ]
    return hashlib.sha256(b"".join(blobs)).hexdigest()


def test_an_interrupted_preparation_is_not_taken_for_complete(data_dir, tmp_path, monkeypatch):
    drawn, draw_image = [], scenes.draw_image

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == 40:  # in the last split, when two are written
            raise KeyboardInterrupt
        return draw_image(*args)

    monkeypatch.setattr(scenes, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_pairs("spoken_scenes/tiny", "validation", str(tmp_path))
    monkeypatch.setattr(scenes, "draw_image", draw_image)
    assert digest(str(tmp_path)) == digest(data_dir)  # made anew, and the same
    assert len(drawn) == 40


def test_without_espeak_the_error_tells_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'c2f_jax\[speech\]'"):
        load_pairs("spoken_scenes/tiny", "train", str(tmp_path))


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path):
    pytest.importorskip("espeakng_loader")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="data_dir"):
        load_pairs("spoken_scenes/tiny", "train", str(tmp_path / "file"))


def test_unknown_names(data_dir):
    with pytest.raises(
        UserError, match="no configuration 'huge'; it has default, simple, crowded, tiny"
    ):
        load_pairs("spoken_scenes/huge", "train", data_dir)
    with pytest.raises(UserError, match="no split 'dev'"):
        load_pairs("spoken_scenes/tiny", "dev", data_dir)
    with pytest.raises(UserError, match="no data set 'flickr8k'.*spoken_scenes"):
        load_pairs("flickr8k", "train")


def test_reading_needs_no_tensorflow(data_dir):
    code = (
        "import sys; from c2f_jax.datasets.registry import load_pairs;"
        "p = load_pairs('spoken_scenes/tiny', 'test', sys.argv[1]); p.recording(3); p.image(3);"
        "print('tensorflow' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, data_dir], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"


def test_the_builder_is_a_tfds_builder(data_dir):
    builder = source.prepared_builder("tiny", data_dir)
    assert str(builder.version) == "1.0.0" and builder.name == "spoken_scenes"
    assert builder.info.splits["train"].num_examples == 64
