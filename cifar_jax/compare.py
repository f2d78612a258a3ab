"""--mode=compare: the same recipe trained and timed in JAX and in PyTorch, side by side."""

import concurrent.futures
import dataclasses
import importlib.metadata
import multiprocessing
import os
import pathlib
import resource
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from cifar_jax import InputError, report, weights
from cifar_jax import workdir as files
from cifar_jax.exchange import load_torch_twin
from cifar_jax.experiment import environment, make_experiment
from cifar_jax.metrics import Metrics
from cifar_jax.steps import make_batches, make_predict, make_train_step, repeat

EVAL_BATCH = 500
REST = 0.3  # seconds between sides: the other's threads still spin for a while after their work
TIE = 1e-4  # of the logits' scale: a margin below it can fall either way by rounding
SIDES = ("jax", "torch")


def compare(config, workdir):
    """Train config.compare.seeds pairs from the same weights on the same batches, time the sides.

    Writes comparison.json, comparison.md and comparison.html in `workdir` and returns the first.
    Pairs already in comparison.json are kept. Raises InputError where PyTorch is missing, for more
    than one device and for a recipe that PyTorch does not have.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave PyTorch its share
    twin = load_torch_twin()
    if jax.device_count() > 1:
        raise InputError(
            f"compare runs on one device and sees {jax.device_count()}; "
            "hide the others (CUDA_VISIBLE_DEVICES=0)"
        )
    with files.only_writer(workdir) as path:
        files.open_workdir(path, config.to_dict(), environment())
        sides = Sides(make_experiment(config), twin)
        settings = {**config.compare.to_dict(), "steps_trained": sides.steps}
        found = files.read_json(path / "comparison.json") or {}
        runs = found["runs"] if _same(found.get("settings"), settings) else []
        runs = runs[: config.compare.seeds]
        comparison = {
            "status": "running",
            "model": config.model.name,
            "params": sum(x.size for x in jax.tree.leaves(sides.exp.init_state().params)),
            "dataset": sides.exp.provenance,
            "batch_size": config.batch_size,
            "settings": settings,
            "runs": runs,
            **environment(),
        }
        comparison["versions"]["torch"] = importlib.metadata.version("torch")
        for seed in range(config.seed + len(runs), config.seed + config.compare.seeds):
            runs.append(sides.train_pair(seed))
            files.write_json(path / "comparison.json", comparison)
        comparison["accuracy"] = summarize(runs)
        comparison["timing"] = time_sides(sides)
        for name, form in comparison["timing"].items():
            if "error" not in form and name.endswith(config.compare.dtypes[0]):
                form["peak_memory"] = in_own_process(peak_memory, config.to_dict(), name)
        comparison["status"] = "done"
        files.write_json(path / "comparison.json", comparison)
        text = markdown([comparison])
        (path / "comparison.md").write_text(text)
        report.write_comparison(path, comparison)
        print(text)
        return comparison


def _same(before, now):
    """Whether runs made under the settings `before` count now; the number of seeds may grow."""
    keys = ("epochs", "test_images", "steps_trained")
    return isinstance(before, dict) and all(before.get(key) == now[key] for key in keys)


class Sides:
    """What both sides share: data, batches, initial weights, and the test images."""

    def __init__(self, exp, twin):
        config = exp.config
        self.exp, self.twin = exp, twin
        self.name = config.model.name
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        n = len(exp.train.labels)
        self.batch = {
            "batch_size": config.batch_size,
            "num_examples": n,
            "augment": exp.augment,
        }
        self.batches = jax.jit(make_batches(**self.batch), static_argnums=3)
        self.steps = max(1, round(config.compare.epochs * exp.steps_per_epoch))
        self.no_metrics = jax.device_put(Metrics.zeros(len(exp.class_names)), exp.placement)
        count = config.compare.test_images or len(exp.test.labels)
        self.labels = np.asarray(exp.test.labels[:count])
        normalize = jax.jit(exp.normalize)
        key = jax.random.key(0)
        self.images = np.concatenate(
            [
                np.asarray(normalize(key, exp.test.images[i : i + EVAL_BATCH][: count - i]))
                for i in range(0, count, EVAL_BATCH)
            ]
        )
        self.predict_jax = jax.jit(make_predict(exp.model, transform=lambda key, x: x))

    def size(self, step):
        """Examples of batch `step`; the last one of an epoch may be smaller."""
        i = step % self.exp.steps_per_epoch
        return min(
            self.batch["batch_size"], self.batch["num_examples"] - i * self.batch["batch_size"]
        )

    def make_step(self, dtype):
        """The train step computing in `dtype`."""
        model = self.exp.model.clone(dtype=jax.numpy.dtype(dtype))
        return make_train_step(model, self.exp.tx, **self.batch, **self.exp.config.loss)

    def make_recipe(self, state, dtype="float32", compiled=False):
        """The PyTorch side, with the weights of `state`, on the device, channels_last."""
        config = self.exp.config
        twin = self.twin.create_twin(
            **config.model,
            num_classes=len(self.exp.class_names),
            image_size=self.images.shape[1],
        )
        self.twin.load_weights(twin, self.state_dict(state))
        self.twin.move(twin, self.device)
        return self.twin.Recipe(
            twin,
            optim=config.optim.to_dict(),
            schedule=config.schedule.to_dict(),
            loss=config.loss.to_dict(),
            total_steps=self.exp.total_steps,
            steps_per_epoch=self.exp.steps_per_epoch,
            autocast=None if dtype == "float32" else dtype,
            compiled=compiled,
            fused=True,
        )

    def state_dict(self, state):
        variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        return weights.to_state_dict(self.name, self.exp.model, variables)

    def torch_batch(self, state, step):
        """Batch `step` of this state's order and augmentation as tensors on the device."""
        images, labels, _ = self.batches(state.key, step, self.exp.train, self.size(step))
        return self.twin.images_of(images, self.device), self.twin.labels_of(labels, self.device)

    def train_pair(self, seed):
        """Both sides from the same weights for the same steps; also one set of weights on both."""
        exp = self.exp
        start = exp.init_state(seed)
        recipe = self.make_recipe(start)
        self.twin.seed(seed)
        losses = [recipe.step(*self.torch_batch(start, t)) for t in range(self.steps)]
        theirs = {
            "losses": [float(x) for x in losses],
            **self.measure(self.torch_logits(recipe.twin)),
        }
        print(f"seed {seed}: PyTorch {theirs['accuracy']:.2f} %", flush=True)
        state, programs, sums = start, {}, []
        step = self.make_step(exp.config.model.dtype)
        for t in range(self.steps):
            size = self.size(t)
            if size not in programs:
                programs[size] = jax.jit(repeat(step, 1, size))
            state, metrics = programs[size](state, self.no_metrics, exp.train)
            sums.append(metrics)
        losses = [float(m.loss) / float(m.count) for m in jax.device_get(sums)]
        logits = self.jax_logits(state)
        ours = {"losses": losses, **self.measure(logits)}
        print(f"seed {seed}: JAX     {ours['accuracy']:.2f} %", flush=True)
        self.twin.load_weights(recipe.twin, self.state_dict(state))
        same = agreement(logits, self.torch_logits(recipe.twin))
        return {"seed": seed, "jax": ours, "torch": theirs, "same_weights": same}

    def jax_logits(self, state):
        parts = [
            np.asarray(self.predict_jax(state, state.key, self.images[i : i + EVAL_BATCH]))
            for i in range(0, len(self.images), EVAL_BATCH)
        ]
        return np.concatenate(parts)

    def torch_logits(self, twin):
        parts = [
            self.twin.predict(twin, self.images[i : i + EVAL_BATCH])
            for i in range(0, len(self.images), EVAL_BATCH)
        ]
        return np.concatenate(parts)

    def measure(self, logits):
        """{'accuracy': percent, 'loss': nats} on the test images."""
        logits = logits.astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        own = log_probabilities[np.arange(len(logits)), self.labels]
        hits = logits.argmax(1) == self.labels
        return {"accuracy": 100.0 * float(hits.mean()), "loss": -float(own.mean())}


