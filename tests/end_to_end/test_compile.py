"""`c2f compile` with the real TPU compiler; no TPU, no data and no weights are here."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from c2f_jax.config.experiment import create_experiment
from c2f_jax.config.files import load_config
from c2f_jax.main import main
from c2f_jax.pretrained.stand_ins import stand_in_card

TINY = "--config=spoken_scenes:runlocal"


def start(*words):
    """The command in a process of its own: the TPU compiler starts once in a process."""
    command = [sys.executable, "-m", "c2f_jax.main", "compile", TINY, "--json", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_small_run_on_a_slice_and_one_that_does_not_fit():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    # Both at once: neither keeps the compiler from the other.
    small = start("--topology=v5e:2x2")
    large = start("--topology=v5e:2x2", "--config.queue_size=40000000")

    out, errors = small.communicate()
    assert small.returncode == 0, errors
    (plan,) = json.loads(out)
    assert plan["chips"] == 4 and plan["fits"] and plan["capacity"] == 16 * 2**30

    # What the state takes is known from the configuration alone.
    parameters = plan["memory"]["parameters"]
    assert plan["memory"]["queues"] >= 24 * (2 * 256 + 1) * 4
    assert parameters / 2 < plan["memory"]["momentum"] < parameters
    assert sum(plan["memory"].values()) == pytest.approx(plan["used"], rel=0.2)

    # All gradients are averaged over the chips.
    reduced = sum(c["size"] for c in plan["collectives"] if c["kind"] == "all-reduce")
    assert parameters <= reduced < 1.5 * parameters
    assert {c["group"] for c in plan["collectives"]} == {4}
    assert plan["sent"] > 1.5 * reduced * 3 / 4
    assert plan["step_seconds"] >= plan["memory_seconds"] + plan["network_seconds"] > 0

    out, errors = large.communicate()
    assert large.returncode == 3, errors
    (plan,) = json.loads(out)
    # The queue itself, and what a step makes of it.
    assert plan["used"] > 1.5 * plan["memory"]["queues"] > 2 * plan["capacity"]
    assert not plan["fits"] and "step_seconds" not in plan
    assert "the run takes" in errors and "a smaller --config.queue_size" in errors


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v9:2x2", "the chips are v4, v5e, v5p, v6e, tpu7x, h100"),
        ("h100:9", "give GPUs of a host, or hosts x GPUs"),
        ("h100:4x8", "needs the CUDA compiler, not a GPU: pip install 'jax.cuda12.'"),
        ("v5e", "give a chip and a shape"),
        ("v5e:2", "the shape must be like 2x4"),
        ("v5e:3x5", "knows no such slice"),
        ("v5e:32x32", "a pod of v5e has 256"),
        ("v5e:4x8", "batch_size=16 does not divide over 32 devices"),
    ],
)
def test_wrong_slices(topology, message, capsys):
    if topology == "h100:4x8" and importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("the CUDA compiler is installed")
    if topology not in ("v9:2x2", "h100:9", "h100:4x8", "v5e", "v5e:2"):
        pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    assert main(["compile", TINY, f"--topology={topology}"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_a_small_run_on_gpus(capsys):
    pytest.importorskip("jax_cuda12_plugin", reason="the CUDA compiler is not installed")
    assert main(["compile", TINY, "--topology=h100:2x2", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["chips"] == 4 and plan["fits"] and plan["moved"] > plan["used"] > 0
    reduced = sum(c["size"] for c in plan["collectives"] if c["kind"] == "all-reduce")
    assert plan["memory"]["parameters"] <= reduced < 1.5 * plan["memory"]["parameters"]
    assert {c["group"] for c in plan["collectives"]} == {4}


@pytest.mark.parametrize("encoders", ["base", "large", "base_finetuned", "large_finetuned"])
def test_published_encoders_have_cards_without_their_weights(encoders):
    experiment = create_experiment(load_config(f"flickr8k_audio:{encoders}"), card_of=stand_in_card)
    tower = experiment.model.speech_encoder.tower
    assert (tower.depth, tower.width) == ((12, 768) if "base" in encoders else (24, 1024))
    assert experiment.model.image_encoder.tower.vision.depth == 39
    assert stand_in_card("weights/unknown") is None
