"""What the C library does with freed memory."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from cifar_jax import memory
if sys.argv[1] == "keep":
    memory.keep_freed()
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # with 64 MiB in between, more than glibc keeps by itself
    return (x @ x.T) @ x / 4096

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x, anew = jnp.ones((4096, 8)), 0
for _ in range(40):
    before = faults()
    x = jax.block_until_ready(step(x))
    anew += faults() - before > 10_000  # pages of 4 KiB
print(anew)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_a_step_takes_its_memory_from_what_the_last_one_freed():
    anew = {}
    for how in ("keep", "leave"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        anew[how] = int(done.stdout)
    assert anew["leave"] > 35
    assert anew["keep"] < 20  # small blocks split the first few it could use
