"""Everything worth measuring on a lent GPU, in calls of ten minutes: scripts/gpu_suite.py --part 1

Runs the jobs of --part 0, 1 or 2 by value, each in a process of its own with a timeout, goes on
after a failure, packs all that came of them into OUT/partN.tar.gz after each job and prints a table
last. OUT is --out, else $OUT, else runs/gpu_suite. Nothing is begun that cannot end within
--seconds; a job that outlasts its share gets SIGTERM, upon which training saves; it then goes on to
the end of its epoch, so that its result.json has a test accuracy.

    part 0   a probe of what programs need of the machine; the GPU's tests; neither needs data
    part 1   the speedrun, 25 runs; resnet and its tuned recipe; benchmark in bfloat16 at the
             recipe's batch, PyTorch eager and compiled
    part 2   a profile of the family with the smallest share of the peak; speedrun:96; time to the
             first step and memory; benchmark in float32; the tuned recipes of the other systems and
             theirs, on the whole data, as far as they come; benchmark at 512 images

Part 1 alone answers what matters most: a lease may be too short for all, and --seconds then says
how much of part 2 there is. `--device cpu --quick` does the same in small, to see
that it works; --jobs takes some of them. On a GPU machine of your own (the first line sets up,
PyTorch included):

    CIFAR_JAX_TEST_GPU=1 scripts/test.sh -n 0 -W default tests/gpu_test.py
    .venv/bin/python scripts/gpu_suite.py --part 1 --data-dir DIR
    .venv/bin/python scripts/gpu_suite.py --part 2 --data-dir DIR

For this project's own sessions: the machine lent to them has Python 3.12, jax 0.11, torch 2.11,
flax, optax, orbax, scipy, matplotlib, jinja2, tqdm, scikit-learn, safetensors and pytest. One wheel
is missing, ml_collections (pure Python; needs absl-py and PyYAML, which are there);
tensorflow-datasets too, which nothing here imports. A call carries 64 MiB at most, CIFAR-10 packed
is 97 MiB: it travels in two halves.
Here, in the repository, once (.whl and .carry are ignored by git):

    python3 -m pip download --no-deps -d .whl ml_collections==1.1.0
    python3 ../shared/data/cifar10/unpack.py --parts .carry
    cp ../shared/data/cifar10/unpack.py .carry/part1

Then three commands for the device tool, at once after each other (it stays warm for 30 s). Where
the probe fails for want of libdevice or ptxas, export CUDA_ROOT, the folder above nvcc's:

    1  carry .carry/part0 and .whl:
       mkdir -p /tmp/c && cp .carry/part0/* /tmp/c &&
       python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl &&
       export PYTHONPATH=/tmp/site CIFAR_JAX_COMMIT=(what git rev-parse HEAD says here) &&
       python3 scripts/gpu_suite.py --part 0 --seconds 380
    2  carry .carry/part1:
       cp .carry/part1/* /tmp/c && python3 /tmp/c/unpack.py /tmp/cifar &&
       the same exports && python3 scripts/gpu_suite.py --part 1 --data-dir /tmp/cifar
    3  with what is left:
       the same exports && python3 scripts/gpu_suite.py --part 2 --data-dir /tmp/cifar --seconds N
       (N is 550 at most: the tool kills what runs for longer than 600 s)

Without --data-dir the jobs that need the images are left out; the others use random ones. What
comes back belongs in results/: speedrun.json in speedrun/, benchmark_*.json in benchmarks/.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cifar_jax import usage  # noqa: E402

GRACE = 20  # seconds that a job has after SIGTERM
LEAST = 20  # seconds: with less left a job is not begun
ROUND = 30  # seconds of a recipe's share in which one that was stopped ends its epoch
NEEDED = ("jax", "flax", "optax", "orbax", "ml_collections", "scipy", "safetensors")
NEEDED += ("matplotlib", "jinja2", "tqdm")
PROBE = """
import jax, jax.numpy as jnp, optax.contrib
from cifar_jax import timing, train
from cifar_jax.models.layers import convolve
from cifar_jax.provenance import environment
for name, version in environment()["versions"].items():
    print(name, version)
