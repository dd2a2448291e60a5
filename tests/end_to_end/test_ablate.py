"""The ablation: what each row trains, and the table."""

import numpy as np
import pytest
from helpers.paths import CONFIGS

from c2f_jax.ablate import ROWS, ablate, format_differences, format_rows, row_config, summarize
from c2f_jax.config.experiment import create_experiment
from c2f_jax.config.files import load_config, load_saved_config
from c2f_jax.errors import UserError
from c2f_jax.retrieval.recall import Metric
from c2f_jax.retrieval.result import Bootstrap, EvaluationResult, QueryCounts, StageMetrics

CONFIG = str(CONFIGS / "spoken_scenes.py")


@pytest.fixture
def config(tiny_data_dir):
    flags = ["--config.steps=2", "--config.eval_every=0", f"--config.data.data_dir={tiny_data_dir}"]
    return load_config(f"{CONFIG}:runlocal", flags)


def test_each_row_adds_one_idea(config):
    experiments = {row: create_experiment(row_config(config, row, 7, 0.3)) for row in ROWS}
    described = [
        (
            e.method.momentum is not None and e.queue_size > 0,
            e.method.sim_weight > 0,
            e.method.negatives == "queue",
            e.method.alpha > 0,
            e.data.shuffled_share,
        )
        for e in experiments.values()
    ]
    assert described == [
        (False, False, False, False, 0.0),
        (True, False, False, False, 0.0),
        (True, True, False, False, 0.0),
        (True, True, True, False, 0.0),
        (True, True, True, True, 0.0),
        (True, True, True, False, 0.3),
        (True, True, True, True, 0.3),
    ]
    assert {e.seed for e in experiments.values()} == {7}
    assert {(e.steps, e.method.warm_up_steps) for e in experiments.values()} == {
        (1, 0)
    }  # after the common start


def stage(recall_at_1, recall_at_10):
    metrics = {"R@1": Metric(recall_at_1), "R@10": Metric(recall_at_10)}
    return StageMetrics(metrics, metrics, Metric(0.0))


def result(coarse, fine=None):
    return EvaluationResult(
        coarse=coarse,
        fine=fine,
        k=1,
        score="joint",
        tau=0.1,
        seconds={},
        queries=QueryCounts(1, 1, 1, 1, 0, 0),
        bootstrap=Bootstrap(1, 0, (2.5, 97.5), "image id", 1),
    )


def test_table_has_student_intervals():
    table = {"row": [result(stage(v, 2 * v)) for v in (10.0, 12.0, 14.0)]}
    found = summarize(table)["row"]["coarse"]["speech_to_image/R@1"]
    # t(0.975, 2 degrees of freedom) = 4.3027, s = 2, n = 3
    half = 4.3027 * 2 / np.sqrt(3)
    np.testing.assert_allclose([found.mean, found.half_width], [12.0, half], rtol=1e-4)
    assert found.values == [10.0, 12.0, 14.0]
    assert "| row | coarse | 12.0 ± 5.0 | 24.0 ± 9.9 | 12.0 ± 5.0 | 24.0 ± 9.9 |" in format_rows(
        table
    )


def test_differences_are_paired_by_seed():
    def one(coarse, fine=None):
        return result(stage(coarse, 50.0), None if fine is None else stage(fine, 50.0))

    # Seeds differ far more than the rows of one seed.
    table = {
        "+ embedding queue": [one(v) for v in (10.0, 30.0, 50.0)],
        "+ SIM": [one(11.0, 12.0), one(32.0, 33.0), one(53.0, 54.0)],
    }
    lines = format_differences(table).splitlines()
    half = 4.3027 / np.sqrt(3)  # of the differences 1, 2, 3
    assert f"| + SIM | coarse | + embedding queue | +2.0 ± {half:.1f} | +0.0 ± 0.0 |" in lines[2]
    assert (
        f"| + SIM | fine | + embedding queue | +3.0 ± {half:.1f} |" in lines[3] and len(lines) == 4
    )


@pytest.mark.slow
def test_runs_are_kept_and_taken_again(config, tmp_path, monkeypatch):
    table = ablate(config, tmp_path, seeds=2, rows=["in-batch contrastive"])
    assert table.count("in-batch contrastive") == 1 and (tmp_path / "table.json").exists()
    for seed in (0, 1):
        start = tmp_path / f"start-{seed}"
        saved = load_saved_config(tmp_path / f"in-batch-contrastive-{seed}")
        assert saved.init_from == str(start) and (start / "checkpoints").exists()
    monkeypatch.setattr("c2f_jax.ablate.train_and_evaluate", None)  # a second call must not train
    assert ablate(config, tmp_path, seeds=2, rows=["in-batch contrastive"]) == table
    config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match="learning_rate: 0.003 there, 0.5 given"):
        ablate(config, tmp_path, seeds=2, rows=["in-batch contrastive"])


def test_mistakes(config, tmp_path):
    with pytest.raises(UserError, match="the rows are in-batch contrastive"):
        ablate(config, tmp_path, rows=["everything"])
    with pytest.raises(UserError, match="at least 2"):
        ablate(config, tmp_path, seeds=1)
    config.queue_size = 0
    with pytest.raises(UserError, match="the whole method"):
        ablate(config, tmp_path)
