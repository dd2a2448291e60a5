"""Configurations: what is refused before anything is built from them, and how the refusal reads."""

import pytest
from helpers.paths import CONFIGS

from c2f_jax.config.default import default_config
from c2f_jax.config.experiment import create_experiment
from c2f_jax.config.fields import _RANGES, flatten
from c2f_jax.config.files import load_config, load_saved_config, save_config
from c2f_jax.errors import UserError
from c2f_jax.main import main


def changed(**values):
    config = default_config()
    config.data.name = "spoken_scenes"
    with config.ignore_type():
        config.update_from_flattened_dict(
            {name.replace("__", "."): value for name, value in values.items()}
        )
    return config


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "steps=0: a number from 1 on"),
        ("batch_size", "many", "batch_size='many': a number from 1 on"),
        ("seed", -1, "seed=-1: a number from 0 on"),
        ("eval_every", -1, "eval_every=-1: a number from 0 on"),
        ("eval.k", 0, "eval.k=0: a number from 1 on"),
        ("eval.k", None, "k=None is not of the type int"),
        ("eval.batch_size", 0, "eval.batch_size=0"),
        ("eval.resamples", 0, "eval.resamples=0"),
        ("eval", 3, "eval is 3: a section with the values k, score"),
        ("model", 3, "no section `model`"),
        ("data.image_size", -8, "data.image_size=-8"),
        ("data.image_size", 64.5, "image_size=64.5 is not of the type int"),
        ("data.max_seconds", 0.0, "data.max_seconds=0.0: seconds, at least 0.025"),
        (
            "data.bucket_seconds",
            ("a",),
            "bucket_seconds=['a'] is not of the type tuple[float, ...]",
        ),
        ("data.threads", -1, "data.threads=-1"),
        ("data.max_bad_share", 2.0, "data.max_bad_share=2.0: a number from 0 to 1"),
        ("data.max_padding", 1.0, "data.max_padding=1.0: a number above 0 and below 1"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan: a number above 0"),
        ("optimizer.b2", 1.0, "optimizer.b2=1.0: a number from 0 on and below 1"),
        ("method.mining_tau", 0, "method.mining_tau=0.0: a number above 0"),
        ("method.min_tau", 0.6, "method.min_tau=0.6 must be at most method.max_tau=0.5"),
        ("method.alpha_ramp_steps", -1, "method.alpha_ramp_steps=-1"),
        (
            "method.id_policy",
            "first",
            "method.id_policy='first': choose one of multi_positive, mask, diagonal",
        ),
        ("method.negatives", "all", "method.negatives='all': choose one of batch, global, queue"),
        ("method.alpha", 1.5, "method.alpha=1.5"),
        ("method.momentum", -0.1, "method.momentum=-0.1"),
        ("method.sim_weight", -1.0, "method.sim_weight=-1.0"),
        ("method.warm_up_steps", -1, "method.warm_up_steps=-1"),
        ("queue_size", -1, "queue_size=-1"),
        ("token_queue_size", -1, "token_queue_size=-1"),
        ("model.initial_tau", 0.0, "model.initial_tau=0.0"),
        ("model.image.patch", 0, "model.image.patch=0"),
        ("model.speech.heads", 0, "model.speech.heads=0"),
        ("model.multimodal.dropout_rate", 1.0, "model.multimodal.dropout_rate=1.0"),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_named(name, value, expected):
    with pytest.raises(UserError) as refused:
        create_experiment(changed(**{name.replace(".", "__"): value}))
    assert expected in str(refused.value)


def test_the_defaults_are_legal_and_ranges_are_of_values_that_there_are():
    create_experiment(changed())
    known = set(flatten(default_config().to_dict()))
    named = {name for _, _, names in _RANGES for name in names}
    published = (
        "token_dropout",
        "token_mask",
        "speech.conv_blocks",
    )  # of encoders that are not the default
    assert {name for name in named - known if not name.endswith(published)} == set()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def get_config(:\n", "SyntaxError: invalid syntax"),
        (
            "import nowhere_to_be_found\n",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
        (
            "def get_config():\n    return {'steps': 1}\n",
            "get_config returns dict, a ConfigDict is expected",
        ),
        ("def get_config():\n    return None\n", "a ConfigDict is expected"),
    ],
)
def test_a_configuration_that_fails_is_one_line(tmp_path, capsys, program, expected):
    file = tmp_path / "config.py"
    file.write_text(program)
    assert main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message and str(file) in message and len(message.splitlines()) == 1


def test_a_section_is_no_value():
    with pytest.raises(
        UserError, match=r"--config.optimizer is a section: .*optimizer.learning_rate"
    ):
        load_config(f"{CONFIGS}/spoken_scenes.py", ["--config.optimizer=1"])


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"seed": ', b"\xff\xfe\x00"])
def test_a_damaged_saved_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        UserError, match="config.json is damaged .*restore it or train into another --workdir"
    ):
        load_saved_config(tmp_path)


def test_a_workdir_is_kept_for_its_configuration_from_the_first_checkpoint_on(tmp_path):
    weights = tmp_path / "weights.json"
    save_config(changed(seed=1), tmp_path)
    weights.write_text("{}")
    save_config(changed(seed=2), tmp_path)  # the first run ended before it had anything to keep
    assert not weights.exists()
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    weights.write_text("{}")
    save_config(changed(seed=2, steps=7), tmp_path)
    assert weights.exists()
    with pytest.raises(UserError, match="seed: 2 there, 3 asked"):
        save_config(changed(seed=3), tmp_path)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file cannot be written"):
        save_config(changed(), tmp_path / "file")
