"""What results/ holds: its folders, the originals' figures; how a run becomes a file there."""

import importlib
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from cifar_jax import InputError  # noqa: E402
from cifar_jax import workdir as files  # noqa: E402

RESULTS = ROOT / "results"
RUNS, COMPARISONS, SPEEDRUNS, BENCHMARKS, SEEDS = (
    RESULTS / name for name in ("runs", "comparisons", "speedrun", "benchmarks", "seeds")
)
RECIPES = ("", "tuned", "short")  # variants of a system's config: the original's and ours

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"


def per_class(*values):
    return dict(zip(CLASSES.split(), values, strict=True))


# What the originals state or log (test accuracy in percent): final figure, epochs, points of the
# curve by epoch.
ORIGINALS = {
    "vgg": {
        "project": "ZiadHelal/pytorch-cifar10",
        "params": 2_882_474,
        "accuracy": 88.24,
        "epochs": 120,
        "per_class": per_class(89.1, 96.0, 83.0, 75.5, 87.5, 80.2, 93.8, 91.6, 93.3, 92.4),
        "curve": {10: 71.1, 20: 79.8, 40: 84.2, 60: 85.9, 80: 87.5, 100: 87.8, 120: 88.2},
    },
    "convnet": {
        "project": "iVishalr/cifar10-pytorch",
        "params": 2_791_434,
        "accuracy": 87.27,
        "epochs": 400,
        "curve": {
            **{1: 41.03, 10: 71.51, 50: 81.91, 100: 83.37, 200: 84.88, 300: 84.92, 301: 86.30},
            400: 87.27,
        },
    },
    "resnet": {
        "project": "Sualeh77/ERAV1S10",
        "params": 6_573_120,
        "accuracy": 92.87,
        "epochs": 24,
        "per_class": per_class(93.9, 97.3, 88.8, 85.3, 94.1, 87.2, 95.4, 95.2, 95.8, 95.7),
        "curve": {1: 62.03, 5: 71.98, 10: 84.83, 15: 89.52, 20: 91.44, 24: 92.87},
    },
    "mixture": {
        "project": "lasyaMundrathi/CIFAR-10-Image-Classification-with-"
        "Convolutional-Neural-Networks-CNN-",
        "params": 4_796_649,
        "accuracy": 92.00,
        "epochs": 50,
        "curve": {1: 11.19, 10: 76.92, 20: 85.01, 30: 88.00, 40: 91.13, 50: 92.00},
    },
    "dilated": {
        "project": "ShikhaERAV2/Session9",
        "params": 2_034_040,
        "accuracy": 79.92,
        "epochs": 150,
        "note": " augmented",
        "curve": {
            1: 39.02,
            5: 59.38,
            10: 66.51,
            20: 70.70,
            30: 75.03,
            50: 77.23,
            100: 80.25,
            150: 79.92,
        },
    },
}


def add(workdir):
    """Copy what `workdir` holds into results/; yields the files written."""
    workdir = pathlib.Path(workdir)
    kept, result, comparison = (
        files.read_json(workdir / name)
        for name in ("config.json", "result.json", "comparison.json")
    )
    if not (kept and (result or comparison)):
        raise InputError(
            f"{workdir} holds no result.json of a run that ended and no comparison.json"
        )
    config = kept["config"]
    if result:
        for name, what in (("imported", "began from imported weights"), ("rollbacks", "diverged")):
            if name in result:
                raise InputError(f"{workdir} is not its recipe from the start: it {what}")
        result["commit"] = kept["commit"]  # of the code that began it, not of the last look at it
        result["resumed"] = kept.get("resumed", [])
        config["data"].pop("dir")  # where the data lay on one machine says nothing
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        recipe = recipe_of(result["model"], config)
        if recipe is None:
            raise InputError(
                f"{workdir} has another config than those of configs/{result['model']}.py"
            )
        if result["status"] not in ("done", "stopped"):
            raise InputError(
                f"{workdir} is {result['status']}: give its command --config.stop_after"
            )
        dtype = config["model"]["dtype"]
        name = "-".join(
            filter(None, (result["model"], recipe, "" if dtype == "float32" else dtype))
        )
        path = RUNS / f"{name}_seed{result['seed']}{of_device(result)}.json"
        if path.exists() and json.loads(path.read_text())["epochs"] > result["epochs"]:
            raise InputError(f"{path} holds a longer run than {workdir}")
        yield write(path, {**result, "config": config, "records": records})
    if comparison:
        if recipe_of(comparison["model"], config) != "":
            raise InputError(f"{workdir} has another config than configs/{comparison['model']}.py")
        path = COMPARISONS / f"{comparison['model']}{of_device(comparison)}.json"
        before = files.read_json(path) or {"runs": [], "steps_trained": 0}
        if len(before["runs"]) > len(comparison["runs"]):
            raise InputError(f"{path} holds more seeds than {workdir}")
        if before["steps_trained"] > comparison["steps_trained"]:
            raise InputError(f"{path} holds a longer comparison than {workdir}")
        if comparison["status"] == "done":
            yield write(path, comparison)


def of_device(result):
    """What a file's name says of the device: nothing of a CPU."""
    return "" if "cpu" in result["device"] else f"_{files.slug(result['device'])}"


def recipe_of(model, config):
    """The variant_of configs/MODEL.py; InputError for the speedrun."""
    if model not in ORIGINALS:
        raise InputError(f"results of {model} are kept by scripts/speedrun.py")
    return variant_of(model, RECIPES, config)


def variant_of(name, variants, config):
    """Of which of the `variants` of configs/NAME.py `config` is, whatever its seed, its dtype, how
    often it saved and the fields that it lacks, for it is older; None if of none."""
    module = importlib.import_module(f"configs.{name}")
    for variant in variants:
        try:
            known = module.get_config(variant)
        except ValueError:
            continue
        known = json.loads(known.to_json_best_effort())
        free = (*files.FREE_FIELDS, "seed", "model.dtype", *(["save_every"] if variant else []))
        differing = files.differences(config, known, free)
        if all(before is None for before, _ in differing.values()):
            return variant
    return None


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
    return path


def contents(folder):
    """What the files in `folder` hold, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def measured(folder):
    """{model: [content of its files in `folder`]} in the systems' order, others after them."""
    found = contents(folder)
    names = [*ORIGINALS, *sorted({r["model"] for r in found} - {*ORIGINALS})]
    return {name: [r for r in found if r["model"] == name] for name in names}


def runs_by_recipe():
    """{(system, recipe): contents of its files in RUNS}, each system's recipes side by side."""
    found = {(name, recipe): [] for name in ORIGINALS for recipe in RECIPES}
    for run in contents(RUNS):
        model, recipe = run["model"], recipe_of(run["model"], run["config"])
        if recipe is None:
            raise InputError(
                f"a run of {model}, seed {run['seed']}, in {RUNS} is of no recipe here now"
            )
        if model in ORIGINALS:
            found[model, recipe].append(run)
    return found


def place(run):
    """A run's device, and its dtype where it is another than float32."""
    dtype = run["config"]["model"]["dtype"]
    return run["device"] + ("" if dtype == "float32" else f" in {dtype}")
