"""Exported models: what jax alone loads, and ONNX, compute what the model of the checkpoint
does."""

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exports import assert_close, expected_outputs
from helpers.pages import python_blocks
from helpers.paths import ROOT
from helpers.saved_runs import save_run, tiny_config

from c2f_jax.errors import UserError
from c2f_jax.export import export_model, programs_of
from c2f_jax.exported import load, onnx, programs
from c2f_jax.inference import TrainedModel
from c2f_jax.main import main
from c2f_jax.models.published import PublishedSpeech

SAMPLES = 16_000
# Loads and runs an export where importing the packages that trained it is an error.
ALONE = """
import sys

for name in "flax optax orbax clu ml_collections etils absl librosa tensorflow".split():
    sys.modules[name] = None

import numpy as np
from c2f_jax.exported import load

folder, inputs, outputs = sys.argv[1:]
model = load(folder)
results = {"tau": model.tau}
with np.load(inputs) as stored:
    for rows in (1, 3):
        speech = model.encode_speech(stored[f"waveform_{rows}"], stored[f"lengths_{rows}"])
        image = model.encode_image(stored[f"image_{rows}"])
        logits = model.match(speech.tokens, speech.lengths, image.tokens)
        for kind, encoded in (("speech", speech), ("image", image)):
            for name, value in encoded._asdict().items():
                results[f"{kind}_{name}_{rows}"] = value
        results[f"logits_{rows}"] = logits
np.savez(outputs, **results)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), tiny_config())


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "scenes"
    assert main(["export", f"--workdir={run}", f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def model(run):
    return TrainedModel.load(run)


@pytest.fixture
def copy(exported, tmp_path):
    """A copy to damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_jax_alone_computes_what_the_checkpoint_does(model, exported, tmp_path):
    inputs, expected = {}, {"tau": model.tau}
    for rows in (1, 3):
        given, outputs = expected_outputs(model, rows)
        inputs |= {f"{name}_{rows}": value for name, value in given.items()}
        expected |= {f"{name}_{rows}": value for name, value in outputs.items()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    command = [sys.executable, "-c", ALONE, exported, tmp_path / "inputs.npz", tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        assert set(found.files) == set(expected)
        for name, value in expected.items():
            assert_close(found[name], value, 1e-6)
    assert np.abs(expected["logits_3"]).max() > 0.01


def test_the_block_of_the_documentation_runs(exported, tmp_path, monkeypatch, capsys):
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "scenes").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    exec(python_blocks(ROOT / "docs/export.md")[0], {"__name__": "block"})  # noqa: S102
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_header_says_what_to_feed(run, model, exported):
    header = json.loads((exported / "export.json").read_text())
    assert header["model"]["fingerprint"] == model.fingerprint
    assert (header["model"]["run"], header["model"]["step"]) == (run.name, 4)
    assert header["platforms"] == ["cpu", "cuda", "tpu"]
    assert header["versions"]["jax"] == jax.__version__
    assert header["audio"] == {
        "sample_rate": 16_000,
        "max_seconds": 1.0,
        "samples": SAMPLES,
        "min_samples": 400,
    }
    assert header["image"]["side"] == 64 and "center square" in header["image"]["preparation"]
    waveform, lengths = header["programs"]["encode_speech"]["inputs"]
    assert (waveform["shape"], waveform["dtype"]) == (["batch", SAMPLES], "float32")
    assert lengths["range"] == [400, SAMPLES]
    assert set(header["files"]) == {
        f"{name}.{kind}"
        for name in ("encode_speech", "encode_image", "match")
        for kind in ("jax_export", "npz")
    }


@pytest.mark.parametrize("name", ["encode_speech.npz", "match.jax_export"])
def test_a_flipped_bit_or_a_missing_file_is_refused(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged.*copy it again, or export again"):
        load(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load(copy)
    (copy / "export.json").unlink()
    with pytest.raises(UserError, match="no complete export"):
        load(copy)


def change_header(folder, change):
    header = json.loads((folder / "export.json").read_text())
    change(header)
    (folder / "export.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    "jaxlib, until, warns", [("0.9.0", "2026-01-31", True), (None, "2026-01-31", False)]
)
def test_another_jaxlib_after_the_promise_warns(copy, jaxlib, until, warns):
    def age(header):
        header["promised_until"] = until
        header["versions"]["jaxlib"] = jaxlib or header["versions"]["jaxlib"]

    change_header(copy, age)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = load(copy)
    told = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert model.encode_image(np.zeros((1, 64, 64, 3), np.uint8)).embedding.shape[0] == 1
    assert len(told) == warns
    if warns:
        assert "up to 2026-01-31" in told[0] and "c2f export" in told[0]


def test_a_program_that_this_jax_cannot_read(copy):
    (copy / "match.jax_export").write_bytes(b"of another time" * 100)
    digest = hashlib.sha256(b"of another time" * 100).hexdigest()
    change_header(copy, lambda header: header["files"]["match.jax_export"].update(sha256=digest))
    with pytest.raises(UserError, match="jaxlib .* cannot read it .*c2f export"):
        load(copy)


def test_versions_and_formats_that_load_does_not_read(copy):
    change_header(copy, lambda header: header.update(version=2))
    with pytest.raises(UserError, match="has version 2"):
        load(copy)
    change_header(copy, lambda header: header.update(version=1, format="onnx"))
    with pytest.raises(UserError, match="export with --format=stablehlo"):
        load(copy)


def test_programs_for_another_platform_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "PLATFORMS", ("tpu",))
    monkeypatch.setattr("c2f_jax.export.programs_of", lambda model: programs_of(model)[1:2])
    export_model(model, tmp_path / "tpu")
    with pytest.raises(UserError, match="programs for tpu, and this process runs on cpu"):
        load(tmp_path / "tpu")


def test_inputs_that_do_not_fit_are_named(exported):
    model = load(exported)
    wave, lengths = np.zeros((2, 900), np.float32), np.array([900, 500])
    wrong = [
        (lambda: model.encode_image(np.zeros((2, 64, 64, 3), np.float32)), "must be uint8"),
        (lambda: model.encode_image(np.zeros((2, 64, 32, 3), np.uint8)), r"\(batch, 64, 64, 3\)"),
        (lambda: model.encode_speech(wave.astype(np.int16), lengths), "16 bits over 32768"),
        (lambda: model.encode_speech(np.zeros((2, 16_001), np.float32), lengths), "16000"),
        (lambda: model.encode_speech(wave, lengths + 1), "exceeds the 900"),
        (lambda: model.encode_speech(wave, lengths - 200), r"from 400 to 16000; got \[700, 300\]"),
        (lambda: model.encode_speech(wave, lengths[:1]), r"\[2, 1\] rows"),
        (lambda: model.encode_image(np.zeros((0, 64, 64, 3), np.uint8)), "at least one"),
        (lambda: model.encode_speech(wave[0], lengths), "must be float32"),
    ]
    for call, message in wrong:
        with pytest.raises(UserError, match=message):
            call()


def test_before_sim_is_trained_there_is_no_matcher(model, tmp_path, monkeypatch, capsys):
    early = dataclasses.replace(model, step=1)
    monkeypatch.setattr("c2f_jax.export.load_for_export", lambda *_: early)
    assert main(["export", "--workdir=run", f"--output={tmp_path / 'out'}"]) == 0
    assert "without match: SIM is not trained at step 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="SIM was not trained at step 1"):
        load(tmp_path / "out").match(np.zeros((1, 2, 3)), np.ones(1), np.zeros((1, 2, 3)))


def test_outputs_that_would_lose_or_mislead(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["export", f"--workdir={run}", f"--output={tmp_path}"]) == 2
    assert "holds notes.txt: give an empty folder" in capsys.readouterr().err
    assert main(["export", f"--workdir={run}", "--output=gs://bucket/out"]) == 2
    assert "give a local folder" in capsys.readouterr().err


def test_an_encoder_without_its_network_is_refused(model):
    tokens = model.experiment.model.clone(speech_encoder=PublishedSpeech())
    experiment = dataclasses.replace(model.experiment, model=tokens)
    with pytest.raises(UserError, match="data.speech_features.*no network to export"):
        programs_of(dataclasses.replace(model, experiment=experiment))


def test_what_fails_halfway_leaves_nothing(model, tmp_path, monkeypatch):
    (image,) = programs_of(model)[1:2]
    broken = dataclasses.replace(image, function=lambda params, image: image.missing)
    monkeypatch.setattr("c2f_jax.export.programs_of", lambda model: [broken])
    with pytest.raises(AttributeError):
        export_model(model, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_onnx_without_its_extra_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    arguments = [f"--workdir={run}", f"--output={tmp_path / 'out'}", "--format=onnx"]
    assert main(["export", *arguments]) == 2
    expected = "c2f export needs the extra `onnx`: pip install 'c2f_jax[onnx]'"
    assert capsys.readouterr().err.strip() == expected
    assert not (tmp_path / "out").exists()


def in_onnx_form(function, inputs):
    """What jax2onnx gets to convert, without it; and the function itself."""
    traced = jax.make_jaxpr(function)(*inputs)
    form = jax.jit(lambda *x: onnx.evaluate(traced.jaxpr, traced.consts, x))(*inputs)
    return list(zip(form, jax.jit(function)(*inputs), strict=True))


def test_integers_and_padding_are_equal_in_the_form_for_onnx():
    def odd(x, y):
        padded = jnp.pad(x, ((1, 2), (0, 3)), constant_values=7), jnp.pad(x, ((0, 0), (2, 0)))
        return x // y, x % y, jax.lax.div(x, y), jax.lax.rem(x, y), (x + y) // 2, *padded

    x = np.arange(-7, 8).reshape(3, 5)
    y = np.broadcast_to([-3, -2, 1, 2, 5], x.shape)
    for form, expected in in_onnx_form(odd, (x, y)):
        assert form.dtype == expected.dtype
        np.testing.assert_array_equal(form, expected)


def test_the_speech_encoder_is_equal_in_the_form_for_onnx(model):
    program = programs_of(model)[0]
    function = functools.partial(program.function, dict(program.params))
    for form, expected in in_onnx_form(function, program.random_inputs(rows=2)):
        assert_close(form, np.asarray(expected), 1e-5)
