"""--mode=compare: the same recipe trained and timed in JAX and in PyTorch, side by side."""

import importlib.metadata
import os

import jax
import numpy as np

from cifar_jax import InputError, page, report, timing
from cifar_jax import workdir as files
from cifar_jax.exchange import load_torch_twin
from cifar_jax.experiment import check_seeds, make_experiment
from cifar_jax.own_process import OwnProcess
from cifar_jax.provenance import environment
from cifar_jax.significance import interval, paired
from cifar_jax.steps import make_predict
from cifar_jax.timing import Sides

EVAL_BATCH = 500
TIE = 1e-4  # of the logits' scale: a margin below it can fall either way by rounding
SIDES = ("jax", "torch")
DTYPES = ("float32", "bfloat16")


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
    _check(config)
    with files.only_writer(workdir) as path:
        files.check_workdir(path, config.to_dict())
        exp = make_experiment(config)
        sides = Sides(exp, twin)
        sides.make_recipe()  # or PyTorch's side does not have it
        files.open_workdir(path, config.to_dict(), environment(), exp.about_data)
        pairs = Pairs(sides)
        settings = {**config.compare.to_dict(), "steps_trained": pairs.steps}
        settings["steps"] = settings["steps"] or timing.usual_steps(config.batch_size)
        found = files.read_json(path / "comparison.json") or {}
        here = environment()
        here["versions"]["torch"] = importlib.metadata.version("torch")
        runs = found["runs"] if _same(found, {"settings": settings, **here}) else []
        runs = runs[: config.compare.seeds]
        comparison = {
            "status": "running",
            "model": config.model.name,
            "params": sides.exp.count_params(),
            "dataset": sides.exp.provenance,
            "batch_size": config.batch_size,
            "settings": settings,
            "runs": runs,
            **here,
        }
        twin.set_float32(fast=False)
        with jax.default_matmul_precision("highest"):
            for seed in range(config.seed + len(runs), config.seed + config.compare.seeds):
                runs.append(pairs.train_pair(seed))
                files.write_json(path / "comparison.json", comparison)
        comparison["accuracy"] = summarize(runs)
        with timing.frameworks() as processes:
            comparison["timing"] = timing.time_forms(
                processes,
                config.to_dict(),
                timing.form_names(config.compare.dtypes, config.compare.compiled),
                steps=settings["steps"],
                rounds=config.compare.rounds,
            )
        for name, form in comparison["timing"].items():
            if "error" not in form and name.endswith(config.compare.dtypes[0]):
                with OwnProcess(timing.on_cores(config.batch_size)) as process:
                    fresh = process(timing.fresh_start, config.to_dict(), name)
                form["peak_memory"] = fresh["peak_memory"]
        comparison["status"] = "done"
        files.write_json(path / "comparison.json", comparison)
        text = f"{accuracies([comparison])}\n\n{speeds(comparison)}\n"
        (path / "comparison.md").write_text(text, encoding="utf-8")
        report.write_comparison(path, comparison)
        print(text)
        return comparison


def _check(config):
    """InputError for what cannot be compared."""
    if config.model.dtype != "float32":
        raise InputError(
            "compare trains in float32: leave config.model.dtype; config.compare.dtypes names what "
            "is timed"
        )
    if config.ghost_batches > 1:
        raise InputError("compare has no config.ghost_batches: PyTorch normalises whole batches")
    for field, least in (("seeds", 1), ("rounds", 1), ("steps", 0), ("test_images", 0)):
        if config.compare[field] < least:
            raise InputError(
                f"config.compare.{field} must be at least {least}, not {config.compare[field]}"
            )
    if not config.compare.epochs > 0:
        raise InputError(f"config.compare.epochs must be more than 0, not {config.compare.epochs}")
    check_seeds(config.seed, config.compare.seeds)
    dtypes = {*config.compare.dtypes}
    if not dtypes or dtypes - {*DTYPES}:
        raise InputError(
            f"config.compare.dtypes {tuple(config.compare.dtypes)} must be of {', '.join(DTYPES)}"
        )


def _same(before, now):
    """Whether the runs of the comparison `before` count in the one `now`: on the same device, by
    the same code, as long; seeds may become more."""
    keys = ("epochs", "test_images", "steps_trained")
    try:
        return (
            all(before[key] == now[key] for key in ("device", "versions", "commit"))
            and all(before["settings"][key] == now["settings"][key] for key in keys)
            and "runs" in before
        )
    except (KeyError, TypeError):
        return False


