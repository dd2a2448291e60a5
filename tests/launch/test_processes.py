"""The scripts that watch over processes, with real child processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.paths import ROOT

LAUNCH = ROOT / "launch"

# Plays one status after another, from a file; notes each start. "wait" waits for SIGTERM and ends
# with 42, "deaf" waits and ignores it, "kill" ends by a signal; "N@S" writes checkpoint S first.
# Those that do not wait let the processes of AFTER get there.
PROGRAM = """\
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["PLAY"])
number = next((w.split("=")[1] for w in sys.argv if w.startswith("--process-id=")), "")
script = folder / f"script{number}"
word, *rest = script.read_text().split()
script.write_text(" ".join(rest))
with open(folder / f"starts{number}", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
word, _, step = word.partition("@")
if step:
    (folder / "run" / "checkpoints" / step).mkdir(parents=True)
if word in ("wait", "deaf"):
    def stop(*_):
        (folder / f"stopped{number}").touch()
        if word == "wait":
            time.sleep(0.3)
            sys.exit(42)
    signal.signal(signal.SIGTERM, stop)
    (folder / f"ready{number}").touch()
    for _ in range(600):
        time.sleep(0.1)
    sys.exit(9)
while not all((folder / f"ready{other}").exists() for other in os.environ.get("AFTER", "").split()):
    time.sleep(0.02)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
sys.exit(int(word))
"""


@pytest.fixture
def play(tmp_path):
    """A function that starts a script of launch/ over the program, and the folder of its files."""
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable} -S\n{PROGRAM}")
    program.chmod(0o755)
    started = []

    def start(script, *arguments, plays, **variables):
        plays = plays if isinstance(plays, dict) else {"": plays}
        for number, words in plays.items():
            (tmp_path / f"script{number}").write_text(words)
        environment = os.environ | {"PLAY": str(tmp_path), "C2F": str(program)} | variables
        process = subprocess.Popen(
            [LAUNCH / script, *map(str, arguments)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start, tmp_path, program
    for process in started:
        if process.poll() is None:
            process.kill()
        process.stderr.close()


def finish(process):
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def wait_for(file):
    deadline = time.time() + 30
    while not file.exists():
        assert time.time() < deadline, f"{file} does not appear"
        time.sleep(0.02)


def starts(folder, number=""):
    file = folder / f"starts{number}"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    ("plays", "status", "times"),
    [
        ("0 7", 0, 1),
        ("1 1 0 7", 0, 3),  # crashes, then done
        ("kill 0 7", 0, 2),
        ("42 42 42 42 0 7", 0, 5),  # preemptions are no failures
        ("2 7", 2, 1),  # a mistake
        ("1 2 7", 2, 2),
        ("1 1 kill 7", 137, 3),  # too many in a row
        ("1 42 1 1 7", 1, 4),  # a preemption alone is no progress
        ("1 1 1@2 1 1@4 1 1 7", 1, 7),  # a checkpoint is
        ("1 1@tmp 1 7", 1, 3),  # one that is not complete is not
    ],
)
def test_supervise_restarts(play, plays, status, times):
    start, folder, program = play
    workdir = folder / "run"
    command = [program, "train", f"--workdir={workdir}", "--x=a b"]
    process = start(
        "supervise.sh", *command, plays=plays, MAX_FAILURES="3", PAUSE="0", MAX_PAUSE="0"
    )
    assert finish(process)[0] == status
    assert starts(folder) == times
    assert set((folder / "starts").read_text().splitlines()) == {
        f"train --workdir={workdir} --x=a b"
    }


def test_supervise_says_each_restart_in_one_line(play):
    start, folder, program = play
    process = start("supervise.sh", program, plays="1 42 0", PAUSE="0")
    status, errors = finish(process)
    first, second = errors.splitlines()
    assert "status 1 after" in first and "failure 1 of 5; restart 1 in 0 s" in first
    assert "status 42 after" in second and "with a checkpoint; restart 2 in 0 s" in second


def test_supervise_waits_longer_after_each_failure(play):
    start, folder, program = play
    (folder / "sleep").write_text('#!/bin/sh\necho "$1" >>"$PLAY/slept"\n')
    (folder / "sleep").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    process = start(
        "supervise.sh", program, plays="1 1 42 1 1 0", PAUSE="2", MAX_PAUSE="7", PATH=path
    )
    assert finish(process)[0] == 0
    assert (folder / "slept").read_text().split() == ["2", "4", "2", "7", "7"]


def test_supervise_does_not_repeat_an_unknown_command():
    done = subprocess.run([LAUNCH / "supervise.sh", "no-such-program"], capture_output=True)
    assert done.returncode == 127


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_supervise_hands_the_signal_on_and_ends(play, sent):
    start, folder, program = play
    process = start("supervise.sh", program, plays="wait 7")
    wait_for(folder / "ready")
    process.send_signal(sent)
    assert finish(process) == (42, "")
    assert (folder / "stopped").exists() and starts(folder) == 1


def test_supervise_ends_during_a_pause(play):
    start, folder, program = play
    process = start("supervise.sh", program, plays="1 7", PAUSE="60")
    assert "restart 1 in 60 s" in process.stderr.readline()
    process.terminate()
    assert process.wait(timeout=10) == 1 and starts(folder) == 1


def test_supervise_restarts_a_command_that_is_preempted_by_itself(play):
    start, folder, program = play
    process = start("supervise.sh", program, plays="wait 0", PAUSE="0")
    wait_for(folder / "ready")
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    os.kill(int(children.stdout), signal.SIGTERM)
    assert finish(process)[0] == 0 and starts(folder) == 2


@pytest.mark.parametrize(
    ("plays", "status"),
    [
        (["0", "0", "0"], 0),
        (["0", "42", "0"], 42),
        (["wait", "3", "wait"], 3),  # the others are ended
        (["deaf", "deaf", "3"], 3),  # even those that do not listen
        (["kill", "deaf", "wait"], 137),
        (["42", "2", "wait"], 2),
    ],
)
def test_local_processes_end_together(play, plays, status):
    start, folder, _ = play
    plays = dict(enumerate(plays))
    waiting = " ".join(str(number) for number, play in plays.items() if play in ("wait", "deaf"))
    process = start("local_processes.sh", 3, plays=plays, KILL_AFTER="2", AFTER=waiting)
    assert finish(process)[0] == status  # the programs alone would take a minute
    assert all(starts(folder, number) == 1 for number in range(3))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_processes_hand_the_signal_on_and_wait(play, sent):
    start, folder, _ = play
    process = start("local_processes.sh", 2, plays={0: "wait", 1: "wait"}, KILL_AFTER="0")
    for number in range(2):
        wait_for(folder / f"ready{number}")
    process.send_signal(sent)
    assert finish(process) == (42, "")
    assert (folder / "stopped0").exists() and (folder / "stopped1").exists()


def test_local_processes_meet_at_one_port(play):
    start, folder, _ = play
    assert finish(start("local_processes.sh", 2, "--x", plays={0: "0", 1: "0"}))[0] == 0
    lines = [(folder / f"starts{number}").read_text().split() for number in range(2)]
    for number, words in enumerate(lines):
        assert words[:2] == ["train", "--x"] and words[2].startswith("--coordinator=127.0.0.1:")
        assert words[3:] == ["--num-processes=2", f"--process-id={number}"]
    assert lines[0][2] == lines[1][2]


# Stands in for Google's: a host is a folder, ssh runs its command there.
GCLOUD = """\
#!/usr/bin/env bash
echo "$*" >>"$CLOUD/calls"
for word in "$@"; do case "$word" in --command=*) command=${word#--command=} ;; esac; done
case "$*" in
  *" describe "*) sed -n 1p "$CLOUD/states"; sed -i 1d "$CLOUD/states" ;;
  *" list-instances "*) printf 'host-b\\nhost-a\\n' ;;
  *"tpu-vm ssh "*)
    for host in host-a host-b; do (cd "$CLOUD/$host" && bash -c "$command") || exit; done ;;
  *"compute ssh "*) cd "$CLOUD/$3" && exec bash -c "$command" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path, play):
    """A function that runs a script of launch/ over two hosts, each with the program as its c2f."""
    _, _, program = play
    (tmp_path / "bin").mkdir()
    for name, text in (("gcloud", GCLOUD), ("sleep", "#!/bin/sh\nexec /bin/sleep 0.1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for host in ("host-a", "host-b"):
        (tmp_path / host / "c2f" / "bin").mkdir(parents=True)
        program_of_host = tmp_path / host / "c2f" / "bin" / "c2f"
        program_of_host.write_text(f'#!/bin/sh\nPLAY={tmp_path / host} exec {program} "$@"\n')
        program_of_host.chmod(0o755)
        (tmp_path / host / "c2f_source").mkdir()
        (tmp_path / host / "c2f_source" / "launch").symlink_to(LAUNCH)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CLOUD": str(tmp_path),
        "TPU_NAME": "scenes",
        "NAME": "scenes",
        "PROJECT": "project",
        "ZONE": "us-east5-b",
        "ACCELERATOR_TYPE": "v6e-8",
    }

    def run(script, *arguments):
        return subprocess.run(
            [LAUNCH / script, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_mig.sh"])
def test_training_on_hosts_outlives_the_connection_and_stops(cloud, tmp_path, script):
    hosts = [tmp_path / "host-a", tmp_path / "host-b"]
    for host in hosts:
        (host / "script").write_text("42 wait")  # preempted once
    assert "nothing runs" in cloud(script, "stop").stdout
    done = cloud(script, "train", "--config=x", "--config.data.name=a (b) 'c'")
    assert done.returncode == 0, done.stderr
    for host in hosts:
        wait_for(host / "ready")
        assert (host / "starts").read_text().splitlines() == [
            "train --distributed --config=x --config.data.name=a (b) 'c'"
        ] * 2
    again = cloud(script, "train", "--config=x")
    assert again.returncode == 1 and "training already" in again.stderr
    assert cloud(script, "stop").returncode == 0
    for host in hosts:
        assert (host / "stopped").exists()
        assert "status 42" in (host / "c2f.log").read_text()
    assert "nothing runs" in cloud(script, "stop").stdout


def test_create_waits_for_the_slice(cloud, tmp_path):
    (tmp_path / "states").write_text("ACCEPTED\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    done = cloud("tpu_vm.sh", "create")
    assert done.returncode == 0 and "ACTIVE and costs until: tpu_vm.sh delete" in done.stdout
    assert (tmp_path / "states").read_text() == ""


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_ends_when_the_slice_is_refused(cloud, tmp_path, state):
    (tmp_path / "states").write_text(f"ACCEPTED\n{state}\n")
    done = cloud("tpu_vm.sh", "create")
    assert done.returncode == 1 and f"scenes is {state}" in done.stderr
