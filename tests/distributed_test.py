"""Two processes of two virtual devices each as one job on the loopback; see sharding.job."""

import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from running import (
    QUICK,
    ROOT,
    arrays,
    assert_same_run,
    finish,
    metrics,
    result,
    start_job,
    strike,
    wait_for,
)

from cifar_jax import sharding

JOB = (*QUICK, "--config.epochs=2", "--config.drop_last=True")  # one program less to compile


@pytest.fixture
def job(cache):
    """start_job with JOB in a workdir; what still runs at the end is killed."""
    running = []

    def start(workdir, *more, fault=None):
        running.extend(start_job(*JOB, f"--workdir={workdir}", *more, cache=cache, fault=fault))
        return running[-2:]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def one_dies(index):
    """SIGKILL to a process when its first call of steps is done: earlier the other one may be
    waiting to be connected, and learns of the death only after HEARTBEAT_SECONDS, from JAX."""

    def die(*args):
        if jax.process_index() == index:
            jax.block_until_ready(jax.live_arrays())
            os.kill(os.getpid(), signal.SIGKILL)

    strike("step", 1, before=die)


def the_second_is_told():
    """SIGTERM to the second process within the second epoch."""

    def tell(*args):
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    strike("step", 4, before=tell)  # three calls an epoch, of six steps


def finish_all(processes, code=0):
    """[(stdout without what JAX's network layer prints, stderr)]"""
    ended = [finish(process, code) for process in processes]
    return [
        ("".join(x for x in out.splitlines(True) if not x.startswith("[Gloo]")), err)
        for out, err in ended
    ]


def losses(workdir):
    """The sum of the losses of the epoch under way in the latest checkpoint."""
    return next(v for k, v in arrays(workdir).items() if "epoch_metrics" in k and "loss" in k)


@pytest.mark.long
def test_two_processes_train_as_one_and_the_run_moves_to_one(job, program, tmp_path):
    """As one with as many devices; a single CPU device computes its convolutions in another way."""
    five_steps, two = "--config.stop_after=0.28", tmp_path / "two"
    _, (silence, _) = finish_all(job(two, five_steps))
    assert silence == "" and result(two)["device"].startswith("4 x ")
    finish(program(*JOB, five_steps, f"--workdir={tmp_path}/one", devices=4))
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    out, _ = finish(program(*JOB, f"--workdir={two}", "--config.stop_after=1"))
    assert "resuming" in out and [r["epoch"] for r in metrics(two)] == [1]
    assert result(two)["device"].startswith("1 x ")


@pytest.mark.slow
@pytest.mark.case(5, 36)
def test_a_signal_to_one_and_the_death_of_one_leave_the_run_as_it_would_have_been(job, tmp_path):
    """SIGTERM to the second process, later SIGKILL, and the same command again each time."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    (out, _), (silence, _) = finish_all(job(whole))
    assert sum(line.startswith("epoch") for line in out.splitlines()) == 2 and silence == ""

    finish_all(job(workdir, fault=the_second_is_told), code=75)
    stopped = result(workdir)
    assert stopped["status"] == "interrupted" and 18 <= stopped["steps"] < 36

    first, second = job(workdir, fault=functools.partial(one_dies, 1))
    wait_for(lambda: second.poll() is not None, first)
    start = time.monotonic()
    out, err = finish(first, code=1)
    assert "resuming" in out and second.poll() == -signal.SIGKILL
    assert time.monotonic() - start < sharding.HEARTBEAT_SECONDS
    line = err.splitlines()[-1]
    assert line.startswith("main.py: the job cannot go on") and "the same command" in line
    assert "Traceback" not in err and not (workdir / "result.json").exists()

    (out, _), _ = finish_all(job(workdir))
    assert "resuming" in out
    assert_same_run(workdir, whole)

    (told, _), (silence, _) = finish_all(job(workdir, "--mode=evaluate"))
    evaluated = json.loads((workdir / "evaluation.json").read_text())
    assert evaluated["accuracy"] == result(workdir)["test"]["accuracy"]
    assert f"{evaluated['accuracy']:.2f} %" in told and silence == ""


@pytest.mark.long
def test_the_death_of_the_coordinator_ends_the_other_and_the_same_command_goes_on(job, tmp_path):
    first, second = job(tmp_path / "run", fault=functools.partial(one_dies, 0))
    wait_for(lambda: first.poll() is not None, second)
    start = time.monotonic()
    _, err = second.communicate(timeout=200)
    # our sentence or JAX's abort, whichever is first
    assert second.returncode in (1, -signal.SIGABRT) and "Traceback" not in err
    assert time.monotonic() - start < sharding.HEARTBEAT_SECONDS
    finish_all(job(tmp_path / "run"))
    assert result(tmp_path / "run")["status"] == "done"


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(job, tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _, err in finish_all(job(tmp_path), code=2):
            assert err.count("\n") == 1 and "is being trained by another process" in err


def test_processes_that_do_not_meet_say_so(tmp_path):
    """Neither without its coordinator nor without the other one."""
    impatient = (
        "import main; from absl import app; from cifar_jax import sharding;"
        "sharding.JOIN_SECONDS = 1; app.run(main.main, flags_parser=main.parse)"
    )
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    for where in (f"localhost:{port},2,0", "localhost:1,2,1"):
        flags = (*JOB, f"--workdir={tmp_path}/run", f"--distributed={where}")
        command = [sys.executable, "-c", impatient, *flags]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
        assert f"{where} did not meet within 1 s" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["localhost:1", "localhost:1,2,2", "localhost,2,0", "auto", "x"])
def test_a_job_that_cannot_be_is_refused(where, program, tmp_path):
    _, err = finish(program(*JOB, f"--workdir={tmp_path}/run", f"--distributed={where}"), code=2)
    assert err.count("\n") == 1 and "--distributed" in err, err


def test_only_training_and_evaluation_are_distributed(program, tmp_path):
    flags = (f"--workdir={tmp_path}/run", "--distributed=auto", "--mode=lr_find")
    _, err = finish(program(*JOB, *flags), code=2)
    assert err.count("\n") == 1 and "modes train and evaluate" in err


@pytest.mark.parametrize(
    "code, state, queued",
    [
        *((code, "RUNNING", code == 75) for code in (0, 3, 75, 134)),
        (75, "COMPLETING", False),  # after scancel
    ],
)
def test_slurm_queues_an_interrupted_job_again(code, state, queued, tmp_path):
    """With stand-ins for SLURM's commands."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "slurm_train.sh", scripts)
    (scripts / "setup.sh").write_text("PY=python\n")
    for name, body in {"srun": f"exit {code}", "scontrol": f"echo JobState={state}"}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n{body}\n')
        (tmp_path / name).chmod(0o755)
    ended = subprocess.run(
        ["bash", "scripts/slurm_train.sh", "--config=a b"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == code
    assert ("from the last checkpoint" in ended.stderr) == (code == 134)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].endswith("python main.py --config=a b --distributed=auto")
    assert [c for c in calls if "requeue" in c] == (["scontrol requeue 7"] if queued else [])
