"""Every test runs with 8 virtual CPU devices (unless it is a gpu test), strict rank promotion,
warnings as errors."""

import os
import pathlib
import subprocess
import sys

GPU = os.environ.get("CIFAR_JAX_TEST_GPU") == "1"
if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

if "PYTEST_XDIST_WORKER" in os.environ:  # OpenMP's threads would spin against the other worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from running import QUICK, ROOT, SPEEDRUN  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU: set CIFAR_JAX_TEST_GPU=1 where there is one")
            )
        if item.get_closest_marker("cifar10") and not os.environ.get("CIFAR10_DIR"):
            item.add_marker(
                pytest.mark.skip(
                    reason="needs CIFAR-10: set CIFAR10_DIR to the folder that holds it"
                )
            )


@pytest.fixture(scope="session")
def cifar10_dir():
    return pathlib.Path(os.environ["CIFAR10_DIR"])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One compilation cache for all processes of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def program(cache):
    """start(*arguments, devices=1) -> a running main.py."""
    running = []

    def start(*arguments, devices=1):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        process = subprocess.Popen(
            [sys.executable, "main.py", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def reference(cache, tmp_path_factory):
    """The workdir of one uninterrupted run."""
    return trained(QUICK, cache, tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="session")
def speedrun(cache, tmp_path_factory):
    """The workdir of an uninterrupted speedrun that ends within an epoch."""
    return trained(SPEEDRUN, cache, tmp_path_factory.mktemp("speedrun") / "run")


def trained(arguments, cache, workdir):
    """`workdir` after a run in a process of its own."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "main.py", *arguments, f"--workdir={workdir}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return workdir
