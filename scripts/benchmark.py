"""Speed of every family beside PyTorch on this device: python scripts/benchmark.py --device gpu

Measured in turn within one run, JAX, PyTorch eager and torch.compile in its default mode
(channels_last, autocast for bfloat16), each framework in a process of its own, at the recipe's
batch size and at 512: images/s of training and of evaluation, each also as a share (`mfu`) of the
peak that a large matrix product reached in this run; and, each in a fresh process, the time to the
first step with an empty and with a filled compilation cache, and the peak memory. JAX augments
within the step; PyTorch is handed finished batches, and so, in a form of its own, is JAX. FLOPs are
exact counts of convolutions and matrix products (cifar_jax/flops.py), three forward passes' worth
for training.

Writes --out (default results/benchmarks/DEVICE.json) as it goes, and at the end a table
(.md) and a chart (.png) beside it. --quick is a small run that shows that all works.
"""

import argparse
import functools
import importlib
import importlib.metadata
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave PyTorch its share

import jax  # noqa: E402
import numpy as np  # noqa: E402

from cifar_jax import InputError, first_line, report, timing, usage  # noqa: E402
from cifar_jax import workdir as files  # noqa: E402
from cifar_jax.exchange import load_torch_twin  # noqa: E402
from cifar_jax.experiment import make_experiment  # noqa: E402
from cifar_jax.flops import TRAINING, forward_macs  # noqa: E402
from cifar_jax.models import MODELS  # noqa: E402
from cifar_jax.own_process import OwnProcess  # noqa: E402
from cifar_jax.provenance import device_name, environment  # noqa: E402
from cifar_jax.workdir import short_commit  # noqa: E402

CONFIGS = {name: name for name in ("vgg", "convnet", "resnet", "mixture", "dilated")}
CONFIGS["airbench"] = "speedrun"
SIZES = {"train": 50_000, "test": 10_000}
QUICK_SIZES = {"train": 1_024, "test": 256}
KINDS = {
    "jax": "JAX, augmenting",
    "jax.given": "JAX, given batches",
    "torch": "PyTorch eager",
    "torch.compile": "PyTorch compiled",
}


def main():
    args = parse()
    with usage.exit_codes():
        use(args.device)
        # memory in huge pages, as scripts/setup.sh asks for, for the processes of both frameworks
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        benchmark(args, out_file(args, ""), twin_or_none())


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--families", default=",".join(CONFIGS), help="joined by commas")
    parser.add_argument("--batch", default="recipe,512", help="sizes joined by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--measure", default="speed,start", help="joined by commas")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, every form once in each")
    parser.add_argument("--starts", type=int, default=1, help="rounds of starts")
    parser.add_argument("--task-seconds", type=float, default=0.0, help="of rounds, at least")
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--data-dir", help="CIFAR-10; else random pixels, which take as long")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    parser.add_argument("--out", help="the JSON file")
    parser.add_argument("--quick", action="store_true", help="2 rounds of narrow networks, float32")
    args = parser.parse_args()
    args.began = time.monotonic()
    if args.quick:
        args.batch, args.dtypes, args.rounds, args.no_compiled = "32", "float32", 2, True
    for field, known in (
        ("families", CONFIGS),
        ("dtypes", ("float32", "bfloat16")),
        ("measure", ("speed", "start")),
    ):
        values = getattr(args, field).split(",")
        unknown = [value for value in values if value not in known]
        if unknown:
            usage.refuse(f"--{field}: unknown {unknown[0]!r}; choose of {', '.join(known)}")
        setattr(args, field, values)
    args.batch = args.batch.split(",")
    if not all(b == "recipe" or (b.isdigit() and int(b)) for b in args.batch):
        usage.refuse(f"--batch: {','.join(args.batch)} is not 'recipe' or numbers of at least 1")
    for field in ("rounds", "starts"):
        if getattr(args, field) < 1:
            usage.refuse(f"--{field} must be at least 1")
    if not 0 <= args.task_seconds < float("inf"):
        usage.refuse("--task-seconds must be a finite number of at least 0")
    return args


def use(device):
    """Make "cpu" or "gpu" the platform; InputError where there is none."""
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(device, device)
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where CUDA's plugin is missing
        raise InputError(f"no {device} here: {str(error) or 'jax has no such platform'}") from error


def out_file(args, suffix):
    """args.out, else results/benchmarks/DEVICE`suffix`.json, in a folder that can be written;
    InputError where that holds what was measured otherwise."""
    named = f"{files.slug(device_name())}{suffix}{'_quick' * args.quick}.json"
    out = files.output(args.out or ROOT / "results" / "benchmarks" / named)
    before = {} if args.out else (files.read_json(out) or {}).get("settings", {})
    here = settings_of(args)
    differing = [name for name in before if name in here and before[name] != here[name]]
    if differing:
        raise InputError(
            f"{out} was measured with other {differing[0]}; name another file with --out"
        )
    return out