optax.contrib.muon(1e-3)
x = jnp.ones((8, 32, 32, 16), "bfloat16")
kernel = jnp.ones((3, 3, 16, 16), "bfloat16")
total = lambda kernel: convolve(x, kernel, 1).astype("float32").sum()
print(jax.jit(lambda x: jnp.log(x) + jnp.tanh(x) + x**x)(2.0))
print(jnp.linalg.eigh(jnp.eye(27))[0].sum())
print(jax.jit(jax.grad(total))(kernel).astype("float32").mean())
print(*jax.devices(), "compile and run")
"""


@dataclasses.dataclass
class Job:
    """A command, run in the repository; `seconds` is its share of the part's time."""

    name: str
    command: list
    seconds: float
    needs: tuple = ()  # files without which it is left out
    stop: int = signal.SIGTERM  # what ends it when its share is over
    trains: bool = False  # stopped, it goes on to the end of its epoch, to be measured there
    own_limit: float = 0.0  # part of its time after which its --seconds has it begin nothing more


def jobs(args, folder):
    """The jobs of args.part in the order of their value."""
    python, script = sys.executable, str(ROOT / "scripts" / "benchmark.py")
    quick = ["--quick"] if args.quick else []
    data = ["--data-dir", args.data_dir] if args.data_dir else []

    def benchmark(name, seconds, families, *more, measure="speed"):
        # the time may end before the last family: each job has them in another order
        out = str(folder / name / f"{name}.json")
        command = [python, script, "--device", args.device, "--out", out, *quick]
        command += [f"--measure={measure}", f"--families={families}"]
        # so that the family under way can end
        return Job(name, [*command, *more], seconds, own_limit=0.75)

    def recipe(name, seconds, *more, job=None):
        system, colon, variant = name.partition(":")
        name = job or (f"{system}-{variant}" if variant else system)
        where = [f"--config=configs/{system}.py{colon}{variant}", f"--workdir={folder / name}"]
        where += ["--config.save_every=8"] * bool(variant) + [*more]
        if args.quick:  # two steps on the embedded digits
            small = ("data.name=digits", "batch_size=16", "eval.batch_size=16", "stop_after=0.02")
            where += [f"--config.{field}" for field in small]
        else:
            where += [f"--config.data.dir={args.data_dir}"]
        needs = () if args.quick else (args.data_dir,)
        return Job(name, [python, "main.py", *where], seconds, needs, trains=True)

    speedrun = ROOT / "scripts" / "speedrun.py"

    def runs(name, seconds, count, *more):
        command = [python, speedrun, f"--out={folder / name}.json", *more]
        command += ["--runs=2", "--quick"] if args.quick else [f"--runs={count}", *data]
        return Job(name, command, seconds, () if args.quick else (args.data_dir,))

    low = "--config.model.dtype=bfloat16"
    # by name: to collect the others takes packages that a lent machine lacks; a warning that only
    # a GPU brings fails no test
    pytest = [python, "-m", "pytest", "-vv", "-W", "default", "-p", "no:cacheprovider"]
    zeroth = [
        Job("probe", [python, "-c", PROBE], 60),
        Job("tests", [*pytest, "tests/gpu_test.py"], 280, stop=signal.SIGINT),  # tells what failed
    ]
    first = [
        runs("speedrun", 140, 25),
        recipe("resnet", 90),
        recipe("resnet:tuned", 90, low),
        benchmark(
            *("benchmark_bfloat16", 300, "resnet,airbench,vgg,mixture,convnet,dilated"),
            *("--dtypes=bfloat16", "--batch=recipe"),
        ),
    ]
    plain = "--config.report=False"  # what comes back from a lent machine may be 16 MiB
    tuned = ("mixture", "dilated", "vgg", "convnet")
    second = [
        recipe(
            *(slowest(folder.parent), 75, low, plain),
            *("--config.profile=True", "--config.stop_after=0.01"),
            job="profile",
        ),
        runs("speedrun-96", 150, 3, "--config=configs/speedrun.py:96"),
        benchmark(
            *("benchmark_start", 150, "resnet,airbench", "--dtypes=bfloat16"),
            measure="start",
        ),
        benchmark(
            *("benchmark_float32", 150, "dilated,convnet,mixture,vgg,resnet,airbench"),
            *("--dtypes=float32", "--batch=recipe"),
        ),
        *(recipe(f"{name}:tuned", 90, low, plain) for name in tuned),
        recipe("mixture", 100, plain),
        # of 120 to 400 epochs in small batches: as far as they come
        *(recipe(name, 100, plain) for name in ("convnet", "vgg", "dilated")),
        # without resnet, whose recipe has 512
        benchmark("benchmark_512", 200, "vgg,mixture,convnet,dilated,airbench", "--batch=512"),
    ]
    chosen = (zeroth, first, second)[args.part]
    if args.quick:
        for job in chosen:
            if "benchmark" in job.name:
                job.command += ["--families=vgg", "--batch=16"]
    return [job for job in chosen if not args.jobs or job.name in args.jobs.split(",")]


