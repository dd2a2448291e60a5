"""The ablation: what each row trains, and the table."""

import numpy as np
import pytest
from helpers.paths import CONFIGS

from c2f_jax.ablate import ROWS, ablate, format_differences, format_rows, row_config, summarise
from c2f_jax.config.experiment import create_experiment
from c2f_jax.config.files import load_config, load_saved_config
from c2f_jax.errors import UserError

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


def test_table_has_student_intervals():
    def result(value):
        metrics = {"R@1": value, "R@10": 2 * value}
        return {"coarse": {"speech_to_image": metrics, "image_to_speech": metrics}}

    table = {"row": [result(v) for v in (10.0, 12.0, 14.0)]}
    mean, half, values = summarise(table)["row"]["coarse"]["speech_to_image/R@1"]
    # t(0.975, 2 degrees of freedom) = 4.3027, s = 2, n = 3
    np.testing.assert_allclose([mean, half], [12.0, 4.3027 * 2 / np.sqrt(3)], rtol=1e-4)
    assert values == [10.0, 12.0, 14.0]
    assert "| row | coarse | 12.0 ± 5.0 | 24.0 ± 9.9 | 12.0 ± 5.0 | 24.0 ± 9.9 |" in format_rows(
        table
    )


def test_differences_are_paired_by_seed():
    def result(coarse, fine=None):
        stages = {"coarse": coarse} | ({} if fine is None else {"fine": fine})
        values = {stage: {"R@1": value, "R@10": 50.0} for stage, value in stages.items()}
        return {stage: {"speech_to_image": v, "image_to_speech": v} for stage, v in values.items()}

    # Seeds differ far more than the rows of one seed.
    table = {
        "+ embedding queue": [result(v) for v in (10.0, 30.0, 50.0)],
        "+ SIM": [result(11.0, 12.0), result(32.0, 33.0), result(53.0, 54.0)],
    }
    lines = format_differences(table).splitlines()
    half = 4.3027 / np.sqrt(3)  # of the differences 1, 2, 3
    assert f"| + SIM | coarse | + embedding queue | +2.0 ± {half:.1f} | +0.0 ± 0.0 |" in lines[2]
    assert (
        f"| + SIM | fine | + embedding queue | +3.0 ± {half:.1f} |" in lines[3] and len(lines) == 4
    )


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