def agreement(ours, theirs):
    """How two sides' logits [N, C] of the same weights differ.

    `ties`: of the images whose predictions differ, those with two top logits closer than TIE of
    the logits' scale.
    """
    scale = float(np.abs(theirs).max())
    differ = ours.argmax(1) != theirs.argmax(1)
    top = np.sort(theirs[differ], axis=1)[:, -2:]
    return {
        "images": len(ours),
        "largest_difference": float(np.abs(ours - theirs).max()) / scale,
        "predictions_differ": int(differ.sum()),
        "ties": int((top[:, 1] - top[:, 0] < TIE * scale).sum()),
    }


def summarize(runs):
    """Mean, standard deviation and 95 % interval (Student's t) of each side's accuracy and of the
    paired difference JAX - PyTorch, with the paired t-test's p-value; None where n = 1."""
    values = {side: np.array([run[side]["accuracy"] for run in runs]) for side in SIDES}
    values["difference"] = values["jax"] - values["torch"]
    summary = {name: _interval(x) for name, x in values.items()}
    difference = summary["difference"]
    difference["p_value"] = None
    if len(runs) > 1 and difference["sd"] > 0:
        t = difference["mean"] / (difference["sd"] / len(runs) ** 0.5)
        difference["p_value"] = float(2 * stats.t.sf(abs(t), len(runs) - 1))
    return summary