def settings_of(args):
    """What of the arguments decides what is measured."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "began", "data_dir")}
    if settings.get("seconds") == float("inf"):
        settings["seconds"] = None
    return settings


def twin_or_none():
    """The package cifar_jax.torch_twin, or None without PyTorch."""
    try:
        return load_torch_twin()
    except InputError:
        return None


def provenance(args, twin):
    """What the figures depend on besides the code."""
    found = {
        **environment(),
        "device": device_name(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "settings": settings_of(args),
    }
    if twin:
        found["versions"]["torch"] = importlib.metadata.version("torch")
    return found


def benchmark(args, out, twin):
    """Measure what `args` ask for; see the file's docstring."""
    with timing.frameworks(twin is not None) as processes:
        result = measure(args, out, twin, processes)
    text = markdown(result)
    out.with_suffix(".md").write_text(text)
    rows = chart_rows(result)
    if rows:
        report.save({out.stem: report.draw_benchmark(rows)}, out.parent)
    print(text)
    failed = [name for name, entry in result["families"].items() if "error" in entry]
    if failed:
        sys.exit(f"benchmark.py: failed: {', '.join(failed)}")


def measure(args, out, twin, processes):
    """What `args` ask for, also written to `out` as it comes; `processes` are timing.frameworks."""
    sizes = None if args.data_dir else (QUICK_SIZES if args.quick else SIZES)
    result = {"status": "running", **provenance(args, twin)}
    result["data"] = "CIFAR-10" if args.data_dir else f"random pixels, {sizes['train']} images"
    if args.quick:
        result["data"] += "; narrow networks: these figures say nothing about speed"
    result["peaks"], result["families"] = {dtype: {} for dtype in args.dtypes}, {}
    for name, function in (("speed", measure_speed), ("start", measure_start)):
        for family in args.families if name in args.measure else ():
            if time.monotonic() - args.began > args.seconds:
                print(f"{family}: {name} left out, the time is spent", flush=True)
                continue
            entry = result["families"].setdefault(family, {})
            print(f"{family}: {name}", flush=True)
            try:
                if name == "speed":
                    raise_peaks(result["peaks"], processes)
                config = family_config(family, args)
                for _ in function(args, entry, config, sizes, twin, processes):
                    set_shares(result)
                    files.write_json(out, result)  # what is measured stays if this is stopped
            except Exception as error:  # one family that fails leaves the others their figures
                entry["error"] = f"{type(error).__name__}: {first_line(error)}"
                print(f"{family}: {entry['error']}", flush=True)
            files.write_json(out, result)
    result["status"] = "done"
    files.write_json(out, result)
    return result


