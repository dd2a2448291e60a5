"""slurm.sh under Slurm itself: a controller and two nodes on this machine, without root or munge.

Debian's packages slurmctld, slurmd and slurm-client are enough."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from helpers.paths import CONFIGS, ROOT

DAEMONS = ("slurmctld", "slurmd")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, DAEMONS)), reason="slurmctld and slurmd are not installed"
    ),
]

CONFIGURATION = """\
ClusterName=c2f
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""

# Notes its signals. The first time it waits for SIGTERM and takes its time to save, unlike from
# process to process; after a requeue it ends well.
PROGRAM = """\
import os, pathlib, signal, sys, time
folder, process = pathlib.Path(os.environ["PLAY"]), os.environ["SLURM_PROCID"]
def note(text):
    with open(folder / f"notes{process}", "a") as file:
        file.write(text + "\\n")
note("start " + " ".join(sys.argv[1:]))
if "SLURM_RESTART_COUNT" in os.environ:
    note("done")
    sys.exit(0)
if os.environ.get("STATUS"):
    sys.exit(int(os.environ["STATUS"]))
def stop(*_):
    time.sleep(1 + 2 * int(process))
    note("saved")
    sys.exit(42)
signal.signal(signal.SIGTERM, stop)
note("ready")
time.sleep(300)
"""


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a cluster of two nodes, node1 and node2."""
    folder = tmp_path_factory.mktemp("slurm")
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(user=getpass.getuser(), folder=folder, ports=free_ports(3))
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    environment["SLURM_CONF"] = str(configuration)
    commands = (
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "node1"],
        ["slurmd", "-D", "-N", "node2"],
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons = [subprocess.Popen(command, env=environment, **quiet) for command in commands]
    try:
        deadline = time.time() + 60
        while "idle 2" not in call(environment, "sinfo", "--noheader", "-p", "low", "-o", "%t %D"):
            assert time.time() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=60)


def call(environment, *command):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


@pytest.fixture
def job(cluster, tmp_path):
    """A function that submits slurm.sh to both nodes and returns its job."""
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable} -S\n{PROGRAM}")
    program.chmod(0o755)
    jobs = []

    def submit(*options, arguments=("--config=x y",), **variables):
        environment = cluster | {"PLAY": str(tmp_path), "C2F": str(program), "JAX_PLATFORMS": "cpu"}
        options = ["--parsable", "--nodes=2", f"--output={tmp_path}/log-%j", *options]
        number = call(
            environment | variables, "sbatch", *options, str(ROOT / "launch/slurm.sh"), *arguments
        )
        assert number.isdigit(), number
        jobs.append(Job(cluster, tmp_path, number))
        return jobs[-1]

    yield submit
    for one in jobs:
        call(cluster, "scancel", one.number)
        one.wait_for_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


class Job:
    """A job of slurm.sh."""

    def __init__(self, cluster, folder, number):
        self.cluster, self.folder, self.number = cluster, folder, number

    def show(self):
        text = call(self.cluster, "scontrol", "show", "job", self.number)
        return dict(re.findall(r"(JobState|ExitCode|Restarts)=(\S+)", text))

    def wait_for_state(self, *states, seconds=120):
        deadline = time.time() + seconds
        while (state := self.show()["JobState"]) not in states:
            assert time.time() < deadline, f"{state}\n{self.log()}"
            if state == "PENDING":  # Slurm holds a requeued job back for two minutes
                call(self.cluster, "scontrol", "update", f"JobId={self.number}", "StartTime=now")
            time.sleep(0.5)
        return self.show()

    def wait_until_ready(self):
        deadline = time.time() + 60
        while not all("ready" in self.notes(process) for process in range(2)):
            assert time.time() < deadline, self.log()
            time.sleep(0.2)

    def notes(self, process):
        file = self.folder / f"notes{process}"
        return file.read_text().splitlines() if file.exists() else []

    def log(self):
        file = self.folder / f"log-{self.number}"
        return file.read_text() if file.exists() else ""


START = "start train --distributed --config=x y"


def assert_resumed_once(job):
    assert job.wait_for_state("COMPLETED", "FAILED", "CANCELLED") == {
        "JobState": "COMPLETED",
        "ExitCode": "0:0",
        "Restarts": "1",
    }, job.log()
    for process in range(2):
        assert job.notes(process) == [START, "ready", "saved", START, "done"]


@pytest.mark.parametrize("signal", ["TERM@50", "B:TERM@50"])
def test_time_limit_saves_and_requeues(job, signal):
    one = job("--time=1", f"--signal={signal}")
    assert_resumed_once(one)
    assert one.log().count("exit code 42") >= 1, "the first part of the log is gone"


@pytest.mark.parametrize("options", [[], ["--batch"]], ids=["processes", "shell"])
def test_signal_saves_and_requeues(job, cluster, options):
    one = job()
    one.wait_until_ready()
    call(cluster, "scancel", "--signal=TERM", *options, one.number)
    assert_resumed_once(one)


def test_cancelled_job_saves_and_stays_cancelled(job, cluster):
    one = job()
    one.wait_until_ready()
    call(cluster, "scancel", one.number)
    deadline = time.time() + 60
    while not all("saved" in one.notes(process) for process in range(2)):
        assert time.time() < deadline, one.log()
        time.sleep(0.2)
    time.sleep(3)  # a requeue would come now
    assert one.show()["JobState"] == "CANCELLED" and one.show()["Restarts"] == "0"


def test_preempted_job_resumes_when_the_other_is_done(job, cluster, tmp_path):
    one = job("--partition=low")
    one.wait_until_ready()
    other = call(
        cluster,
        *("sbatch", "--parsable", "--nodes=2", "--partition=high", f"--output={tmp_path}/other"),
        *("--wrap", "sleep 1"),
    )
    Job(cluster, tmp_path, other).wait_for_state("COMPLETED")
    assert_resumed_once(one)


@pytest.mark.parametrize("status", [1, 2])
def test_other_statuses_are_those_of_the_job(job, status):
    one = job(STATUS=str(status))
    assert one.wait_for_state("COMPLETED", "FAILED", "CANCELLED") == {
        "JobState": "FAILED",
        "ExitCode": f"{status}:0",
        "Restarts": "0",
    }


def test_training_on_two_nodes_resumes(job, cluster, tiny_data_dir, tmp_path):
    c2f = tmp_path / "c2f"
    c2f.write_text(f'#!/bin/sh\nexec {sys.executable} -m c2f_jax.main "$@"\n')
    c2f.chmod(0o755)
    workdir = tmp_path / "run"
    flags = ["--config.steps=60", "--config.checkpoint_every=2", "--config.eval_every=60"]
    arguments = [
        f"--config={CONFIGS / 'spoken_scenes.py'}:runlocal",
        f"--workdir={workdir}",
        f"--config.data.data_dir={tiny_data_dir}",
        *flags,
    ]
    one = job(
        arguments=arguments,
        C2F=str(c2f),
        PYTHONPATH=str(ROOT),
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_ports(1)[0]}",  # the nodes have no address
    )
    deadline = time.time() + 400
    while not list((workdir / "checkpoints").glob("[0-9]")):
        assert time.time() < deadline and one.show()["JobState"] in ("PENDING", "RUNNING"), (
            one.log()
        )
        time.sleep(0.2)
    call(cluster, "scancel", "--signal=TERM", one.number)
    done = one.wait_for_state("COMPLETED", "FAILED", "CANCELLED", seconds=600)
    assert done == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}, one.log()
    stopped = int(re.search(r"stopped at step (\d+)", one.log())[1])
    assert 2 <= stopped < 60
    assert (workdir / "checkpoints" / "60").exists() and "results page" in one.log()
