"""Published encoders export too, and ONNX computes what the checkpoint does; in an environment of
its own, since jax2onnx needs an older Orbax."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers.exports import assert_close, expected_outputs
from helpers.pages import python_blocks
from helpers.paths import ROOT
from helpers.saved_runs import save_run, tiny_config

from c2f_jax.export import export_model, load_for_export
from c2f_jax.exported import load
from c2f_jax.inference import TrainedModel
from c2f_jax.pretrained.stand_ins import stand_in_card

pytestmark = pytest.mark.slow

SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
VIT = SMALL | {"name": "vision_transformer", "patch": 16}
OTHER_VIT = VIT | {"patch_bias": True, "input_norm": False}


def small_hubert(name, **changes):
    """HuBERT or WavLM as published, but for its sizes."""
    sizes = {"conv_widths": [8] * 7, "position_kernel": 8, "position_groups": 2}
    return stand_in_card(f"weights/{name}")["tower"] | SMALL | sizes | changes


PUBLISHED = {
    "HuBERT base, CLIP": (small_hubert("hubert_base"), VIT),
    "HuBERT large, DINOv2": (
        small_hubert("hubert_large"),
        OTHER_VIT | {"activation": "gelu", "layer_scale": True},
    ),
    "WavLM, SigLIP": (
        small_hubert("hubert_base", position_buckets=8),
        OTHER_VIT | {"activation": "gelu_tanh", "cls": False, "pooling_head": True},
    ),
    "Whisper, BLIP-2": (
        SMALL | {"name": "whisper", "positions": 100},
        {"name": "blip2", "width": 16, "depth": 2, "heads": 2, "vision": VIT},
    ),
}
# Reads only what is in the folder, with numpy and onnxruntime.
ONNX_ALONE = """
import sys
import numpy as np
import onnxruntime

folder, inputs, outputs = sys.argv[1:]

def run(name, **inputs):
    return onnxruntime.InferenceSession(f"{folder}/{name}.onnx").run(None, inputs)

results = {}
with np.load(inputs) as stored:
    for rows in (1, 5):
        speech = run("encode_speech", waveform=stored[f"waveform_{rows}"],
                     lengths=stored[f"lengths_{rows}"])
        image = run("encode_image", image=stored[f"image_{rows}"])
        (logits,) = run("match", speech_tokens=speech[1], speech_lengths=speech[2],
                        image_tokens=image[1])
        for kind, encoded in (("speech", speech), ("image", image)):
            for name, value in zip(("embedding", "tokens", "lengths"), encoded):
                results[f"{kind}_{name}_{rows}"] = value
        results[f"logits_{rows}"] = logits
np.savez(outputs, **results)
"""


@pytest.fixture(scope="module", params=["light", *PUBLISHED])
def run(request, tmp_path_factory):
    encoders = {}
    if request.param in PUBLISHED:
        encoders = dict(zip(("speech", "image"), PUBLISHED[request.param], strict=True))
    return save_run(tmp_path_factory.mktemp("run"), tiny_config(**encoders))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What runs programs in an environment with the extras `train` and `onnx` alone."""
    folder = tmp_path_factory.mktemp("environment")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("c2f_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    binaries = folder / "venv" / "bin"
    subprocess.run([binaries / "pip", "install", "-q", f"{source}[train,onnx]"], check=True)
    tests_own = ("PYTHONPATH", "XLA_FLAGS", "JAX_COMPILATION_CACHE", "JAX_ENABLE", "JAX_PERSISTENT")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(tests_own)}
    variables |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}

    def run(program, *arguments, cwd=folder):
        command = [str(binaries / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables)
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_stablehlo_of_these_encoders(run, tmp_path):
    export_model(load_for_export(run, "best", "stablehlo"), tmp_path / "out")
    model, exported = TrainedModel.load(run), load(tmp_path / "out")
    for rows in (1, 3):
        inputs, expected = expected_outputs(model, rows)
        speech = exported.encode_speech(inputs["waveform"], inputs["lengths"])
        image = exported.encode_image(inputs["image"])
        for kind, encoded in (("speech", speech), ("image", image)):
            for name, value in encoded._asdict().items():
                assert_close(value, expected[f"{kind}_{name}"], 1e-5)
        logits = exported.match(speech.tokens, speech.lengths, image.tokens)
        assert_close(logits, expected["logits"], 1e-5)


def test_onnx_computes_what_the_checkpoint_does(run, environment, tmp_path):
    folder = tmp_path / "onnx"
    done = environment("c2f", "export", f"--workdir={run}", f"--output={folder}", "--format=onnx")
    assert "exported:" in done.stdout and done.stderr == ""
    header = json.loads((folder / "export.json").read_text())
    model = TrainedModel.load(run)
    assert header["model"]["fingerprint"] == model.fingerprint
    samples = header["audio"]["samples"]

    inputs, expected = {}, {}
    for rows in (1, 5):
        given, outputs = expected_outputs(model, rows)
        padding = samples - given["waveform"].shape[1]
        given["waveform"] = np.pad(given["waveform"], ((0, 0), (0, padding)))
        inputs |= {f"{name}_{rows}": value for name, value in given.items()}
        expected |= {f"{name}_{rows}": value for name, value in outputs.items()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    environment("python", "-c", ONNX_ALONE, folder, tmp_path / "inputs.npz", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        assert set(found.files) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert_close(found[name], value, 1e-4)


def test_the_onnx_block_of_the_documentation_runs(environment, tmp_path):
    """With a matrix of more than 1 MB, which has its own file."""
    run = save_run(tmp_path / "run", tiny_config("--config.model.image.width=320"))
    output = tmp_path / "exports" / "scenes_onnx"
    environment("c2f", "export", f"--workdir={run}", f"--output={output}", "--format=onnx")
    done = environment("python", "-c", python_blocks(ROOT / "docs/export.md")[1], cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 2
    files = [output / name for name in ("encode_image.onnx", "encode_image.onnx.data")]
    assert len({file.stat().st_mode for file in files}) == 1


def test_what_is_for_one_platform_is_left_out(tmp_path):
    """cuDNN's attention is replaced; bfloat16 is kept for StableHLO and replaced for ONNX."""
    config = tiny_config("--config.model.attention=cudnn", "--config.model.dtype=bfloat16")
    plain = save_run(tmp_path / "plain", tiny_config())
    fast = shutil.copytree(plain, tmp_path / "fast")
    (fast / "config.json").write_text(config.to_json())
    header = export_model(load_for_export(fast, "best", "stablehlo"), tmp_path / "out")
    assert header["programs"]["encode_speech"]["outputs"][1]["dtype"] == "bfloat16"

    inputs, expected = expected_outputs(TrainedModel.load(plain), 3)
    exported = load(tmp_path / "out")
    speech = exported.encode_speech(inputs["waveform"], inputs["lengths"])
    image = exported.encode_image(inputs["image"])
    assert_close(speech.embedding, expected["speech_embedding"], 0.02)
    logits = exported.match(speech.tokens, speech.lengths, image.tokens)
    assert_close(logits, expected["logits"], 0.1)
    assert load_for_export(fast, "best", "onnx").experiment.model.speech_encoder.dtype == (
        jax.numpy.float32
    )
