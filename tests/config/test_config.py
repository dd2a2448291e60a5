"""Configurations: what is refused before anything is built from them, and how the refusal reads."""

import json

import pytest
from helpers.paths import CONFIGS

from c2f_jax.config.default import default_config
from c2f_jax.config.experiment import create_experiment
from c2f_jax.config.files import load_config, load_saved_config, save_config, shipped_configs
from c2f_jax.datasets.config import DataConfig
from c2f_jax.errors import UserError
from c2f_jax.main import main
from c2f_jax.models.factory import create_model
from c2f_jax.retrieval.evaluation import EvalConfig
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.optimizer import OptimizerConfig


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
        ("steps", 0, "steps=0: must be at least 1"),
        ("batch_size", "many", "batch_size='many': must be an integer"),
        ("seed", -1, "seed=-1: must be at least 0"),
        ("eval_every", -1, "eval_every=-1: must be at least 0"),
        ("queue_size", -1, "queue_size=-1: must be at least 0"),
        ("parallel", "mesh", "parallel='mesh': choose one of pmap, shard_map"),
        ("eval.k", 0, "eval.k=0: must be at least 1"),
        ("eval.k", None, "eval.k=None: must be an integer"),
        ("eval.score", "best", "eval.score='best': choose one of sic"),
        ("eval.batch_size", 0, "eval.batch_size=0"),
        ("eval.resamples", 0, "eval.resamples=0"),
        ("eval", 3, "eval=3: must be a section"),
        ("model", 3, "model=3: must be a section"),
        ("model.image", 3, "model.image=3: must be a section"),
        ("data.name", None, "data.name is not set: give it a value"),
        ("data.image_size", -8, "data.image_size=-8"),
        ("data.image_size", 64.5, "data.image_size=64.5: must be an integer"),
        ("data.max_seconds", 0.0, "data.max_seconds=0.0: must be at least 0.025"),
        ("data.bucket_seconds", ("a",), "data.bucket_seconds=['a']: must be a list of numbers"),
        ("data.threads", -1, "data.threads=-1"),
        ("data.max_bad_share", 2.0, "data.max_bad_share=2.0: must be at least 0 and at most 1"),
        ("data.max_padding", 1.0, "data.max_padding=1.0: must be above 0 and below 1"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan: must be above 0"),
        ("optimizer.b2", 1.0, "optimizer.b2=1.0: must be at least 0 and below 1"),
        ("method.mining_tau", 0.0, "method.mining_tau=0.0: must be above 0"),
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
        ("token_queue_size", -1, "token_queue_size=-1"),
        ("model.initial_tau", 0.0, "model.initial_tau=0.0"),
        ("model.dtype", "float16", "model.dtype='float16': choose one of float32, bfloat16"),
        ("model.image.patch", 0, "model.image.patch=0"),
        ("model.image.name", "vti", "model.image.name='vti': choose one of vit"),
        ("model.speech.heads", 0, "model.speech.heads=0"),
        ("model.multimodal.dropout_rate", 1.0, "model.multimodal.dropout_rate=1.0"),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_named(name, value, expected):
    with pytest.raises(UserError) as refused:
        create_experiment(changed(**{name.replace(".", "__"): value}))
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("stpes", "steps"),
        ("data.image_sise", "data.image_size"),
        ("data.augment.flop", "data.augment.flip"),
        ("method.momentun", "method.momentum"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("model.embeding_dim", "model.embedding_dim"),
        ("model.image.pach", "model.image.patch"),
        ("model.multimodal.dept", "model.multimodal.depth"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_one(name, nearest):
    with pytest.raises(UserError, match=f"there is no option {name}: did you mean {nearest}"):
        create_experiment(changed(**{name.replace(".", "__"): 1}))
    with pytest.raises(UserError, match=f"--config.{name}: did you mean --config.{nearest}"):
        load_config(f"{CONFIGS}/spoken_scenes.py", [f"--config.{name}=1"])


def test_the_defaults_are_those_of_the_classes():
    experiment = create_experiment(changed())
    assert experiment.data == DataConfig("spoken_scenes")
    assert experiment.eval == EvalConfig()
    assert experiment.method == MethodConfig()
    assert experiment.optimizer == OptimizerConfig()
    assert experiment.model == create_model({"name": "log_mel"}, {"name": "vit"}, {})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "1e5", 100_000),
        ("steps", "2_000", 2000),
        ("steps", "1.0E+3", 1000),
        ("method.alpha_ramp_steps", "1e3", 1000),
        ("data.max_padding", "null", None),
        ("data.bucket_seconds", "1e1", (10.0,)),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("data.max_padding", "None", None),
        ("data.max_padding", "0.1", 0.1),
        ("method.momentum", "None", None),
        ("method.mining_tau", "0.5", 0.5),
        ("method.alpha_ramp_steps", "None", None),
        ("init_from", "runs/other", "runs/other"),
        ("init_from", "None", None),
        ("data.name", "1", "1"),
        ("data.bucket_seconds", "(3.2, 6)", (3.2, 6)),
        ("data.bucket_seconds", "8.0", (8.0,)),
        ("data.augment.noise_db", "[10, 20]", (10, 20)),
        ("model.remat", "True", True),
        ("model.speech.weights", "weights/hubert", "weights/hubert"),
    ],
)
def test_an_override_is_read_as_the_type_of_its_option(key, text, value):
    config = load_config(f"{CONFIGS}/spoken_scenes.py", [f"--config.{key}={text}"])
    for name in key.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=1.5", "--config.steps=1.5: must be an integer"),
        ("steps=ten", "--config.steps=ten: must be an integer"),
        ("steps=None", "--config.steps=None: must be an integer"),
        ("steps", "--config.steps has no value"),
        ("data.max_padding=little", "--config.data.max_padding=little: must be a number or None"),
        ("data.bucket_seconds=long", "must be a list of numbers"),
        ("model.remat=1", "--config.model.remat=1: must be true or false"),
    ],
)
def test_an_override_of_another_type_is_named(override, expected):
    with pytest.raises(UserError) as refused:
        load_config(f"{CONFIGS}/spoken_scenes.py", [f"--config.{override}"])
    assert expected in str(refused.value)


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
            "get_config returns dict: must be a ConfigDict",
        ),
        ("def get_config():\n    return None\n", "must be a ConfigDict"),
        ("steps = 3\n", "the file has no function get_config"),
    ],
)
def test_a_configuration_that_fails_is_one_line(tmp_path, capsys, program, expected):
    file = tmp_path / "config.py"
    file.write_text(program)
    assert main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message and str(file) in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("argument", ["", ":crowded", ":simple", ":runlocal"])
