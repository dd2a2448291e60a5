"""A run in mteb's own evaluation scores as in ours."""

import dataclasses
import io

import jax
import numpy as np
import pytest
import soundfile
from helpers.odd_recordings import OddRecordings
from helpers.pages import python_blocks
from helpers.paths import CONFIGS, ROOT

from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_config
from c2f_jax.errors import UserError
from c2f_jax.evaluate import evaluate_encoded
from c2f_jax.inference import TrainedModel
from c2f_jax.training.parallel import replicate

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install 'c2f_jax[mteb]'")
pytestmark = pytest.mark.slow  # mteb imports PyTorch

import torch  # noqa: E402
from datasets import Audio, Dataset, Features, Image, Value  # noqa: E402
from mteb.models.models_protocols import EncoderProtocol, SearchProtocol  # noqa: E402
from mteb.tasks.retrieval.eng.spoken_coco_retrieval import (  # noqa: E402
    SpokenCOCOA2IRetrieval,
    SpokenCOCOI2ARetrieval,
)
from mteb.types import PromptType  # noqa: E402

from c2f_jax.harnesses.mteb import MtebEncoder, MtebSearch  # noqa: E402

FLAGS = [
    "--config.eval.batch_size=10",
    "--config.eval.pair_batch_size=30",
    "--config.eval.k=5",
    "--config.data.max_seconds=1.0",
]


@pytest.fixture(scope="module")
def source():
    return OddRecordings()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model whose embeddings are far apart."""
    experiment = create_experiment(load_config(f"{CONFIGS}/spoken_scenes.py:runlocal", FLAGS))
    init = jax.jit(experiment.model.init)
    params = init(jax.random.key(3), example_batch(experiment.data))["params"]
    return TrainedModel(experiment, replicate(params, None), 10, tmp_path_factory.mktemp("run"), {})


@pytest.fixture(scope="module")
def ours(model, source):
    return evaluate_encoded(model, model.encode_split(source))


def table(column, contents, feature):
    """A data set of files, stored as on the hub, to be decoded by ``feature``."""
    files = [{"bytes": content, "path": None} for content in contents]
    rows = {"id": [f"{column}-{row}" for row in range(len(files))], column: files}
    stored = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"id": Value("string"), column: stored})
    return Dataset.from_dict(rows, features).cast_column(column, feature)


def sides(source):
    """The recordings and the images as mteb has them."""
    audio = [source.file(row) for row in range(len(source))]
    image = [source.image(row) for row in range(source.num_images)]
    return table("audio", audio, Audio()), table("image", image, Image())


def in_memory(task_class, source, audio, image):
    """A real task of mteb, with small data in place of its own."""
    task = task_class()
    pairs = [(f"audio-{row}", f"image-{image}") for row, image in enumerate(source.image_index)]
    spoken = task.metadata.category == "a2i"
    relevant = {}
    for recording, picture in pairs:
        query, answer = (recording, picture) if spoken else (picture, recording)
        relevant.setdefault(query, {})[answer] = 1
    queries, corpus = (audio, image) if spoken else (image, audio)
    split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
    task.dataset = {"default": {"test": split}}
    task.data_loaded = True
    return task


def scores_of(model, task):
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    (task_result,) = result.task_results
    return task_result.scores["test"][0], result


def assert_equal_scores(theirs, stage, direction):
    metrics = stage.direction(direction)
    assert theirs["ndcg_at_10"] == pytest.approx(metrics["nDCG@10"].value, abs=1e-5)
    for cut in (1, 5, 10):
        for name, own in (("recall_at", "fraction_recall@"), ("hit_rate_at", "R@")):
            value = metrics[f"{own}{cut}"].value / 100
            assert theirs[f"{name}_{cut}"] == pytest.approx(value, abs=1e-5)
    assert 0 < theirs["ndcg_at_10"] < 1


TASKS = {"s2i": SpokenCOCOA2IRetrieval, "i2s": SpokenCOCOI2ARetrieval}


@pytest.mark.parametrize("direction", TASKS)
def test_the_coarse_stage_scores_as_ours(model, source, ours, direction, capsys):
    task = in_memory(TASKS[direction], source, *sides(source))
    theirs, result = scores_of(MtebEncoder(model), task)
    assert_equal_scores(theirs, ours.coarse, direction)
    assert result.model_revision == model.fingerprint
    shown = capsys.readouterr().out
    over_long = int((source.num_samples > 16_000).sum())
    assert f"note: over-long, {over_long}, " in shown
    assert "note: other sample rate, 16, converted to 16 kHz" in shown
    assert "note: stereo, 6, " in shown


@pytest.mark.parametrize("direction", TASKS)
def test_both_stages_score_as_ours(model, source, ours, direction):
    task = in_memory(TASKS[direction], source, *sides(source))
    theirs, _ = scores_of(MtebSearch(model), task)
    assert_equal_scores(theirs, ours.fine, direction)
    assert ours.fine != ours.coarse


def test_the_documented_program_runs(model, source, tmp_path, monkeypatch, capsys):
    tasks = [in_memory(task, source, *sides(source)) for task in TASKS.values()]
    by_name = {task.metadata.name: task for task in tasks}
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [by_name[name] for name in tasks])
    monkeypatch.setattr(TrainedModel, "load", lambda workdir: model)
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path))
    exec(python_blocks(ROOT / "docs/harnesses.md", "py")[1], {"__name__": "block"})  # noqa: S102
    assert capsys.readouterr().out.count("SpokenCOCOI2ARetrieval") >= 2


def test_results_of_the_stages_are_kept_apart(model, tmp_path):
    """In mteb's cache, from which it takes a result that it has."""
    cache = mteb.ResultCache(tmp_path)
    paths = {
        cache.get_task_result_path("Some", wrapped.mteb_model_meta)
        for wrapped in (MtebEncoder(model), MtebSearch(model))
    }
    other = dataclasses.replace(model.experiment.eval, k=7)
    other = dataclasses.replace(model.experiment, eval=other)
    again = dataclasses.replace(model, experiment=other)
    paths.add(cache.get_task_result_path("Some", MtebSearch(again).mteb_model_meta))
    assert len(paths) == 3


