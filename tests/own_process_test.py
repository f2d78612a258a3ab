"""OwnProcess: its environment, its death and its end."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
from running import ROOT

from cifar_jax.own_process import OwnProcess


def test_a_fresh_process_sees_its_environment_and_leaves_ours():
    with OwnProcess({"CIFAR_JAX_PROBE": "7"}) as process:
        assert process(os.getenv, "CIFAR_JAX_PROBE") == "7"
        assert process(os.getpid) == process(os.getpid) != os.getpid()
    assert "CIFAR_JAX_PROBE" not in os.environ


def test_another_environment_is_a_fresh_process_s():
    with OwnProcess() as process:
        first = process(os.getpid)
        process.see({})
        assert process(os.getpid) == first
        process.see({"CIFAR_JAX_PROBE": "8"})
        assert process(os.getenv, "CIFAR_JAX_PROBE") == "8" and process(os.getpid) != first


def test_a_process_that_died_is_begun_again():
    with OwnProcess() as process:
        first = process(os.getpid)
        with pytest.raises(BrokenProcessPool):
            process(os.kill, first, signal.SIGKILL)
        assert process(os.getpid) != first


def test_a_process_ends_with_the_one_that_began_it():
    begin = "import os, time; from cifar_jax.own_process import OwnProcess as P; p = P(); "
    parent = subprocess.Popen(
        [sys.executable, "-c", begin + "print(p(os.getpid), flush=True); time.sleep(60)"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    status, until = pathlib.Path(f"/proc/{child}/stat"), time.monotonic() + 20

    def runs():
        try:
            return ") Z " not in status.read_text()  # ended, but not waited for
        except OSError:
            return False

    while runs() and time.monotonic() < until:
        time.sleep(0.1)
    assert not runs()