def slowest(folder):
    """The system or speedrun whose training reaches the smallest share of the peak on JAX's side,
    by the benchmarks under `folder`; 'dilated' where there are none."""
    shares = {}
    for path in folder.rglob("benchmark_*.json"):
        for family, entry in json.loads(path.read_text())["families"].items():
            for batch in entry.get("batches", {}).values():
                for name, form in batch.get("train", {}).items():
                    if name.startswith("jax") and "mfu" in form:
                        shares[family] = min(form["mfu"], shares.get(family, 1.0))
    family = min(shares, key=shares.get, default="dilated")
    return {"airbench": "speedrun"}.get(family, family)


def run(job, folder, seconds, environment):
    """Run `job` for `seconds` at most; its output goes to folder/NAME.log. Returns how it ended."""
    missing = [need for need in job.needs if not need or not pathlib.Path(need).exists()]
    if missing:
        return f"left out: no {missing[0] or '--data-dir'}"
    if seconds < LEAST + ROUND * job.trains:
        return "left out: no time"
    limit = ["--seconds", job.own_limit * seconds] if job.own_limit else []
    ending = run_for(seconds - ROUND * job.trains, [*job.command, *limit], job, folder, environment)
    result = folder / job.name / "result.json"
    if job.trains and result.exists():
        found = json.loads(result.read_text())
        if found["status"] == "interrupted":
            whole = f"--config.stop_after={max(1, math.ceil(found['epochs']))}"
            run_for(ROUND, [*job.command, whole], job, folder, environment)
    return ending


def run_for(seconds, command, job, folder, environment):
    """Run `command` for `seconds`, then stop it as the job says; returns how it ended."""
    with open(folder / f"{job.name}.log", "a") as log:
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            process.send_signal(job.stop)
            try:
                return f"stopped, exit code {process.wait(GRACE)}"
            except subprocess.TimeoutExpired:
                return "killed"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children too, which may hold the GPU
            process.wait()


def measured(job, folder):
    """What came of a job, in a few words."""
    path = folder / job.name / "result.json"
    if path.exists():
        result = json.loads(path.read_text())
        accuracy = (result["last"] or {}).get("accuracy")
        found = "" if accuracy is None else f", test {accuracy:.2f} %"
        return f"{result['status']} after {result['epochs']:g} epochs{found}"
    log = folder / f"{job.name}.log"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:60]


def pack(folder, target):
    """All that lies in `folder`, checkpoints aside, as the archive `target`."""
    part = target.with_name(f".{target.name}.part")
    with tarfile.open(part, "w:gz") as archive:
        archive.add(
            folder, folder.name, filter=lambda i: None if i.name.endswith("/checkpoints") else i
        )
    part.replace(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=(0, 1, 2), required=True)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--data-dir", help="CIFAR-10")
    parser.add_argument("--out", help="where the archives go")
    parser.add_argument("--seconds", type=float, default=550, help="for all of the part")
    parser.add_argument("--jobs", help="only these, joined by commas")
    parser.add_argument("--quick", action="store_true", help="the same in small")
    args = parser.parse_args()
    began = time.monotonic()
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
        usage.refuse(f"{missing[0]} is not installed; see the file's head")
    out = pathlib.Path(args.out or os.environ.get("OUT") or ROOT / "runs" / "gpu_suite").absolute()
    folder = ROOT / "runs" / "gpu_suite" / f"part{args.part}"
    folder.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["JAX_PLATFORMS"] = {"gpu": "cuda,cpu"}.get(args.device, args.device)
    environment["CIFAR_JAX_TEST_GPU"] = "1" if args.device == "gpu" else "0"
    # the initial weights' program is the same in many of these processes
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "runs" / "gpu_suite_cache"))
    table = []
    for job in jobs(args, folder):
        start = time.monotonic()
        left = began + args.seconds - GRACE - start
        ending = run(job, folder, min(job.seconds, left), environment)
        seconds = time.monotonic() - start
        table.append(f"{job.name:20} {seconds:6.1f} s  {ending:24} {measured(job, folder)}")
        print(table[-1], flush=True)
        (folder / "table.txt").write_text("\n".join(table) + "\n")
        pack(folder, out / f"part{args.part}.tar.gz")
    print(f"\npart {args.part}, {time.monotonic() - began:.0f} s, {out}", *table, sep="\n")


if __name__ == "__main__":
    main()
