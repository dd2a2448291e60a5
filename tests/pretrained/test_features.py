"""The feature cache: made once, resumed, read by the loader; a whole run on cached and foreign
tokens."""

import dataclasses
import io
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
import soundfile
from helpers.paths import ROOT
from helpers.tiny_whisper import WHISPER, whisper_tensors
from PIL import Image
from safetensors.numpy import save_file

from c2f_jax.config import caches
from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config
from c2f_jax.data import items, loader
from c2f_jax.data.augment import AugmentConfig, augment_wave
from c2f_jax.data.feature_cache import has_card, open_features, write_shard
from c2f_jax.data.source import ModelInputs
from c2f_jax.datasets.config import DataConfig
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.decoding.images import decode_image
from c2f_jax.errors import UserError
from c2f_jax.main import main
from c2f_jax.models.factory import create_model, create_tower
from c2f_jax.models.parameters import split_params
from c2f_jax.pretrained import extract_features as extraction
from c2f_jax.pretrained.extract_features import FeatureOptions, VariedCopy, extract_features
from c2f_jax.pretrained.networks import bare_tower
from c2f_jax.pretrained.weights import load_weights, open_card

SECONDS = {"train": 0.9, "validation": 0.6, "test": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of noise, six pairs a split, one of them unreadable, with tokens of its pictures
    and a Whisper."""
    folder = tmp_path_factory.mktemp("set")
    rng, rows, names = np.random.default_rng(0), [], []
    for split, seconds in SECONDS.items():
        for k in range(6):
            name = f"{split}{k}"
            size = round(16_000 * (seconds - 0.05 * k))
            soundfile.write(folder / f"{name}.wav", 0.1 * rng.normal(size=size), 16_000)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(
                folder / f"{name}.png"
            )
            names.append(f"{name}.png")
            speaker = "new" if (split, k) in (("test", 1), ("test", 4)) else f"speaker {k % 2}"
            row = {
                "image": names[-1],
                "audio": f"{name}.wav",
                "split": split,
                "seconds": size / 16_000,
            }
            rows.append(row | {"speaker": speaker})
    (folder / "validation2.wav").write_bytes(b"not audio")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = rng.normal(size=(len(names), 4, 7)).astype(np.float16)
    np.savez(folder / "tokens.npz", names=np.array(names), tokens=tokens)
    weights = folder / "whisper"
    weights.mkdir()
    save_file(whisper_tensors(), weights / "model.safetensors")
    (weights / "config.json").write_text(json.dumps(WHISPER))
    return folder


@pytest.fixture(scope="module")
def cache(data):
    """The cache of all splits, through the command line."""
    output = data / "features"
    command = [
        "features",
        f"--weights={data}/whisper",
        f"--data={data}/manifest.jsonl",
        "--max-seconds=1",
    ]
    assert main([*command, f"--output={output}", "--splits=train,validation"]) == 2, (
        "one of six recordings cannot be read"
    )
    assert (
        not (output / "validation-speech-00000.json").exists()
        and (output / "train-speech-00000.json").exists()
    )
    extract(data, output)
    return output


def sources(data, share=0.5):
    return [load_pairs(f"{data}/manifest.jsonl", split, max_bad_share=share) for split in SECONDS]


def extract(data, output, batch_size=16, **options):
    options = FeatureOptions(**{"max_seconds": 1.0} | options)
    return extract_features(str(data / "whisper"), sources(data), output, options, batch_size)


def test_cached_tokens_are_those_of_the_utterance_alone(data, cache):
    features = open_features(cache)
    assert len(features) == 17 and "validation2.wav" not in features
    card = open_card(data / "whisper")
    tower, params = create_tower(bare_tower(card)), load_weights(data / "whisper")
    for key in ("train0.wav", "test5.wav"):
        wave, _ = soundfile.read(data / key, dtype="float32")
        alone, lengths, _ = tower.apply(
            {"params": params}, wave[None], np.array([len(wave)], np.int32)
        )
        found = features.tokens(key)
        assert found.dtype == np.float16 and len(found) == lengths[0] == -(-len(wave) // 320)
        np.testing.assert_allclose(found, alone[0], atol=5e-3)  # float16
    assert (
        features.card["weights"] == [s["sha256"] for s in card["source"]]
        and features.card["layer"] == "last"
    )


def test_a_stopped_extraction_goes_on_and_a_finished_one_does_nothing(
    data, cache, tmp_path, monkeypatch
):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    (
        copy / "train-speech-00000.json"
    ).unlink()  # as if it had been stopped while it wrote this shard
    read = []
    load = items.load_wave
    monkeypatch.setattr(
        extraction, "load_wave", lambda source, row: read.append(source.split) or load(source, row)
    )
    extract(data, copy)
    assert read == ["train"] * 6
    np.testing.assert_array_equal(
        open_features(copy).tokens("train3.wav"), open_features(cache).tokens("train3.wav")
    )
    extract(data, copy)
    assert read == ["train"] * 6


def test_a_cache_of_another_kind_is_refused(data, cache):
    with pytest.raises(UserError, match="layer: 'last' there, '1' wanted"):
        extract(data, cache, layer="1")
    others = load_pairs(f"{data}/manifest.jsonl", "train")
    others.recording_key = lambda row: f"other{row}.wav"
    with pytest.raises(
        UserError, match="features of other data, such as train0.wav in train-speech-00000"
    ):
        extract_features(str(data / "whisper"), [others], cache, FeatureOptions(max_seconds=1.0))


def test_a_card_in_the_old_spelling_is_the_same_card(tmp_path):
    tower = {"name": "wav2vec2", "normalise": True}
    (tmp_path / "card.json").write_text(json.dumps({"tower": tower, "layer": "last"}))
    current = {"tower": {"name": "wav2vec2", "normalize": True}, "layer": "last"}
    assert has_card(tmp_path, current)
    with pytest.raises(UserError, match="another kind"):
        has_card(tmp_path, current | {"tower": {"name": "wav2vec2", "normalize": False}})


@pytest.mark.parametrize(
    "option, message",
    [
        ({"layer": "weighted_sum"}, "layer='weighted_sum': choose one of last, all, 0, 1, 2"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"max_seconds": 0.0}, "max_seconds=0.0: must be at least"),
    ],
)
def test_a_mistaken_option_leaves_no_cache_behind(data, tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        extract(data, tmp_path / "new", **option)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="file cannot be written"):
        extract(data, tmp_path / "file")


def test_all_layers(data, tmp_path):
    features = extract(data, tmp_path / "all", layer="all")
    assert features.shape == (3, 8)
    last = extract(data, tmp_path / "last")
    np.testing.assert_array_equal(features.tokens("test1.wav")[:, -1], last.tokens("test1.wav"))


def test_shards_are_divided_among_processes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD", 2)
    whole = extract(data, tmp_path / "whole")
    for process in (1, 0):
        monkeypatch.setattr(extraction, "share_work", lambda work, p=process: [work(p, 2)])
        parts = extract(data, tmp_path / "parts")
        assert (len(parts) < len(whole)) == (process == 1)
    for split in SECONDS:
        for k in range(6):
            if (split, k) != ("validation", 2):
                key = f"{split}{k}.wav"
                np.testing.assert_allclose(parts.tokens(key), whole.tokens(key), atol=5e-3)


def test_the_loader_reads_tokens_crops_them_and_names_what_is_missing(data, cache):
    train, validation, _ = sources(data)
    for source in (train, validation):
        source.inputs = ModelInputs(
            speech_features=open_features(cache), image_features=open_features(data / "tokens.npz")
        )
    options = loader.BatchOptions(
        batch_size=6, image_size=8, bucket_seconds=(0.8,), seed=0, threads=0
    )
    batches = loader.train_batches(train, options)
    _, batch = next(batches)
    assert batch["speech_tokens"].shape == (6, 40, 8) and batch["image_tokens"].shape == (6, 4, 7)
    assert {x.dtype for x in (batch["speech_tokens"], batch["image_tokens"])} == {
        np.dtype(np.float16)
    }
    assert sorted(batch["speech_lengths"]) == [33, 35, 38, 40, 40, 40]
    by_length = {int(n): row for row, n in enumerate(batch["speech_lengths"])}
    np.testing.assert_array_equal(
        batch["speech_tokens"][by_length[33], :33], open_features(cache).tokens("train5.wav")
    )
    assert not np.any(batch["speech_tokens"][by_length[33], 33:])
    rows = list(loader.speech_batches(validation, batch_size=4, seconds_max=1.0, threads=0))
    index, valid = (np.concatenate([r[name] for r in rows]) for name in ("index", "valid"))
    assert sorted(index[valid]) == [0, 1, 3, 4, 5] and len(index) == 8
    assert any(
        "no features of validation2.wav" in reason
        for reason in validation.bad_items.reasons.values()
    )
    (images,) = loader.image_batches(validation, batch_size=6, image_size=8, threads=0)
    np.testing.assert_array_equal(
        images["image_tokens"][3], open_features(data / "tokens.npz").tokens("validation3.png")
    )


def test_varied_copies_are_the_network_s_tokens_of_varied_recordings(data, cache, tmp_path):
    train = sources(data)[0]
    varied = AugmentConfig(speed=0.3, flip=0.5)
    copies = [
        extract_features(
            str(data / "whisper"),
            [train],
            tmp_path / f"copy{copy}",
            FeatureOptions(max_seconds=1.0, varied=VariedCopy(varied, copy)),
        )
        for copy in (1, 2)
    ]
    assert copies[1].card["copy"] == 2 and copies[1].card["augment.speed"] == 0.3
    assert "augment.flip" not in copies[1].card, (
        "pictures do not change what a network makes of recordings"
    )
    with pytest.raises(
        UserError, match=r"another kind:\n  augment.speed: 0.3 there, 0.2 wanted\nremove it or"
    ):
        slower = dataclasses.replace(varied, speed=0.2)
        extract(data, tmp_path / "copy1", varied=VariedCopy(slower, 1))
    wave = augment_wave(items.load_wave(train, 4), varied, np.random.default_rng((2, 4)))
    tower = create_tower(bare_tower(open_card(data / "whisper")))
    wave = wave / np.float32(32768)
    params = load_weights(data / "whisper")
    alone, lengths, _ = tower.apply({"params": params}, wave[None], np.array([len(wave)], np.int32))
    assert len(copies[1].tokens("train4.wav")) == lengths[0]
    np.testing.assert_allclose(copies[1].tokens("train4.wav"), alone[0], atol=5e-3)

    train.inputs = ModelInputs(speech_features=open_features(cache), speech_copies=tuple(copies))
    drawn = []
    options = {
        "batch_size": 6,
        "image_size": 8,
        "bucket_seconds": (1.3,),
        "seed": 0,
        "augment": varied,
    }
    for start in (0, 10):
        batch_options = loader.BatchOptions(threads=0, cache_mib=start, **options)
        batches = loader.train_batches(train, batch_options, start_step=start)
        drawn += [batch for _, batch in itertools.islice(batches, 20 - start)]
    counts = np.zeros(3)
    lengths = {len(c.tokens("train4.wav")) for c in (*copies, train.inputs.speech_features)}
    assert len(lengths) > 1, "speeds differ"
    for step, batch in enumerate(drawn[:20]):
        for row, identity in enumerate(batch["image_id"]):
            index = int(np.flatnonzero(train.image_ids[train.image_index] == identity)[0])
            key, length = train.recording_key(index), batch["speech_lengths"][row]
            given = batch["speech_tokens"][row, :length]
            same = [
                np.array_equal(given, c.tokens(key))
                for c in (train.inputs.speech_features, *copies)
            ]
            assert sum(same) == 1
            counts += same
        if (
            step >= 10
        ):  # a run that starts there draws the same, whether tokens are kept in memory or not
            np.testing.assert_array_equal(batch["speech_tokens"], drawn[step + 10]["speech_tokens"])
    assert counts.min() > 25, f"120 draws among three: {counts}"


def test_token_files_are_checked(tmp_path):
    with pytest.raises(UserError, match="there are no features"):
        open_features(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a feature cache"):
        open_features(tmp_path)
    path = tmp_path / "tokens.npz"
    np.savez(path, names=np.array(["a"]), tokens=np.zeros((2, 3, 4)))
    with pytest.raises(UserError, match="1 names, 1 lengths and tokens of shape"):
        open_features(path)
    path = tmp_path / "broken.npz"
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match="not a token file"):
        open_features(path)
    path = tmp_path / "speech.npz"
    np.savez(path, names=np.array(["a", "b"]), tokens=np.zeros((2, 3, 4)), lengths=np.array([3, 2]))
    assert len(open_features(path).tokens("b")) == 2
    with pytest.raises(UserError, match="its card needs samples_per_token"):
        open_features(path).tokens_of_samples(100)
    path.with_suffix(".json").write_text('{"samples_per_token": 320}')
    os.utime(path)
    assert open_features(path).tokens_of_samples(641) == 3


def test_a_shard_without_items_is_finished_too(tmp_path):
    (tmp_path / "card.json").write_text("{}")
    write_shard(tmp_path, "test-speech-00000", [], (5,))
    assert len(open_features(tmp_path)) == 0 and open_features(tmp_path).shape == (5,)


def overrides(data, workdir_features):
    return [
        f"--config.data.speech_features={workdir_features}",
        "--config.data.max_bad_share=0.5",
        "--config.data.bucket_seconds=(0.8,)",
        "--config.data.max_seconds=1.0",
        "--config.batch_size=4",
        "--config.steps=3",
        "--config.eval_every=2",
        "--config.checkpoint_every=2",
        "--config.log_every=1",
        "--config.queue_size=6",
        "--config.eval.k=3",
        "--config.eval.resamples=20",
        "--config.model.speech.width=16",
        "--config.model.image.width=16",
        "--config.model.multimodal.width=16",
    ]


@pytest.mark.slow
def test_a_run_on_cached_speech_and_foreign_image_tokens(data, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(f"""
from ml_collections import ConfigDict
from c2f_jax.config import default_config
def get_config():
    config = default_config()
    config.data.name = "{data}/manifest.jsonl"
    config.data.image_features = "{data}/tokens.npz"
    small = {{"width": 8, "depth": 1, "heads": 2}}
    speech = {{"name": "published", "weights": "{data}/whisper", "pool": 2}}
    config.model.speech = ConfigDict(small | speech)
    config.model.image = ConfigDict(small | {{"name": "tokens"}})
    return config
""")
    flags, run = overrides(data, tmp_path / "cache"), tmp_path / "run"
    flags += ["--config.data.speech_copies=1", "--config.data.augment.speed=0.2"]
    assert main(["train", f"--config={config}", f"--workdir={run}", *flags]) == 0
    assert "R@1" in capsys.readouterr().out
    assert (tmp_path / "cache" / "test-speech-00000.npy").exists()
    copies = sorted(path.name for path in (tmp_path / "cache-copy1").glob("*.npy"))
    assert copies == ["train-speech-00000.npy"]
    first = json.loads((run / "eval" / f"{data.name}-test.json").read_text())
    # The same command resumes, with the frozen network from its weights; evaluation reads the
    # cache.
    assert (
        main(
            [
                "train",
                f"--config={config}",
                f"--workdir={run}",
                *flags,
                "--config.steps=4",
                "--by-voice",
            ]
        )
        == 0
    )
    assert main(["evaluate", f"--workdir={run}", "--step=latest"]) == 0
    assert first["split"] == "test"
    # A cache that has been replaced by one of another network is noticed.
    card = tmp_path / "cache" / "card.json"
    kept = card.read_text()
    card.write_text(kept.replace('"last"', '"1"'))
    assert main(["evaluate", f"--workdir={run}", "--step=latest"]) == 2
    assert "layer: '1' there, 'last' wanted" in capsys.readouterr().err
    card.write_text(kept)
    voices = json.loads((run / "eval" / f"{data.name}-test-voices.json").read_text())
    counts = {name: result["queries"] for name, result in voices.items()}
    assert counts["heard"]["speech_to_image"] == 4 and counts["unheard"]["speech_to_image"] == 2
    assert counts["heard"]["gallery_images"] == counts["unheard"]["gallery_images"] == 6
    # A recording that is in no cache goes through the network: the same answer as from its cached
    # tokens.
    from c2f_jax.inference import TrainedModel, encode_speech

    model = TrainedModel.load(run)
    features = open_features(tmp_path / "cache")
    wave, _ = soundfile.read(data / "test0.wav", dtype="float32")
    tokens = features.tokens("test0.wav")
    raw = encode_speech(
        model.experiment.model, model.params, wave[None], np.array([len(wave)], np.int32)
    )
    cached = encode_speech(
        model.experiment.model,
        model.params,
        tokens[None].astype(np.float32),
        np.array([len(tokens)], np.int32),
    )
    np.testing.assert_allclose(raw.embedding, cached.embedding, atol=5e-3)
    index = tmp_path / "gallery.npz"
    assert main(["index", f"--workdir={run}", "--kind=speech", f"--output={index}"]) == 0
    capsys.readouterr()
    assert main(["index", f"--workdir={run}", "--kind=image", f"--output={index}"]) == 2
    assert "no network to make them with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"speech": {"name": "published"}}, r"model\.speech\.weights is not set"),
        (
            {"speech": {"name": "log_mel", "weights": "x"}},
            r"model\.speech\.weights needs model.speech.name",
        ),
        ({"image": {"name": "tokens"}}, r"model\.image\.name='tokens' reads a feature cache"),
        (
            {"speech_features": "x"},
            r"data\.speech_features needs model\.speech\.name to be 'published' or 'tokens'",
        ),
        (
            {"speech": {"name": "tokens", "depth": 0, "conv_blocks": 2}},
            "model.speech.conv_blocks=2: the convolutions are under a transformer, which depth 0",
        ),
        (
            {"speech_copies": 1},
            "data.speech_copies=1 needs data.speech_features",
        ),
        (
            {"image_resize": "crop"},
            "data.image_resize='crop': choose one of square, short_side, squash",
        ),
    ],
)
def test_configurations_that_contradict_themselves(changes, message):
    from ml_collections import ConfigDict

    config = load_config(f"{ROOT}/configs/spoken_scenes.py")
    for name, value in changes.items():
        if isinstance(value, dict):
            config.model = ConfigDict(config.model.to_dict() | {name: value})
        else:
            config.data[name] = value
    with pytest.raises(UserError, match=message):
        create_experiment(config)


def test_attributes_that_a_configuration_changes_are_the_cache_s_too(data, tmp_path):
    from ml_collections import ConfigDict

    config = load_config(f"{ROOT}/configs/spoken_scenes.py")
    config.data.speech_features = str(tmp_path / "cache")
    small = {"width": 8, "depth": 1, "heads": 2}
    speech = small | {"name": "published", "weights": f"{data}/whisper", "tower": {"pad": True}}
    config.model.speech = ConfigDict(speech)
    (cache,) = caches.network_caches(create_experiment(config))
    assert cache.part == "speech" and cache.weights == f"{data}/whisper"
    assert cache.path == str(tmp_path / "cache")
    assert cache.options == FeatureOptions(
        layer="last", max_seconds=config.data.max_seconds, tower={"pad": True}
    )
    config.data.speech_features = f"{data}/tokens.npz"
    with pytest.raises(
        UserError,
        match="holds the tokens of another tool: read them with model.speech.name='tokens'",
    ):
        create_experiment(config)


def test_cached_items_of_a_prepared_set_are_not_read(tiny_data_dir, tmp_path, monkeypatch):
    pairs = load_pairs("spoken_scenes/tiny", "test", tiny_data_dir)
    tokens = np.ones((2, 3), np.float16)
    write_shard(tmp_path, "test-speech-00000", [(pairs.recording_key(1), tokens)], (3,))
    (tmp_path / "card.json").write_text("{}")
    pairs.inputs = ModelInputs(speech_features=open_features(tmp_path))
    monkeypatch.setattr(pairs, "recording", lambda index: pytest.fail("the recording was read"))
    np.testing.assert_array_equal(items.load_speech_input(pairs, 1), tokens)
    assert pairs.recording_key(1).startswith("spoken_scenes/tiny/"), (
        "caches of two prepared sets do not mix"
    )


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (123, 124), (64, 64)])
@pytest.mark.parametrize("resize, side", [("short_side", 64), ("short_side", 73), ("squash", 64)])
def test_image_preprocessing_matches_the_reference(tmp_path, size, resize, side):
    # The reference processors of CLIP and DINOv2 resize the short side and cut out the centre,
    # those of BLIP-2 and SigLIP squash: bicubic, at whole pixels.
    rng = np.random.default_rng(sum(size))
    smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "picture.jpg", quality=95)
    found = decode_image(str(tmp_path / "picture.jpg"), 64, resize=resize, resize_side=side)
    image = Image.open(tmp_path / "picture.jpg").convert("RGB")
    if resize == "squash":
        expected = image.resize((64, 64), Image.Resampling.BICUBIC)
    else:
        short = min(image.size)
        whole = image.resize(tuple(side * n // short for n in image.size), Image.Resampling.BICUBIC)
        left, top = ((n - 64) // 2 for n in whole.size)
        expected = whole.crop((left, top, left + 64, top + 64))
    assert np.abs(found.astype(int) - np.asarray(expected, int)).max() <= 1


def test_a_strip_is_cut_before_it_is_resized():
    strip = np.zeros((4, 4000, 3), np.uint8)
    strip[:, 1990:2010] = 200
    file = io.BytesIO()
    Image.fromarray(strip).save(file, "PNG")
    found = decode_image(file.getvalue(), 32, resize="short_side")
    assert found.shape == (32, 32, 3) and found.min() == 200


@pytest.mark.parametrize("name", ["flickr8k_audio", "spoken_coco", "places_audio"])
@pytest.mark.parametrize("arg", ["base", "large_finetuned"])
def test_shipped_configurations_of_published_sets_build_their_model(name, arg):
    config = load_config(f"{ROOT}/configs/{name}.py:{arg}")
    with pytest.raises(UserError, match="weights/hubert_.* does not exist"):
        create_experiment(config)
    values = config.model.to_dict()
    speech, image = (
        {k: v for k, v in values.pop(part).items() if k != "weights"}
        for part in ("speech", "image")
    )
    speech["tower"] = {"name": "wav2vec2"} | (
        {"width": 1024, "depth": 24, "heads": 16} if "large" in arg else {}
    )
    image["tower"] = {"name": "blip2", "vision": {"name": "vision_transformer", "patch": 14}}
    model = create_model(speech, image, values.pop("multimodal"), **values)
    batch = example_batch(dataclasses.replace(DataConfig(config.data.name), bucket_seconds=(1.0,)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    trained, frozen = split_params(shapes, model.frozen)
    assert set(frozen["image_encoder"]) == {"tower"} and "tower" not in trained["image_encoder"]
    assert ("tower" in trained["speech_encoder"]) == arg.endswith("finetuned")
    if arg.endswith("finetuned"):
        masked = load_config(
            f"{ROOT}/configs/{name}.py:{arg}", ["--config.model.speech.tower.mask_time=0.05"]
        )
        assert masked.model.speech.tower.mask_time == 0.05
    assert set(frozen["speech_encoder"]["tower"]) >= {"conv"}


@pytest.fixture
def own(data, tmp_path):
    """A copy of the data set, free to change, with its cache of the test split."""
    folder = tmp_path / "own"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("features*"))
    extract_test(data, folder, tmp_path / "cache")
    return folder


def extract_test(data, folder, output):
    source = load_pairs(f"{folder}/manifest.jsonl", "test")
    options = FeatureOptions(max_seconds=1.0)
    return extract_features(str(data / "whisper"), [source], output, options)


def store(path, seed, keep_time=False):
    """Another recording of equal length in place of one."""
    about = path.stat()
    samples = soundfile.info(path).frames
    soundfile.write(path, 0.1 * np.random.default_rng(seed).normal(size=samples), 16_000)
    assert path.stat().st_size == about.st_size
    if keep_time:
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_features_of_other_recordings_of_the_same_names_are_refused(data, own, tmp_path):
    for k in range(6):
        store(own / f"test{k}.wav", 100 + k)
    with pytest.raises(UserError, match="holds features of other data, such as test0.wav"):
        extract_test(data, own, tmp_path / "cache")


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_replaced_recording_is_computed_anew(data, own, tmp_path, keep_time):
    store(own / "test3.wav", 7, keep_time)
    before = open_features(tmp_path / "cache")
    old = {k: np.array(before.tokens(f"test{k}.wav")) for k in range(6)}

    # Until then, reading names it.
    source = load_pairs(f"{own}/manifest.jsonl", "test", max_bad_share=0.5)
    source.inputs = ModelInputs(speech_features=before)
    assert [items.load_speech_input(source, k) is None for k in range(6)] == [
        k == 3 for k in range(6)
    ]
    (reason,) = source.bad_items.reasons.values()
    assert "features of another test3.wav" in reason and "c2f features" in reason

    after = extract_test(data, own, tmp_path / "cache")
    changed = [not np.array_equal(after.tokens(f"test{k}.wav"), old[k]) for k in range(6)]
    assert changed == [k == 3 for k in range(6)]
    alone = extract_test(data, own, tmp_path / "alone")
    np.testing.assert_array_equal(after.tokens("test3.wav"), alone.tokens("test3.wav"))


def test_rows_that_were_added_and_files_that_were_repaired_get_features(data, own, tmp_path):
    manifest = (own / "manifest.jsonl").read_text()
    soundfile.write(own / "new.wav", np.full(8000, 0.1), 16_000)
    row = {"image": "test0.png", "audio": "new.wav", "split": "test", "seconds": 0.5}
    (own / "manifest.jsonl").write_text(manifest + json.dumps(row) + "\n")
    assert "new.wav" in extract_test(data, own, tmp_path / "cache")

    content = (own / "test1.wav").read_bytes()
    (own / "test1.wav").write_bytes(b"not audio")
    source = load_pairs(f"{own}/manifest.jsonl", "test", max_bad_share=0.5)
    options = FeatureOptions(max_seconds=1.0)
    broken = extract_features(str(data / "whisper"), [source], tmp_path / "cache", options)
    assert "test1.wav" not in broken and len(broken) == 6
    (own / "test1.wav").write_bytes(content)
    assert "test1.wav" in extract_test(data, own, tmp_path / "cache")


def test_a_moved_or_touched_data_set_keeps_its_features(data, own, tmp_path, monkeypatch):
    for path in own.iterdir():
        os.utime(path)
    shutil.move(own, tmp_path / "moved")
    monkeypatch.setattr(extraction, "write_shard", lambda *_: pytest.fail("computed again"))
    assert len(extract_test(data, tmp_path / "moved", tmp_path / "cache")) == 6


def test_shards_of_a_split_that_became_shorter_are_removed(data, own, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD", 2)
    output = tmp_path / "many"
    extract_test(data, own, output)
    rows = [json.loads(line) for line in open(own / "manifest.jsonl")]
    left = [row for row in rows if row["audio"] not in ("test0.wav", "test1.wav", "test4.wav")]
    (own / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in left))
    extract_test(data, own, output)
    names = sorted(path.name for path in output.glob("*-*.*"))
    assert names == [f"test-speech-0000{k}.{kind}" for k in range(2) for kind in ("json", "npy")]
