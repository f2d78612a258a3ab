"""Many timed runs of one recipe: python scripts/speedrun.py --runs 25 --data-dir data

Prints accuracy and seconds of each run, then mean, deviation and 95 % interval. --out (default
results/speedrun/CONFIG-DEVICE.json) holds all of it after every run; the same command adds the
seeds that are missing there. The clock of a run: initial weights with the whitening, every training
step, the test images under all views, until the device is done; compilation is timed apart. On an
accelerator the steps are one call for each set of frozen layers, in bfloat16; on CPU they are
calls as in training, in float32. --quick is a small run that shows that all works.
"""

import argparse
import importlib.util
import itertools
import json
import pathlib
import sys
import tempfile
import time

START = time.perf_counter()
ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from cifar_jax import InputError, compilation, sharding, timing, usage  # noqa: E402
from cifar_jax import workdir as files  # noqa: E402
from cifar_jax.experiment import check_seeds, make_experiment  # noqa: E402
from cifar_jax.provenance import device_name, environment  # noqa: E402
from cifar_jax.significance import interval  # noqa: E402
from cifar_jax.steps import VIEWS  # noqa: E402


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, required=True, help="seeds seed0, seed0 + 1, ...")
    parser.add_argument("--seed0", type=int, default=0)
    parser.add_argument("--data-dir", help="folder with CIFAR-10; default: the config's")
    parser.add_argument("--config", default="configs/speedrun.py", help="FILE[:VARIANT]")
    parser.add_argument("--dtype", help="default: bfloat16 on an accelerator, float32 on CPU")
    parser.add_argument("--out", help="JSON file of all runs; default: in results/speedrun/")
    parser.add_argument("--quick", action="store_true", help="a narrow network on the digits")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1 or arguments.seed0 < 0:
        parser.error("--runs must be at least 1 and --seed0 not negative")
    if arguments.out is None:
        path, _, variant = arguments.config.partition(":")
        parts = [pathlib.Path(path).stem, variant, "quick" if arguments.quick else ""]
        name = files.slug(" ".join([*parts, device_name()]))
        arguments.out = ROOT / "results" / "speedrun" / f"{name}.json"
    return arguments


def load_config(arguments):
    """The ConfigDict of the command line."""
    path, _, variant = arguments.config.partition(":")
    if not pathlib.Path(path).is_file():
        raise InputError(f"{path} is not a config file")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config(variant)
    except ValueError as error:
        raise InputError(str(error)) from error
    on_cpu = jax.default_backend() == "cpu"
    config.model.dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    config.data.dir = arguments.data_dir or config.data.dir
    if arguments.quick:
        config.data.name, config.epochs = "digits", 1.5
        config.model.widths, config.batch_size, config.eval.batch_size = (4, 8, 8), 64, 100
        config.schedule.freeze.whiten = 1
    return config


def plan(exp):
    """The compiled calls of a whole run: (number of steps, batch size, frozen layers)."""
    if not exp.config.drop_last:
        raise InputError("a timed run has batches of one size: it needs config.drop_last")
    changes = {0, exp.total_steps, *exp.schedules.freeze.values()}
    for first, end in itertools.pairwise(sorted(s for s in changes if s <= exp.total_steps)):
        frozen = exp.schedules.frozen(first)
        for count in exp.in_calls(end - first):
            yield count, exp.config.batch_size, frozen


