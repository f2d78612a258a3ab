"""scripts/gpu_suite.py, which has minutes of a GPU and no second try."""

import argparse
import ast
import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from running import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import benchmark  # noqa: E402
import gpu_suite  # noqa: E402
import results_store  # noqa: E402
import speedrun  # noqa: E402


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_every_command_can_be_parsed(part, quick, tmp_path, monkeypatch):
    args = argparse.Namespace(part=part, quick=quick, device="cpu", data_dir="DIR", jobs=None)
    jobs = gpu_suite.jobs(args, tmp_path / f"part{part}")
    assert len({job.name for job in jobs}) == len(jobs) >= (1, 4, 10)[part]
    for job in jobs:
        python, what, *rest = map(str, job.command)
        assert python == sys.executable
        if what.endswith("benchmark.py"):
            monkeypatch.setattr(sys, "argv", [what, *rest])
            assert benchmark.parse().measure == (["start"] if "start" in job.name else ["speed"])
        elif what.endswith("speedrun.py"):
            assert speedrun.load_config(speedrun.parse(rest)).lookahead.every
        elif what == "main.py":
            system, _, variant = rest[0].removeprefix("--config=configs/").partition(".py")
            config = importlib.import_module(f"configs.{system}").get_config(variant[1:])
            for override in (x for x in rest if x.startswith("--config.")):
                field, _, value = override.removeprefix("--config.").partition("=")
                with contextlib.suppress(ValueError, SyntaxError):
                    value = ast.literal_eval(value)
                config.update_from_flattened_dict({field: value})  # or KeyError
            config = json.loads(config.to_json_best_effort())
            if not quick and system != "speedrun":  # else results/ would not take what it measured
                assert results_store.recipe_of(system, config) == variant[1:]
        elif what == "-m":
            assert (ROOT / rest[-1]).is_file()


def test_the_probe_runs():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", gpu_suite.PROBE]
    out = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.endswith("compile and run\n") and "optax 0." in out


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_what_outlasts_its_share_is_stopped_with_its_children(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "LEAST", 5)
    child = "import os, pathlib, time; pathlib.Path('PID').write_text(str(os.getpid()))"
    child = child.replace("PID", str(tmp_path / "pid")) + "; time.sleep(60)"
    parent = (
        f"import signal, subprocess, sys, time; signal.signal({int(stop)}, lambda *_: sys.exit(7))"
    )
    parent += f"; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    job = gpu_suite.Job("slow", [sys.executable, "-c", parent], 60, stop=stop)
    end = gpu_suite.run(job, tmp_path, gpu_suite.LEAST, dict(os.environ))
    assert end == "stopped, exit code 7"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        status = pathlib.Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("its child goes on")


def test_a_stopped_recipe_ends_its_epoch(tmp_path, monkeypatch):
    """An interrupted run has no test accuracy, and its checkpoints do not come back."""
    monkeypatch.setattr(gpu_suite, "ROUND", 10)
    program = tmp_path / "main.py"
    program.write_text(
        "import json, pathlib, signal, sys, time\n"
        "stops = [a for a in sys.argv if a.startswith('--config.stop_after=')]\n"
        "def end(status, epochs):\n"
        "    text = json.dumps({'status': status, 'epochs': epochs, 'last': {}})\n"
        "    pathlib.Path(sys.argv[1], 'result.json').write_text(text)\n"
        "    sys.exit()\n"
        "if stops: end('stopped', int(stops[-1].partition('=')[2]))\n"
        "signal.signal(signal.SIGTERM, lambda *_: end('interrupted', 2.3))\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "vgg").mkdir()
    command = [sys.executable, program, tmp_path / "vgg"]
    job = gpu_suite.Job("vgg", command, 60, trains=True)
    assert gpu_suite.run(job, tmp_path, 12, {}) == "left out: no time"
    monkeypatch.setattr(gpu_suite, "LEAST", 2)
    assert gpu_suite.run(job, tmp_path, 12, dict(os.environ)) == "stopped, exit code 0"
    assert gpu_suite.measured(job, tmp_path) == "stopped after 3 epochs"


def test_a_job_with_a_limit_of_its_own_gets_it_from_what_is_left(tmp_path):
    show = "import sys; print(sys.argv[1:])"
    job = gpu_suite.Job("benchmark", [sys.executable, "-c", show], 300, own_limit=0.75)
    assert gpu_suite.run(job, tmp_path, 200, dict(os.environ)) == "exit code 0"
    assert gpu_suite.measured(job, tmp_path) == "['--seconds', '150.0']"


def test_what_cannot_begin_is_left_out(tmp_path):
    job = gpu_suite.Job("needs", ["false"], 60, (str(tmp_path / "none"),))
    assert gpu_suite.run(job, tmp_path, 100, {}).startswith("left out: no ")
    late = gpu_suite.Job("late", ["false"], 60)
    assert gpu_suite.run(late, tmp_path, gpu_suite.LEAST - 1, {}) == "left out: no time"


def test_the_slowest_family_is_profiled(tmp_path):
    assert gpu_suite.slowest(tmp_path) == "dilated"
    shares = {"vgg": 0.2, "airbench": 0.1, "resnet": 0.3}
    families = {
        name: {"batches": {"32": {"train": {"jax bfloat16": {"mfu": share}}}}}
        for name, share in shares.items()
    }
    (tmp_path / "benchmark_x.json").write_text(json.dumps({"families": families}))
    assert gpu_suite.slowest(tmp_path) == "speedrun"


def test_the_archive_leaves_checkpoints_out(tmp_path):
    folder = tmp_path / "part1"
    for name in ("resnet/checkpoints/3", "resnet/report"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    gpu_suite.pack(folder, tmp_path / "part1.tar.gz")
    with tarfile.open(tmp_path / "part1.tar.gz") as archive:
        names = archive.getnames()
    assert "part1/resnet/report/file" in names
    assert not any("checkpoints" in name for name in names)