def _interval(x):
    n = len(x)
    sd = float(x.std(ddof=1)) if n > 1 else None
    half = float(stats.t.ppf(0.975, n - 1)) * sd / n**0.5 if n > 1 else None
    mean = float(x.mean())
    interval = [mean - half, mean + half] if n > 1 else None
    return {"n": n, "mean": mean, "sd": sd, "interval": interval}


@dataclasses.dataclass
class Form:
    """One way to take training steps, ready to be timed: run(steps) returns when they are done."""

    run: object
    compile_seconds: float | None  # None: compiled within the first step


def form_names(settings):
    """'jax float32', 'torch float32', 'torch.compile float32', ... as the settings ask for."""
    kinds = ["jax", "torch", *(["torch.compile"] if settings["compiled"] else [])]
    return [f"{kind} {dtype}" for dtype in settings["dtypes"] for kind in kinds]


def make_form(sides, name):
    """The Form called `name`; JAX's augments within the step, PyTorch's gets finished batches."""
    kind, dtype = name.split(" ")
    start = sides.exp.init_state()
    if kind == "jax":
        on_cpu = jax.default_backend() == "cpu"
        size = sides.size(0)
        steps = sides.exp.config.compare.steps
        calls, count = (steps, 1) if on_cpu else (1, steps)
        began = time.perf_counter()
        program = jax.jit(repeat(sides.make_step(dtype), count, size), donate_argnums=0)
        program = program.lower(start, sides.no_metrics, sides.exp.train).compile()
        seconds = time.perf_counter() - began
        carry = [start]

        def run():
            for _ in range(calls):
                carry[0], _ = program(carry[0], sides.no_metrics, sides.exp.train)
            jax.block_until_ready(carry[0])

        return Form(run, seconds)
    recipe = sides.make_recipe(start, dtype, compiled=kind == "torch.compile")
    batches = [sides.torch_batch(start, t) for t in range(2)]

    def run():
        for i in range(sides.exp.config.compare.steps):
            recipe.step(*batches[i % 2])
        sides.twin.synchronize(sides.device)

    return Form(run, None)