def test_arrays_are_read_as_files(model, source):
    """As sets without files hold them, channels first or last."""
    items = []
    for row in range(8):
        wave, rate = soundfile.read(io.BytesIO(source.file(row)), dtype="float32")
        wave = wave.T if row < 4 else wave
        items.append({"array": wave, "sampling_rate": rate})
    waves = table("audio", [source.file(row) for row in range(8)], Audio())
    of_files = encode(model, SpokenCOCOA2IRetrieval, waves)
    for row, item in enumerate(items):
        data = Dataset.from_list([{"audio": item}])
        of_array = encode(model, SpokenCOCOA2IRetrieval, data)
        np.testing.assert_allclose(of_array[0], of_files[row], atol=1e-3)
    # Arrow gives integers of any size as int64: their full scale is unknown.
    integers = {"array": np.zeros(9000, np.int16), "sampling_rate": 16_000}
    with pytest.raises(UserError, match="audio 0: int64 of shape .* is no recording"):
        encode(model, SpokenCOCOA2IRetrieval, Dataset.from_list([{"audio": integers}]))


def encode(model, task, data):
    loader = torch.utils.data.DataLoader(data)
    where = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    return MtebEncoder(model).encode(loader, prompt_type=PromptType.query, **where)


def test_what_cannot_be_scored_is_refused(model, source):
    silent = table("audio", [source.file(0), b"RIFF"], Audio())
    with pytest.raises(UserError, match="SpokenCOCOA2IRetrieval, test split, audio 1: "):
        encode(model, SpokenCOCOA2IRetrieval, silent)
    with pytest.raises(UserError, match="str is no recording"):
        encode(model, SpokenCOCOA2IRetrieval, Dataset.from_dict({"audio": ["a.wav"]}))
    with pytest.raises(UserError, match="no speech items"):
        encode(model, SpokenCOCOA2IRetrieval, silent.select([]))
    text = mteb.get_task("NFCorpus")
    with pytest.raises(UserError, match="NFCorpus has text in one item"):
        encode(model, text, Dataset.from_dict({"text": ["a"]}))
    method = dataclasses.replace(model.experiment.method, sim_weight=0.0)
    experiment = dataclasses.replace(model.experiment, method=method)
    with pytest.raises(UserError, match="SIM is not trained at this step: use MtebEncoder"):
        MtebSearch(dataclasses.replace(model, experiment=experiment))


def test_the_wrappers_are_what_mteb_asks_for(model):
    assert isinstance(MtebEncoder(model), EncoderProtocol)
    search = MtebSearch(model)
    assert isinstance(search, SearchProtocol) and not isinstance(search, EncoderProtocol)