def family_config(family, args):
    """The family's recipe, on the data that `args` name; --quick narrows what has `widths`."""
    config = importlib.import_module(f"configs.{CONFIGS[family]}").get_config()
    if args.data_dir:
        config.data.dir = args.data_dir
    widths = getattr(MODELS[config.model.name], "widths", None)
    if args.quick and isinstance(widths, tuple):
        config.model.widths = tuple(max(8, width // 8) for width in widths)
    return config


def batch_sizes(args, config):
    """The batch sizes to measure, each once."""
    return sorted({config.batch_size if b == "recipe" else int(b) for b in args.batch})


def make_sides(config, batch_size, sizes, twin):
    """timing.Sides of a recipe at `batch_size`; JAX alone where PyTorch cannot do the recipe."""
    config = config.copy_and_resolve_references()
    config.batch_size = batch_size
    exp = make_experiment(config, splits=timing.splits_of(config, sizes))
    sides = timing.Sides(exp, twin)
    if twin:
        try:
            sides.make_recipe()
        except InputError as error:
            print(f"{config.model.name}: JAX alone: {error}", flush=True)
            sides.twin = None
    return sides


def measure_speed(args, entry, config, sizes, twin, processes):
    """Add batches.SIZE.{train,evaluate}.FORM: what time_forms measures; yields after each task."""
    entry["recipe_batch"] = config.batch_size
    for batch_size in batch_sizes(args, config):
        sides = make_sides(config, batch_size, sizes, twin)
        entry["macs"] = forward_macs(sides.exp.model.clone(dtype=np.float32))
        entry["params"] = sides.exp.count_params()
        steps = 1 if args.quick else timing.usual_steps(batch_size)
        with_torch = sides.twin is not None
        for task in ("train", "evaluate"):
            given = with_torch and task == "train"
            names = timing.form_names(args.dtypes, not args.no_compiled, with_torch, given)
            timed = timing.time_forms(
                processes,
                sides.exp.config.to_dict(),
                names,
                task=task,
                steps=steps,
                rounds=args.rounds,
                least_seconds=args.task_seconds,
                sizes=sizes,
            )
            entry.setdefault("batches", {}).setdefault(str(batch_size), {})[task] = timed
            yield


def measure_start(args, entry, config, sizes, twin, _):
    """Add start.FORM: first_step {cold, warm} in seconds, medians of args.starts `rounds`, and
    peak_memory in bytes, at the smallest of the batch sizes; each from a fresh process. Yields
    after each form."""
    batch_size = batch_sizes(args, config)[0]
    with_torch = make_sides(config, batch_size, sizes, twin).twin is not None
    config.batch_size = batch_size
    entry["start_batch"] = batch_size
    for name in timing.form_names(args.dtypes, not args.no_compiled, with_torch):
        kind, dtype = name.split(" ")
        config.model.dtype = dtype if kind == "jax" else "float32"  # PyTorch's: autocast
        starts = [fresh_starts(config, name, sizes) for _ in range(args.starts)]
        seconds = [{state: x["first_step"] for state, x in start.items()} for start in starts]
        steps = {state: statistics.median(x[state] for x in seconds) for state in seconds[0]}
        entry.setdefault("start", {})[name] = {
            "first_step": steps,
            "rounds": seconds,
            "peak_memory": [*starts[-1].values()][-1]["peak_memory"],
        }
        print(f"{name}: first step after {steps}", flush=True)
        yield


def fresh_starts(config, name, sizes):
    """{"cold", "warm"}: what timing.fresh_start finds in a process of its own with an empty
    compilation cache, and in a second one with that cache filled. PyTorch eager has only the first:
    it keeps nothing."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "TORCHINDUCTOR_CACHE_DIR": cache,
            **timing.on_cores(config.batch_size),
        }
        states, found = ("cold",) if name.startswith("torch ") else ("cold", "warm"), {}
        for state in states:
            with OwnProcess(variables) as process:
                found[state] = process(timing.fresh_start, config.to_dict(), name, sizes)
    return found


def raise_peaks(peaks, processes):
    """Raise peaks[dtype][framework] to what is reached now; once would not do, for a machine that
    others use has slow minutes."""
    for dtype, best in peaks.items():
        for name, process in processes.items():
            best[name] = max(process(matrix_product, dtype, name), best.get(name, 0.0))
        reached = ", ".join(f"{name} {value / 1e12:.3f}" for name, value in best.items())
        print(f"{dtype}: {reached} TFLOP/s", flush=True)


def set_shares(result):
    """Give every measured form its `mfu`, its share of the higher of both sides' peaks."""
    for entry in result["families"].values():
        for tasks in entry.get("batches", {}).values():
            for task, forms in tasks.items():
                flops = 2 * entry["macs"] * {"train": TRAINING, "evaluate": 1}[task]
                for name, form in forms.items():
                    if "error" not in form:
                        peak = max(result["peaks"][name.split(" ")[1]].values())
                        form["mfu"] = form["images_per_second"] * flops / peak


def matrix_product(dtype, framework):
    """FLOP/s of a large square matrix product in `dtype`, the best of 5 rounds.

    float32 on a GPU with tf32 allowed, as the convolutions of both sides have it.
    """
    run, flops = products(dtype, framework)
    return flops / min(timing.seconds(run) for _ in range(5))


@functools.cache
def products(dtype, framework):
    """(run, its floating-point operations), warmed up; made once in a process."""
    on_gpu = jax.default_backend() == "gpu"
    n, count = (8192, 10) if on_gpu else (2048, 1)
    if framework == "jax":
        product = jax.jit(jax.numpy.matmul)
        a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)

        def run():
            jax.block_until_ready([product(a, b) for _ in range(count)][-1])
    else:
        twin, device = load_torch_twin(), "cuda" if on_gpu else "cpu"
        twin.set_float32(fast=True)
        a, b = twin.torch.randn(2, n, n, dtype=twin.DTYPES[dtype], device=device)

        def run():
            for _ in range(count):
                a @ b
            twin.synchronize(device)

    run()
    return run, 2 * n**3 * count


def chart_rows(result):
    """What report.draw_benchmark takes: the training figures by dtype, family and batch, form."""
    rows = {}
    for family, entry in result["families"].items():
        for batch, tasks in entry.get("batches", {}).items():
            for name, form in tasks["train"].items():
                kind, dtype = name.split(" ")
                if "mfu" in form:
                    rows.setdefault(dtype, {}).setdefault((family, batch), {})[kind] = form
    return rows


def versions(result):
    """What a result was measured with, in words."""
    names = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{names}; commit {short_commit(result['commit'])}"


def markdown(result):
    """A table of speed and one of starts, with what they were measured on."""
    measured = [
        (family, batch, dtype, task, timed)
        for family, entry in result["families"].items()
        for batch, tasks in entry.get("batches", {}).items()
        for dtype in result["settings"]["dtypes"]
        for task, timed in tasks.items()
    ]
    names = {name.split(" ")[0] for *_, timed in measured for name in timed}
    kinds = [kind for kind in KINDS if kind in names]
    theirs = [kind for kind in kinds if kind.startswith("torch")]
    peak = "; ".join(
        f"{dtype} {max(values.values()) / 1e12:.2f} TFLOP/s"
        for dtype, values in result["peaks"].items()
        if values  # starts alone measure none
    )
    speed = "speed" in result["settings"]["measure"]
    lines = [
        f"{result['device']}; "
        + (f"{rounds(result['settings'])}, medians; " if speed else "")
        + f"{result['data']}; "
        + (f"peak of a matrix product: {peak}; " if speed else "")
        + f"GLIBC_TUNABLES {result['glibc_tunables'] or 'not set'}; "
        f"{versions(result)}{'; cut short' * (result['status'] != 'done')}.",
    ]
    if speed:
        lines += [
            "",
            "Images/s (share of the peak); JAX augmenting to PyTorch within a round, median and "
            "quartiles:",
            "",
            f"| family, batch | dtype | task | {' | '.join(KINDS[kind] for kind in kinds)} "
            + "".join(f"| augmenting / {KINDS[kind]} " for kind in theirs)
            + "|",
            "|---|---|---|" + "--:|" * (len(kinds) + len(theirs)),
        ]
    for family, batch, dtype, task, timed in measured:
        forms = {kind: timed.get(f"{kind} {dtype}", {}) for kind in KINDS}
        ratios = "".join(f"| {ratio(forms['jax'], forms[kind])} " for kind in theirs)
        cells = " | ".join(
            f"{forms[kind]['images_per_second']:,.0f} ({100 * forms[kind]['mfu']:.1f} %)"
            if "mfu" in forms[kind]
            else forms[kind].get("error", "-").split(":")[0]
            for kind in kinds
        )
        lines.append(f"| {family}, {batch} | {dtype} | {task} | {cells} {ratios}|")
    lines += spread(result)
    if "start" in result["settings"]["measure"]:
        starts = result["settings"].get("starts", 1)  # not in older files
        lines += [
            "",
            "Seconds to the first training step in a fresh process, imports aside, with an empty "
            f"and with a filled compilation cache{f', medians of {starts}' * (starts > 1)}; "
            "peak memory beyond data and libraries (on a GPU for JAX with the data) of one "
            "process, MiB:",
            "",
            "| family, batch | form | empty | filled | memory |",
            "|---|---|--:|--:|--:|",
        ]
    for family, entry in result["families"].items():
        for name, start in entry.get("start", {}).items():
            step = start["first_step"]
            warm = f"{step['warm']:.1f}" if "warm" in step else "-"
            lines.append(
                f"| {family}, {entry['start_batch']} | {name} | {step['cold']:.1f} | {warm} "
                f"| {start['peak_memory'] / 2**20:,.0f} |"
            )
    failed = [f"{n}: {e['error']}" for n, e in result["families"].items() if "error" in e]
    return "\n".join([*lines, *(["", *failed] if failed else [])]) + "\n"


def rounds(settings):
    """In words how long each task was measured."""
    least = settings.get("task_seconds")  # not in older files
    more = f" and {least:g} s of them" if least else ""
    return f"{'at least ' if least else ''}{settings['rounds']} rounds{more} a task"


def ratio(ours, theirs):
    """In words the median of two forms' ratios within a round, and their quartiles."""
    if not ("rounds" in ours and "rounds" in theirs):
        return "-"
    low, middle, high = np.quantile(np.divide(ours["rounds"], theirs["rounds"]), (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def spread(result):
    """Lines that say how far the rounds of one form lie apart."""
    found = sorted(
        (np.ptp(form["spread"]) / form["images_per_second"], f"{family}, {task}, {name}")
        for family, entry in result["families"].items()
        for tasks in entry.get("batches", {}).values()
        for task, timed in tasks.items()
        for name, form in timed.items()
        if "spread" in form
    )
    if not found:
        return []
    middle, (largest, where) = found[len(found) // 2][0], found[-1]
    return [
        "",
        f"From a form's slowest round to its fastest: {100 * middle:.0f} % of its median "
        f"(the middle of all forms), at most {100 * largest:.0f} % ({where}).",
    ]


if __name__ == "__main__":
    main()