def time_sides(sides):
    """{form name: timing} with every form warm, measured in turn in each of `rounds` rounds.

    images_per_second (median) and `spread` (smallest, largest of the rounds); first_step: seconds
    from nothing compiled to `steps` steps done; compile: of these, JAX's tracing and compilation.
    """
    settings = sides.exp.config.compare
    images = settings.steps * sides.batch["batch_size"]
    forms, timing, rates = {}, {}, {}
    for name in form_names(settings):
        began = time.perf_counter()
        try:
            form = make_form(sides, name)
            form.run()
        except Exception as error:
            if not name.startswith("torch.compile"):
                raise
            timing[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        timing[name] = {
            "first_steps": time.perf_counter() - began,
            "compile": form.compile_seconds,
        }
        form.run()
        forms[name], rates[name] = form, []
        print(f"{name}: ready after {timing[name]['first_steps']:.1f} s", flush=True)
    for _ in range(settings.rounds):
        for name, form in forms.items():
            time.sleep(REST)
            began = time.perf_counter()
            form.run()
            rates[name].append(images / (time.perf_counter() - began))
    for name, values in rates.items():
        timing[name]["images_per_second"] = float(np.median(values))
        timing[name]["spread"] = [min(values), max(values)]
    return timing


def in_own_process(function, *arguments):
    """function(*arguments) in a fresh Python process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(config, name):
    """Bytes that training in the form `name` takes at its peak, beyond data and libraries.

    On a GPU, as its allocator counts them; on CPU, resident memory above that before the model was
    made, at its peak after the first steps.
    """
    sides = Sides(make_experiment(ConfigDict(config)), load_torch_twin())
    before = _resident("VmRSS")
    form = make_form(sides, name)
    form.run()
    if sides.device == "cuda":
        if name.startswith("jax"):
            return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        return sides.twin.peak_memory()
    reset = pathlib.Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak counts from here
    form.run()
    return max(0, _resident("VmHWM") - before)


def _resident(field):
    """A line of /proc/self/status in bytes; the largest so far where there is no such file."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def markdown(comparisons):
    """Two tables, of accuracy and of speed, a row or more a comparison."""
    lines = [
        "| system | steps of batch | seeds | JAX | PyTorch | JAX - PyTorch (95 %) | p "
        "| same weights: predictions that differ |",
        "|---|---|--:|--:|--:|---|--:|---|",
    ]
    for c in comparisons:
        a = c["accuracy"]
        same = [run["same_weights"] for run in c["runs"]]
        d, p = a["difference"], a["difference"]["p_value"]
        low, high = d["interval"] or (float("nan"),) * 2
        p = "-" if p is None else f"{p:.2f}"
        lines.append(
            f"| {c['model']} | {c['settings']['steps_trained']} of {c['batch_size']} "
            f"| {a['jax']['n']} | {_percent(a['jax'])} | {_percent(a['torch'])} "
            f"| {d['mean']:+.2f} ({low:+.2f} to {high:+.2f}) | {p} "
            f"| {sum(s['predictions_differ'] for s in same)} "
            f"of {sum(s['images'] for s in same):,}, "
            f"logits within {max(s['largest_difference'] for s in same):.0e} |"
        )
    lines += [
        "",
        "| system, batch | dtype | JAX, images/s | PyTorch eager | PyTorch compiled "
        "| JAX / best PyTorch | first steps, s: JAX, eager, compiled | peak memory, MiB |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for c in comparisons:
        for dtype in c["settings"]["dtypes"]:
            forms = [
                c["timing"].get(f"{kind} {dtype}", {}) for kind in ("jax", "torch", "torch.compile")
            ]
            speeds = [form.get("images_per_second") for form in forms]
            ratio = speeds[0] / max(s for s in speeds[1:] if s)
            lines.append(
                f"| {c['model']}, {c['batch_size']} | {dtype} "
                + "".join(f"| {_cell(s, ',.0f')} " for s in speeds)
                + f"| {ratio:.2f} | "
                + ", ".join(_cell(f.get("first_steps"), ".1f") for f in forms)
                + " | "
                + ", ".join(_cell(f.get("peak_memory"), ",.0f", 2**20) for f in forms)
                + " |"
            )
    return "\n".join(lines) + "\n"


def _percent(side):
    spread = "" if side["sd"] is None else f" ± {side['sd']:.2f}"
    return f"{side['mean']:.2f}{spread} %"


def _cell(value, format, unit=1):
    return "-" if value is None else f"{value / unit:{format}}"
