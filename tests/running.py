"""Running the program in processes of its own, and reading what a run left."""

import atexit
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
QUICK = (
    *("--config=configs/quickstart.py", "--config.model.widths=4,8,8,8", "--config.epochs=3"),
    "--config.batch_size=80",  # 19 steps an epoch: two programs, of 6 steps and of the last one
    "--config.report=False",  # drawing takes longer than training
)
SMALLER = ("--config.model.name=convnet", "--config.model.widths=4,4,4,8,8")  # compiles sooner
SPEEDRUN = (  # its bias is frozen within these 35 steps
    *("--config=configs/speedrun.py", "--config.data.name=digits", "--config.epochs=1.5"),
    *("--config.model.widths=4,8,8", "--config.batch_size=64", "--config.eval.batch_size=100"),
    *("--config.schedule.freeze.whiten=1", "--config.report=False"),
    "--config.steps_per_call=23",  # two programs: of 23 steps, and of 12 with the layer frozen
)
PRELOADED = (  # the program imports these when it needs them
    *("cifar_jax.train", "cifar_jax.compare", "cifar_jax.page"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)
TIMES = ("seconds", "images_per_second")


def start(*arguments, cache, devices=1, prefix=(), variables=None):
    """A running main.py; `prefix` is the command that runs it, `variables` more environment."""
    return subprocess.Popen(
        [*prefix, sys.executable, "main.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **_environment(cache, devices, variables)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _environment(cache, devices, variables):
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **(variables or {}),
    }


class Fork:
    """main.py as `start` runs it, but forked from a server that has its imports done: two seconds
    earlier. `fault` is called in it first; it may replace functions of the program.
    """

    def __init__(self, *arguments, cache, devices=1, variables=None, fault=None):
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["running", "main", *PRELOADED])
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [f"{self.folder.name}/{name}" for name in ("out", "err")]
        self.process = context.Process(
            target=_main,
            args=(
                [*map(str, arguments)],
                _environment(cache, devices, variables),
                self.outputs,
                fault,
            ),
        )
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("main.py", timeout)
        return tuple(pathlib.Path(path).read_text() for path in self.outputs)


def _main(arguments, environment, outputs, fault):
    """main.py in this process, which ends with its exit code."""
    os.chdir(ROOT)
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["main.py", *arguments]
    import jax
    from absl import app

    import main

    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if fault:
        fault()
    try:
        app.run(main.main, flags_parser=main.parse)
    finally:
        atexit._run_exitfuncs()  # a forked process would leave without


def places():
    """{name: (object, attribute)} of what a run calls, where a fault can strike."""
    from cifar_jax import progress, report, train

    return {
        "data": (train, "make_experiment"),
        "restore": (train.Run, "restore"),
        "compile": (train.Run, "compile_call"),
        "step": (progress.tqdm, "update"),  # once a call: of 6, 6, 6 and 1 steps in an epoch
        "evaluate": (train.Run, "end_epoch"),
        "log": (train.files, "append_metrics"),
        "save": (train.Checkpoints, "save"),
        "report": (report, "write_report"),
        "result": (train.files, "write_json"),
    }


def strike(place, call, before=lambda *args: None, after=lambda *args: None):
    """At the `call`-th call of a place do something before or after it."""
    target, name = places()[place]
    original, count = getattr(target, name), 0

    def struck(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            before(*args)
        value = original(*args, **kwargs)
        if count == call:
            after(*args)
        return value

    setattr(target, name, struck)


def send(*signums):
    """What sends this process these signals."""
    return functools.partial(_send, signums)


def _send(signums, *args):
    for signum in signums:
        os.kill(os.getpid(), signum)


def start_job(*arguments, processes=2, **settings):
    """That many running main.py's as one job on this machine, two devices each; see Fork."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    return [
        Fork(*arguments, f"--distributed=localhost:{port},{processes},{i}", devices=2, **settings)
        for i in range(processes)
    ]


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, (out, err)
    return out, err


def metrics(workdir):
    """metrics.jsonl without what a clock wrote."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def arrays(workdir):
    """Every array of the latest checkpoint, read with Orbax alone: {path: numpy array}."""
    import jax
    import orbax.checkpoint as ocp

    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    out = {"step": step}
    for item in ("model", "training"):
        with ocp.StandardCheckpointer() as checkpointer:
            path = workdir / "checkpoints" / str(step) / item
            target = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device),
                dict(checkpointer.metadata(path).item_metadata.tree),
            )
            tree = checkpointer.restore(path, target)
        for key, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
            out[item + jax.tree_util.keystr(key)] = np.asarray(value)
    return out


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    ours, theirs = arrays(a), arrays(b)
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    first, second = result(a), result(b)
    for key in ("status", "best", "last", "test", "per_class", "steps", "epochs", "dataset"):
        assert first[key] == second[key]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def copy_checkout(folder):
    """The files of this checkout, tracked or not ignored, in a `folder`."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file() and not name.startswith("results/"):
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
