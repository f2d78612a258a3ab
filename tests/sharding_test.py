"""A CPU's cores as devices: how many, and by whose word; see sharding.cores_for."""

import os
import subprocess
import sys

import pytest
from running import ROOT

from cifar_jax import sharding


@pytest.mark.parametrize(
    ("batch_size", "cores", "devices"),
    [(32, 2, 2), (32, 64, 2), (512, 4, 4), (512, 64, 8), (48, 4, 3), (33, 4, 1), (8, 4, 1)],
)
def test_a_cpu_is_as_many_devices_as_pay(batch_size, cores, devices, monkeypatch):
    """Of the cores at most 8, of the batch 16 images each at least, and as many on each."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(sharding, "cores", lambda: cores)
    assert sharding.cores_for(batch_size) == devices


def test_the_caller_s_word_on_devices_counts(monkeypatch):
    assert "device_count=8" in os.environ["XLA_FLAGS"] and sharding.cores_for(32) is None
    sharding.use_cores(32)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(sharding, "is_alone", lambda: False)  # a job's processes are devices
    assert sharding.cores_for(32) is None


def test_a_run_s_devices_are_the_cores():
    """Before JAX has made its devices; after that they stay."""
    code = (
        "import jax; from cifar_jax import provenance, sharding; sharding.cores = lambda: 3; "
        "sharding.use_cores(96); print(jax.device_count(), provenance.environment()['device']); "
        "sharding.use_cores(32); print(jax.device_count())"
    )
    variables = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}

    def devices(**more):
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, cwd=ROOT, env=variables | more, text=True).split()

    found = devices()
    assert found[:3] == ["3", "1", "x"] and found[-1] == "3"
    assert devices(JAX_NUM_CPU_DEVICES="1")[0] == "1"
