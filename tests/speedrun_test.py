"""scripts/speedrun.py: the same runs as main.py's, every run kept, the missing ones added."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from running import ROOT, SPEEDRUN, finish, result

sys.path.insert(0, str(ROOT / "scripts"))

import speedrun  # noqa: E402


@pytest.fixture
def race(cache, tmp_path):
    """race(*arguments) -> the finished process; its file is tmp_path / 'runs.json'."""

    def start(*arguments):
        out = f"--out={tmp_path}/runs.json"
        return subprocess.run(
            [sys.executable, "scripts/speedrun.py", "--quick", out, *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "",
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            },
            capture_output=True,
            text=True,
            timeout=240,
        )

    return start


def test_a_runs_clock_holds_weights_steps_and_views(monkeypatch):
    """And not the evaluations under fewer views, each of which takes longer here."""

    class Experiment:
        train = test = None

        def init_state(self, seed):
            time.sleep(0.1)
            return seed

    class Measured:
        def summary(self):
            return {"accuracy": 50.0}

    def step(state, metrics, dataset):
        time.sleep(0.1)
        return state, metrics

    def evaluate(seconds):
        return lambda state, dataset: (time.sleep(seconds), (Measured(), state))[1]

    race = object.__new__(speedrun.Race)
    race.exp, race.calls, race.zeros = Experiment(), ["a", "b", "a"], None
    race.programs = {"a": step, "b": step}
    race.evaluate = {v: evaluate(0.1 if v == "multicrop" else 1.0) for v in speedrun.VIEWS}
    waited = []
    monkeypatch.setattr(speedrun.jax, "block_until_ready", waited.append)
    run = race.run(7)
    assert run["seed"] == 7 and run["accuracy"] == dict.fromkeys(speedrun.VIEWS, 50.0)
    assert 0.5 <= run["seconds"] < 1.0 and waited[0][1] == 7


def test_without_the_device_asked_for_it_says_so(tmp_path):
    command = [sys.executable, "scripts/speedrun.py", "--runs=1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("speedrun.py: ")
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_runs_are_kept_and_the_missing_ones_added(race, tmp_path, program):
    first = race("--runs=1", "--seed0=4")
    assert first.returncode == 0, first.stderr
    one = json.loads((tmp_path / "runs.json").read_text())
    assert [run["seed"] for run in one["runs"]] == [4]
    assert one["summary"]["accuracy"]["multicrop"]["interval"] is None
    for field in ("ghost_batches", "seeds"):  # as if from before these were fields
        del one["config"][field]
    one["config"]["compare"]["steps"] += 1  # of another mode
    (tmp_path / "runs.json").write_text(json.dumps(one))
    again = race("--runs=3", "--seed0=3")
    assert again.returncode == 0, again.stderr
    three = json.loads((tmp_path / "runs.json").read_text())
    assert three["runs"][0] == one["runs"][0]
    assert [(run["seed"], run["session"]) for run in three["runs"]] == [(4, 0), (3, 1), (5, 1)]
    values = [run["accuracy"]["multicrop"] for run in three["runs"]]
    summary = three["summary"]["accuracy"]["multicrop"]
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["sd"] == pytest.approx(np.std(values, ddof=1))
    assert f"mean {summary['mean']:.3f}" in again.stdout
    for session in three["sessions"]:
        seconds = session["compile_seconds"]
        assert 0 < seconds["cached"] < seconds["cold"] < session["process_seconds"]
    assert all(0 < run["seconds"] < 60 for run in three["runs"])

    workdir = tmp_path / "run"
    finish(program(*SPEEDRUN, "--config.seed=4", f"--workdir={workdir}"))
    assert result(workdir)["last"]["accuracy"] == one["runs"][0]["accuracy"]["none"]

    other = race("--runs=3", "--seed0=3", "--dtype=bfloat16")
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1].startswith("speedrun.py: ")
    assert "holds other runs: model.dtype differ" in other.stderr
