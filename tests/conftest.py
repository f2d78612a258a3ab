"""Every test runs with 8 virtual CPU devices (unless it is a gpu test), strict rank promotion,
warnings as errors."""

import fcntl
import gc
import os
import pathlib
import shutil

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
from running import QUICK, SPEEDRUN, Fork, finish, start  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--cases", help="JSON file for the outcomes of the tests marked `case`")


LONGEST = ("test_soak", "test_a_signal_to_one_and_the_death_of_one", "test_replicas_are_the_runs")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(LONGEST))  # first: none ends alone
    for item in items:
        for mark in item.iter_markers("case"):
            item.user_properties += [("case", number) for number in mark.args]
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


OUTCOMES = {}  # case: {test: outcome}


def pytest_runtest_logreport(report):
    """In the process that gathers the reports, be there workers or not."""
    for name, number in report.user_properties:
        if name == "case" and (report.when == "call" or not report.passed):
            test = report.nodeid.removeprefix("tests/")
            OUTCOMES.setdefault(number, {})[test] = report.outcome


def pytest_sessionfinish(session):
    path = session.config.getoption("--cases")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        from cifar_jax import workdir
        from cifar_jax.provenance import environment

        cases = {str(n): dict(sorted(tests.items())) for n, tests in sorted(OUTCOMES.items())}
        workdir.write_json(path, {**environment(), "cases": cases})


@pytest.fixture(scope="module", autouse=True)
def settled():
    """What is there stays, as in main.py: a failed restore collects garbage, and would walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cifar10_dir():
    return pathlib.Path(os.environ["CIFAR10_DIR"])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all of pytest-xdist's workers of this session have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cache(shared_folder):
    """One compilation cache for all processes of the session."""
    return shared_folder / "cache"


@pytest.fixture
def program(cache):
    """program(*arguments, devices=1, ...) -> a running main.py: see running.Fork, or running.start
    where it has a `prefix`."""
    running = []

    def start_one(*arguments, **settings):
        run = start if "prefix" in settings else Fork
        running.append(run(*arguments, cache=cache, **settings))
        return running[-1]

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def finished_run(shared_folder, cache):
    """The workdir of one uninterrupted run with its report, made once; read it only."""
    workdir = shared_folder / "finished_run"
    with open(shared_folder / "finished_run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers wait here
        if not (workdir / "result.json").exists():
            run = start(*QUICK, "--config.report=True", f"--workdir={workdir}", cache=cache)
            _, err = finish(run)
            assert "Traceback" not in err
    return workdir


@pytest.fixture(scope="session")
def reference(finished_run, tmp_path_factory):
    """This worker's own copy of the finished run."""
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="session")
def speedrun(cache, tmp_path_factory):
    """The workdir of an uninterrupted speedrun that ends within an epoch."""
    workdir = tmp_path_factory.mktemp("speedrun") / "run"
    finish(start(*SPEEDRUN, f"--workdir={workdir}", cache=cache))
    return workdir
