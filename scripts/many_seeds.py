"""How fast many seeds at once are: python scripts/many_seeds.py --seeds 32 --data-dir data

Runs main.py --mode=seeds with so many seeds, then a run of each seed by itself, one after the
other, each a process of its own as a user starts it, and a few seeds with each of the other
strategies. Says how many replicas end with the very figures of their run. Writes
results/seeds/CONFIG-DEVICE.json. What is timed has run before, so that its programs are cached.
"""

import argparse
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cifar_jax import InputError, sharding, usage  # noqa: E402
from cifar_jax import workdir as files  # noqa: E402
from cifar_jax.replicas import STRATEGIES  # noqa: E402
from cifar_jax.significance import interval  # noqa: E402

SAME = ("epochs", "best", "last", "test", "per_class")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--config", default="configs/convnet.py", help="FILE[:VARIANT]")
    parser.add_argument("--data-dir", default="data", help="folder with CIFAR-10")
    parser.add_argument("--epochs", type=float, default=0.05, help="trained of the recipe")
    parser.add_argument("--few", type=int, default=4, help="seeds that compare the strategies")
    parser.add_argument("--few-epochs", type=float, default=0.01, help="trained by these")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    parser.add_argument("rest", nargs="*", metavar="--config.FIELD=VALUE", help="after --")
    return parser.parse_args(argv)


def run(workdir, arguments, *more):
    """({'seconds', 'cpu_seconds'}, the result) of main.py with these arguments in `workdir`.

    CPU seconds, over all cores, say how much work it was where the machine does other work too. On
    one device, as --mode=seeds trains, or the figures would not be the same to the last bit.
    """
    one = {"JAX_NUM_CPU_DEVICES": "1"} if sharding.cores_for(1) else {}
    command = [sys.executable, "main.py", f"--config={arguments.config}", f"--workdir={workdir}"]
    command += [f"--config.data.dir={arguments.data_dir}", "--config.report=False", *more]
    start, before = time.perf_counter(), cpu_seconds()
    command += arguments.rest
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **one}, capture_output=True, text=True
    )
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - before}
    if done.returncode:
        raise InputError(f"main.py {' '.join(more)}: {done.stderr}")
    name = "seeds" if "--mode=seeds" in more else "train"
    return spent, files.read_json(pathlib.Path(workdir) / files.RESULTS[name])


def cpu_seconds():
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def total(spent):
    """The sum of what `run` says was spent."""
    return {key: sum(one[key] for one in spent) for key in ("seconds", "cpu_seconds")}


def main(argv):
    arguments = parse(argv)
    if min(arguments.seeds, arguments.few) < 1:
        raise InputError("--seeds and --few must be at least 1")
    if arguments.out:
        files.output(arguments.out)  # else refused after hours
    stop = f"--config.stop_after={arguments.epochs}"
    few = (
        f"--config.seeds={arguments.few}",
        "--mode=seeds",
        f"--config.stop_after={arguments.few_epochs}",
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        strategies = {}
        for name in STRATEGIES:
            strategy = f"--config.replicas.strategy={name}"
            run(folder / "warm", arguments, strategy, *few)
            shutil.rmtree(folder / "warm")
            spent, result = run(folder / name, arguments, strategy, *few)
            strategies[name] = {"images_per_second": result["images_per_second"], **spent}
            print(f"{name}: {result['images_per_second']:,.0f} images/s", flush=True)
        run(folder / "warm", arguments, stop)
        seeds = f"--config.seeds={arguments.seeds}"
        together, result = run(folder / "together", arguments, stop, seeds, "--mode=seeds")
        print(f"{arguments.seeds} seeds at once: {together['seconds']:.1f} s", flush=True)
        replicas, singles, same = result["replicas"], [], 0
        for i, replica in enumerate(replicas):
            seed = f"--config.seed={replica['seed']}"
            spent, single = run(folder / f"single-{i}", arguments, stop, seed)
            singles.append({**spent, "train_seconds": single["seconds"]["train"]})
            same += all(single[key] == replica[key] for key in SAME)
            print(f"seed {replica['seed']} by itself: {spent['seconds']:.1f} s", flush=True)
    images = result["images_per_second"] * result["seconds"]["train"]
    alone = total(singles)
    found = {
        "model": result["model"],
        "settings": {
            "seeds": arguments.seeds,
            "epochs": arguments.epochs,
            "few": arguments.few,
            "few_epochs": arguments.few_epochs,
            "overrides": arguments.rest,
        },
        "steps": result["steps"],
        "images": round(images),  # trained on, over all seeds
        "strategy": result["strategy"],
        "together": {
            **together,
            "images_per_second": result["images_per_second"],
            "parts": result["seconds"],
        },
        "single": {
            **alone,
            "images_per_second": images / sum(single["train_seconds"] for single in singles),
            "runs": singles,
        },
        "times_faster": alone["seconds"] / together["seconds"],
        "less_cpu": alone["cpu_seconds"] / together["cpu_seconds"],
        "same_figures": same,
        "strategies": strategies,
        "accuracy": interval([replica["test"]["accuracy"] for replica in replicas]),
        **{key: result[key] for key in ("dataset", "device", "versions", "commit")},
    }
    stem = pathlib.Path(arguments.config.partition(":")[0]).stem
    name = files.slug(f"{stem} {result['device'].split(' x ')[1].split(' (')[0]}")
    out = arguments.out or ROOT / "results" / "seeds" / f"{name}.json"
    files.write_json(files.output(out), found)
    print(
        f"{found['times_faster']:.2f} times as fast as in turn; {same} of {len(replicas)} the same"
    )
    print(f"written: {out}")


if __name__ == "__main__":
    with usage.exit_codes():
        main(sys.argv[1:])