class Pairs:
    """Trains both sides in pairs and measures them on the same test images."""

    def __init__(self, sides):
        exp = sides.exp
        config = exp.config
        self.sides, self.exp, self.twin = sides, exp, sides.twin
        self.steps = max(1, round(config.compare.epochs * exp.steps_per_epoch))
        count = config.compare.test_images or len(exp.test.labels)
        self.labels = np.asarray(exp.test.labels[:count])
        normalize = jax.jit(exp.normalize)
        key = jax.random.key(0)
        self.images = in_parts(lambda images: normalize(key, images), exp.test.images[:count])
        self.train_jax = jax.jit(exp.step, static_argnums=(2, 3))
        self.predict_jax = jax.jit(make_predict(exp.model, transform=lambda key, x: x))

    def train_pair(self, seed):
        """Both sides from the same weights for the same steps; also one set of weights on both."""
        exp = self.exp
        start = exp.init_state(seed)
        recipe = self.sides.make_recipe(start)
        self.twin.seed(seed)
        losses = [recipe.step(*self.sides.torch_batch(start, t)) for t in range(self.steps)]
        theirs = {
            "losses": [float(x) for x in losses],
            **self.measure(self.torch_logits(recipe.twin)),
        }
        print(f"seed {seed}: PyTorch {theirs['accuracy']:.2f} %", flush=True)
        state, sums = start, []
        for t in range(self.steps):
            size, frozen = self.sides.size(t), exp.schedules.frozen(t)
            state, metrics = self.train_jax(state, exp.train, size, frozen)
            sums.append(metrics)
        losses = [float(m.loss) / float(m.count) for m in jax.device_get(sums)]
        logits = self.jax_logits(state)
        ours = {"losses": losses, **self.measure(logits)}
        print(f"seed {seed}: JAX     {ours['accuracy']:.2f} %", flush=True)
        self.twin.load_weights(recipe.twin, self.sides.state_dict(state))
        same = agreement(logits, self.torch_logits(recipe.twin))
        return {"seed": seed, "jax": ours, "torch": theirs, "same_weights": same}

    def jax_logits(self, state):
        """Logits [N, C] of the test images on JAX's side."""
        return in_parts(lambda images: self.predict_jax(state, state.key, images), self.images)

    def torch_logits(self, twin):
        """Logits [N, C] of the test images on PyTorch's side."""
        return in_parts(lambda images: self.twin.predict(twin, images), self.images)

    def measure(self, logits):
        """{'accuracy': percent, 'loss': nats} on the test images."""
        logits = logits.astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        own = log_probabilities[np.arange(len(logits)), self.labels]
        hits = logits.argmax(1) == self.labels
        return {"accuracy": 100.0 * float(hits.mean()), "loss": -float(own.mean())}


def in_parts(function, images):
    """function(images) of EVAL_BATCH images at a time, joined, on the host."""
    return np.concatenate(
        [
            np.asarray(function(images[i : i + EVAL_BATCH]))
            for i in range(0, len(images), EVAL_BATCH)
        ]
    )


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
    return {
        **{side: interval(x) for side, x in values.items()},
        "difference": paired(values["jax"], values["torch"]),
    }


def accuracies(comparisons):
    """The table of both sides' accuracies, mean ± standard deviation, a row a comparison."""
    lines = [
        "| system | steps of batch | seeds | test images | JAX, % | PyTorch, % "
        "| JAX - PyTorch (95 %) | p "
        "| same weights: predictions that differ, largest difference of a logit, as a share of the "
        "largest |",
        "|---|---|--:|--:|--:|--:|---|--:|---|",
    ]
    for c in comparisons:
        a = c["accuracy"]
        same = [run["same_weights"] for run in c["runs"]]
        d, p = a["difference"], a["difference"]["p_value"]
        low, high = d["interval"] or (float("nan"),) * 2
        p = "-" if p is None else page.p_value(p).removeprefix("= ")
        apart = [s["largest_difference"] for s in same if s["largest_difference"] is not None]
        lines.append(
            f"| {c['model']} | {c['settings']['steps_trained']} of {c['batch_size']} "
            f"| {a['jax']['n']} | {same[0]['images']:,} "
            f"| {_percent(a['jax'])} | {_percent(a['torch'])} "
            f"| {d['mean']:+.2f} ({low:+.2f} to {high:+.2f}) | {p} "
            f"| {sum(s['predictions_differ'] for s in same)} "
            f"of {sum(s['images'] for s in same):,}, "
            f"{f'{max(apart):.0e}' if apart else 'not finite'} |"
        )
    return "\n".join(lines)


def speeds(c):
    """The table of both sides' speeds, starts and memory, a row a dtype of comparison `c`."""
    lines = [
        "| system, batch | dtype | JAX, images/s | PyTorch eager | PyTorch compiled "
        "| JAX / best PyTorch | first steps, s: JAX, eager, compiled | peak memory, MiB |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for dtype in c["settings"]["dtypes"]:
        forms = [
            c["timing"].get(f"{kind} {dtype}", {}) for kind in ("jax", "torch", "torch.compile")
        ]
        rates = [form.get("images_per_second") for form in forms]
        ratio = rates[0] / max(rate for rate in rates[1:] if rate)
        lines.append(
            f"| {c['model']}, {c['batch_size']} | {dtype} "
            + "".join(f"| {_cell(rate, ',.0f')} " for rate in rates)
            + f"| {ratio:.2f} | "
            + ", ".join(_cell(f.get("first_steps"), ".1f") for f in forms)
            + " | "
            + ", ".join(_cell(f.get("peak_memory"), ",.0f", 2**20) for f in forms)
            + " |"
        )
    return "\n".join(lines)


def _percent(side):
    spread = "" if side["sd"] is None else f" ± {side['sd']:.2f}"
    return f"{side['mean']:.2f}{spread}"


def _cell(value, format, unit=1):
    return "-" if value is None else f"{value / unit:{format}}"