class Race:
    """One Experiment, compiled and warm; `run` trains and measures a seed.

    compile_seconds: {'cold', 'cached': of all its programs with an empty and a filled cache}.
    """

    def __init__(self, exp):
        self.exp, self.calls = exp, [*plan(exp)]
        self.zeros = exp.no_metrics()
        self.compile_seconds = {}
        with tempfile.TemporaryDirectory() as folder, compilation.cache_in(folder):
            for cache in ("cold", "cached"):
                jax.clear_caches()
                self.compile_seconds[cache] = timing.seconds(self.compile)
        state = self.train(exp.init_state(), self.programs)
        jax.block_until_ready([evaluate(state, exp.test) for evaluate in self.evaluate.values()])

    def compile(self):
        exp, state = self.exp, self.exp.init_state()
        calls = {*self.calls}
        self.programs = {call: exp.compile_steps(call, state, self.zeros) for call in calls}
        self.evaluate = {
            views: exp.evaluations[views].lower(state, exp.test).compile() for views in VIEWS
        }

    def train(self, state, calls):
        metrics = self.zeros
        for call in calls:
            state, metrics = self.programs[call](state, metrics, self.exp.train)
        return state

    def run(self, seed):
        """{'seed', 'accuracy': {views: percent of the test images}, 'seconds'}."""
        start = time.perf_counter()
        state = self.train(self.exp.init_state(seed), self.calls)
        jax.block_until_ready(self.evaluate["multicrop"](state, self.exp.test))
        seconds = time.perf_counter() - start
        accuracy = {
            views: evaluate(state, self.exp.test)[0].summary()["accuracy"]
            for views, evaluate in self.evaluate.items()
        }
        return {"seed": seed, "accuracy": accuracy, "seconds": seconds}


def summarize(runs):
    """significance.interval of the seconds and of the accuracy under each choice of views."""
    accuracy = {views: interval([run["accuracy"][views] for run in runs]) for views in VIEWS}
    return {"accuracy": accuracy, "seconds": interval([run["seconds"] for run in runs])}


def show(name, figure):
    spread = ""
    if figure["interval"]:
        low, high = figure["interval"]
        spread = f"  sd {figure['sd']:.3f}  95 % interval {low:.3f} to {high:.3f}"
    print(f"{name:<10} n {figure['n']}  mean {figure['mean']:.3f}{spread}")


def speedrun(arguments):
    """Run the seeds that --out lacks; returns what it then holds."""
    check_seeds(arguments.seed0, arguments.runs)
    config = load_config(arguments)
    sharding.use_cores(config.batch_size)
    recipe = json.loads(json.dumps(config.to_dict()))
    recipe["data"].pop("dir")
    out = files.output(arguments.out)
    found = files.read_json(out) or {"runs": [], "sessions": []}
    here = environment()
    if not {"runs", "sessions"} <= found.keys() or found["runs"] and "config" not in found:
        raise InputError(f"{arguments.out} holds no speedruns; choose another")
    if found["runs"]:
        differing = [*files.differences(found["config"], recipe, files.FREE_FIELDS)]
        if found["device"] != here["device"]:
            differing.append("device")
        if differing:
            raise InputError(
                f"{arguments.out} holds other runs: {', '.join(differing[:3])} differ; choose "
                "another"
            )
    done = {run["seed"] for run in found["runs"]}
    seeds = range(arguments.seed0, arguments.seed0 + arguments.runs)
    missing = [seed for seed in seeds if seed not in done]
    if missing:
        race = Race(make_experiment(config))
        told = ", ".join(f"{s:.1f} s {cache}" for cache, s in race.compile_seconds.items())
        print(f"compiled in {told}", flush=True)
        session = {"compile_seconds": race.compile_seconds, **here}
        found |= {"config": recipe, "device": here["device"], "dataset": race.exp.provenance}
        found["sessions"].append(session)
    for seed in missing:
        run = {**race.run(seed), "session": len(found["sessions"]) - 1}
        found["runs"].append(run)
        session["process_seconds"] = time.perf_counter() - START
        files.write_json(out, {**found, "summary": summarize(found["runs"])})
        told = "  ".join(f"{views} {value:.2f} %" for views, value in run["accuracy"].items())
        print(f"seed {seed}: {told}  {run['seconds']:.3f} s", flush=True)
    summary = summarize(found["runs"])
    for views, figure in summary["accuracy"].items():
        show(views, figure)
    show("seconds", summary["seconds"])
    return {**found, "summary": summary}


if __name__ == "__main__":
    with usage.exit_codes():
        speedrun(parse(sys.argv[1:]))
