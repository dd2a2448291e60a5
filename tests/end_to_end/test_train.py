"""Training runs of the shipped configuration, shrunk: resume, preemption, cadences, the workdir,
the command line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.paths import CONFIGS

from c2f_jax.config.files import load_config
from c2f_jax.errors import UserError
from c2f_jax.evaluate import evaluate_encoded
from c2f_jax.inference import TrainedModel
from c2f_jax.main import main
from c2f_jax.retrieval.recall import Metric
from c2f_jax.retrieval.result import EvaluationResult
from c2f_jax.train import shuffled_images, train_and_evaluate
from c2f_jax.training import preemption
from c2f_jax.training.checkpoints import Checkpoints, abstract
from c2f_jax.training.recorder import Recorder

CONFIG = str(CONFIGS / "spoken_scenes.py")


@pytest.fixture(scope="session")
def flags(tiny_data_dir):
    """Overrides that all runs share: the tiny data set in a directory of its own, negatives from
    the queue."""
    return [
        f"--config.data.data_dir={tiny_data_dir}",
        "--config.method.negatives=queue",
        "--config.token_queue_size=24",
        "--config.steps=6",
        "--config.log_every=3",
        "--config.checkpoint_every=2",
        "--config.eval_every=4",
    ]


@pytest.fixture(scope="session")
def unbroken(flags, tmp_path_factory):
    """An uninterrupted run: its workdir, final state and result."""
    workdir = tmp_path_factory.mktemp("unbroken")
    result = train_and_evaluate(load_config(f"{CONFIG}:runlocal", flags), workdir)
    return workdir, jax.device_get(result.state), result


def command(flags, workdir):
    train = [sys.executable, "-m", "c2f_jax.main", "train", f"--config={CONFIG}:runlocal"]
    return [*train, f"--workdir={workdir}", *flags]


def wait_for_checkpoint(workdir, process):
    """Until some checkpoint is complete; the process must still be at work."""
    deadline = time.time() + 240
    while time.time() < deadline:
        folder = workdir / "checkpoints"
        if folder.exists() and any(p.name.isdigit() for p in folder.iterdir()):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written")


def assert_same_run(flags, workdir, unbroken):
    _, expected, whole = unbroken
    resumed = train_and_evaluate(load_config(f"{CONFIG}:runlocal", flags), workdir, test=False)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), expected)
    assert resumed.history == whole.history
    assert resumed.evaluation is resumed.page is None and resumed.table() == ""


def test_sigterm_saves_and_exits_with_its_own_code(flags, unbroken, tmp_path):
    process = subprocess.Popen(
        command(flags, tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == preemption.EXIT_CODE, errors
    assert "repeat the command to resume from there" in errors
    assert_same_run(flags, tmp_path, unbroken)


def test_cadences_and_files(unbroken):
    workdir, _, result = unbroken
    assert [step for step, _ in result.history["train/loss"]] == [3, 6]
    fine = result.history["eval/spoken_scenes-tiny/fine/s2i/R@1"]
    assert [step for step, _ in fine] == [4, 6]
    stored = json.loads((workdir / "eval" / "spoken_scenes-tiny-test.json").read_text())
    assert EvaluationResult.from_json(stored) == result.evaluation
    assert result.evaluation.data_set == "spoken_scenes/tiny" and result.evaluation.split == "test"
    assert result.table() == result.evaluation.table()
    for stage in ("coarse", "fine"):
        for direction in ("speech_to_image", "image_to_speech"):
            low, high = stored[stage][direction]["R@1_interval"]
            assert 0 <= low <= stored[stage][direction]["R@1"] <= high <= 100
    assert result.page.read_text().startswith("<!doctype html>")
    assert (workdir / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(workdir.glob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("method", "best", "ranked_fine"),
    [
        (["--config.method.warm_up_steps=1"], 2, [2]),  # what SIC alone ranks is no candidate
        # Nothing else is there: the latest.
        pytest.param(["--config.method.warm_up_steps=9"], 2, [], marks=pytest.mark.slow),
        # All are of one kind.
        pytest.param(
            ["--config.method.warm_up_steps=1", "--config.method.sim_weight=0.0"],
            1,
            [],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_best_checkpoint_is_chosen_among_scores_of_one_kind(
    flags, tmp_path, monkeypatch, capsys, method, best, ranked_fine
):
    log_evaluation = Recorder.log_evaluation
    monkeypatch.setattr(
        Recorder,
        "log_evaluation",
        lambda self, step, *rest: log_evaluation(self, step, *rest) - step,
    )
    monkeypatch.setattr(
        "c2f_jax.train.evaluate_encoded",
        lambda *args, **options: _level(evaluate_encoded(*args, **options)),
    )
    flags = [*flags, "--config.steps=2", "--config.eval_every=1", *method]
    result = train_and_evaluate(load_config(f"{CONFIG}:runlocal", flags), tmp_path)
    history, evaluation = result.history, result.evaluation
    fine = history.get("eval/spoken_scenes-tiny/fine/s2i/R@1", [])
    assert [step for step, _ in fine] == ranked_fine
    assert [step for step, _ in history["eval/spoken_scenes-tiny/coarse/s2i/R@1"]] == [1, 2]
    assert Checkpoints(tmp_path, read_only=True).best_step == best == evaluation.step
    assert (evaluation.fine is not None) == bool(ranked_fine)
    assert ("is in the warm-up" in capsys.readouterr().err) == (method[-1][-2:] in ("=1", "=9"))


def _level(result):
    """A result whose scores are all 50, so that the step alone decides which is the best."""
    level = {}
    for name, stage in result.stages().items():
        level[name] = dataclasses.replace(stage, mean_recall=Metric(50.0, (50.0, 50.0)))
    return dataclasses.replace(result, **level)


def test_probabilities_are_calibrated_on_the_validation_split(unbroken):
    """Each evaluated step has its own; the test split says how reliable they are."""
    workdir, _, result = unbroken
    for step in (4, 6):
        model = TrainedModel.load(workdir, step)
        fitted = evaluate_encoded(
            model, model.encode_split(model.experiment.data.load("validation")), calibrate=True
        )
        assert model.calibrations.keys() == fitted.calibrations.keys()
        for direction, one in model.calibrations.items():
            assert one.temperature == pytest.approx(
                fitted.calibrations[direction].temperature, rel=1e-3
            )
    best = TrainedModel.load(workdir)
    assert (result.evaluation.calibrations or {}) == best.calibrations
    for both in (result.evaluation.reliability or {}).values():
        assert both.keys() == {"before", "after"} and sum(both["after"].counts) > 0
    assert ("Probabilities" in result.page.read_text()) == bool(best.calibrations)


def test_restored_parameters_are_those_that_were_saved(unbroken):
    workdir, state, *_ = unbroken
    model = TrainedModel.load(workdir, "latest")
    assert model.step == 6 and repr(model).startswith(f"TrainedModel({workdir}@6")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), state.params)


def test_a_model_knows_whether_its_checkpoint_is_the_best(unbroken):
    best = TrainedModel.load(unbroken[0])
    steps = Checkpoints(unbroken[0], read_only=True).steps
    assert best.is_best and len(steps) > 1
    for step in steps:
        assert TrainedModel.load(unbroken[0], step).is_best == (step == best.step)


def test_loading_a_run_warns_of_nothing(unbroken, caplog):
    TrainedModel.load(unbroken[0])
    assert not caplog.records


def test_checkpoint_of_another_model_is_refused(unbroken):
    workdir, state, *_ = unbroken
    projection = {"kernel": np.zeros((3, 3)), "bias": np.zeros(3)}
    other = state.replace(params={**state.params, "image_projection": projection})
    with pytest.raises(UserError, match="does not fit this configuration"):
        Checkpoints(workdir, read_only=True).restore(6, abstract(other))


@pytest.mark.slow
def test_a_run_starts_from_the_parameters_of_another(flags, unbroken, tmp_path):
    changes = [
        f"--config.init_from={unbroken[0]}",
        "--config.optimizer.learning_rate=1e-30",
        "--config.seed=3",
        "--config.steps=1",
    ]
    state = train_and_evaluate(
        load_config(f"{CONFIG}:runlocal", [*flags, *changes]), tmp_path / "on", test=False
    ).state
    expected = TrainedModel.load(unbroken[0]).params
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(expected)
    )
    for name, values in jax.device_get(state.momentum_params).items():
        jax.tree.map(
            lambda m, p: np.testing.assert_allclose(m, p, rtol=1e-5, atol=1e-7),
            values,
            expected[name],
        )
    other = load_config(f"{CONFIG}:runlocal", [*flags, changes[0], "--config.model.branches=2"])
    with pytest.raises(
        UserError, match="does not fit this configuration .*transformer_1"
    ) as raised:
        train_and_evaluate(other, tmp_path / "other", test=False)
    assert "remove" not in str(raised.value), "the other run's checkpoint stays"


@pytest.mark.parametrize("argument", ["", "hard"])
def test_argument_that_a_configuration_refuses_is_one_line(argument, capsys):
    config = CONFIG if argument else os.path.join(os.path.dirname(CONFIG), "manifest.py")
    assert main(["train", f"--config={config}:{argument}".rstrip(":"), "--workdir=unused"]) != 0
    message = capsys.readouterr().err
    assert "after a colon" in message or "after the colon" in message
    assert "Traceback" not in message


def test_workdir_of_another_configuration_is_refused(flags, unbroken, capsys):
    workdir = unbroken[0]
    status = main(
        [
            "train",
            f"--config={CONFIG}:runlocal",
            f"--workdir={workdir}",
            *flags,
            "--config.optimizer.learning_rate=0.5",
        ]
    )
    message = capsys.readouterr().err
    assert status == 2
    assert (
        "optimizer.learning_rate: 0.003 there, 0.5 given" in message
        and "another --workdir" in message
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.optimzer.learning_rate=1", "did you mean --config.optimizer.learning_rate"),
        ("--config.batch_size=many", "batch_size"),
        ("--config.batch_size=7", "batch_size=7 does not divide over 4 devices"),
        ("--config.batch_size=640", "640"),
        ("--config.eval.k=0", "eval.k=0"),
        ("--config.eval.score=best", "choose one of sic"),
        ("--config.queue_size=-1", "queue_size=-1: must be at least 0"),
        ("--config.token_queue_size=0", "token_queue_size > 0"),
        ("--config.method.id_policy=none", "multi_positive"),
        ("--config.method.negatives=all", "choose one of batch, global, queue"),
        ("--config.parallel=mesh", "choose one of pmap, shard_map"),
        ("--config.model.dtype=float16", "float32, bfloat16"),
        ("--config.model.speech.heads=5", "not a multiple of heads"),
        ("--config.data.image_size=60", "not a multiple of model.image.patch"),
        ("--config.data.name=spoken_scene", "spoken_scenes"),
        ("--config.data.test_split=tset", "test"),
        ("--config.data.train_split=nothing", "train"),
        ("--config.data.name=missing.jsonl", "missing.jsonl"),
    ],
)
def test_mistakes_are_named_before_the_first_step(flags, tmp_path, capsys, override, expected):
    status = main(
        ["train", f"--config={CONFIG}:runlocal", f"--workdir={tmp_path / 'run'}", *flags, override]
    )
    message = capsys.readouterr().err
    assert status == 2 and expected in message and "Traceback" not in message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--config=nowhere.py", "--workdir=x"], "there is no file nowhere.py"),
        (["train", f"--config={CONFIG}:runlcoal", "--workdir=x"], "runlocal"),
        (["train", f"--config={CONFIG}", "--workdir=x", "--num-processes=2"], "give all three"),
        (["evaluate", "--workdir=nowhere"], "holds no training run"),
        (["search", "--workdir=nowhere", "--say", "a red circle"], "holds no training run"),
    ],
)
def test_wrong_paths(capsys, arguments, expected):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate", "--workdir=x", "--slpit=test"])
    assert exit_info.value.code == 2 and "--slpit" in capsys.readouterr().err


def test_evaluate_and_search_commands(unbroken, tmp_path, capsys):
    workdir = str(unbroken[0])
    assert (
        main(["evaluate", f"--workdir={workdir}", "--split=validation", "--k=100", "--score=sum"])
        == 0
    )
    stored = json.loads((unbroken[0] / "eval" / "spoken_scenes-tiny-validation.json").read_text())
    assert stored["k"] == 100 and stored["score"] == "sum"

    index = tmp_path / "gallery.index"
    assert main(["index", f"--workdir={workdir}", f"--output={index}"]) == 0
    capsys.readouterr()
    page = tmp_path / "answers.html"
    query = ["--say", "a small red circle above a large blue square"]
    assert (
        main(["search", f"--workdir={workdir}", *query, f"--index={index}", f"--output={page}"])
        == 0
    )
    from_index = capsys.readouterr().out
    assert "  5. " in from_index and page.exists() and page.with_suffix(".png").exists()
    assert main(["search", f"--workdir={workdir}", *query, f"--output={page}"]) == 0
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert answers == [line for line in from_index.splitlines() if line.startswith("  ")]


def test_search_by_image_and_in_a_folder(unbroken, tmp_path, capsys):
    from PIL import Image

    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (80, 64), color).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    workdir = str(unbroken[0])
    query = ["search", f"--workdir={workdir}", f"--output={tmp_path / 'answers.html'}"]
    assert main([*query, "--say", "a red circle", f"--gallery={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "red.png" in out and "blue.png" in out and "left out" in out and "broken.png" in out
    assert main([*query, "--image", str(tmp_path / "red.png"), "--top=3"]) == 0
    assert "  3. " in capsys.readouterr().out
    assert main([*query, "--image", str(tmp_path / "broken.png")]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_shuffled_images_exchanges_a_share():
    index = np.arange(100, dtype=np.int32)
    shuffled = shuffled_images(index, 0.3, seed=0)
    assert (shuffled != index).sum() == 30 and sorted(shuffled) == list(range(100))
    np.testing.assert_array_equal(shuffled, shuffled_images(index, 0.3, seed=0))
    np.testing.assert_array_equal(shuffled_images(index, 0.0, seed=0), index)