def test_a_shipped_configuration_is_found_by_its_name_in_any_folder(
    tmp_path, monkeypatch, argument
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spoken_scenes").write_text("not this one")
    named, in_file = load_config("spoken_scenes" + argument), CONFIGS / "spoken_scenes.py"
    assert named.to_dict() == load_config(f"{in_file}{argument}").to_dict()
    (tmp_path / "mine.py").write_text(in_file.read_text())
    assert named.to_dict() == load_config(f"mine.py{argument}").to_dict()


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_an_unknown_configuration_is_one_line_with_the_shipped_names(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    shipped = sorted(file.stem for file in CONFIGS.glob("*.py"))
    assert list(shipped_configs()) == shipped and len(shipped) > 5
    for name in ("spoken_scene", "configs/spoken_scenes.py", ""):
        assert main([command, f"--config={name}:runlocal", "--workdir=run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"c2f {command}: --config={name}:runlocal: there is no file {name}: "
            f"give a file (.py) or one of {', '.join(shipped)}"
        )
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in shipped)


def test_a_section_cannot_be_set():
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


def test_a_saved_run_may_have_options_that_were_removed(tmp_path):
    saved = json.loads(changed().to_json())
    saved["method"] |= {"momentum_half_life": None, "sic_weight": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert create_experiment(load_saved_config(tmp_path)) == create_experiment(changed())
    saved["method"]["sic_weight"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="there is no option method.sic_weight"):
        create_experiment(load_saved_config(tmp_path))


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
    with pytest.raises(UserError, match="seed: 2 there, 3 given"):
        save_config(changed(seed=3), tmp_path)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file cannot be written"):
        save_config(changed(), tmp_path / "file")
