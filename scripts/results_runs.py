"""The runs of results/runs as tables and curves, beside what the originals state."""

import hashlib
import io
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from results_store import (  # noqa: E402
    ORIGINALS,
    RECIPES,
    RESULTS,
    RUNS,
    contents,
    place,
    runs_by_recipe,
)

from cifar_jax import report  # noqa: E402
from cifar_jax.workdir import short_commit  # noqa: E402

CURVES = RESULTS / "curves.svg"


def results():
    """The table of the systems: a row for the original, one for each recipe and device here."""
    runs = runs_by_recipe()
    lines = [
        "| system, parameters | recipe | epochs | test accuracy, % | mirror views, % | seeds "
        "| minutes | on |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, original in ORIGINALS.items():
        lines.append(
            f"| **[{name}](configs/{name}.py)**, {original['params']:,} "
            f"| [original](https://github.com/{original['project']}) | {original['epochs']} "
            f"| {original['accuracy']:.2f}{original.get('note', '')} | | | | |"
        )
        for recipe in RECIPES:
            whose = f"ours, `:{recipe}`" if recipe else "the original's, here"
            rows = ours(runs[name, recipe])
            if not rows and recipe != "short":
                rows = [["", "not yet measured", *[""] * 4]]
            lines += [f"| | {whose} | {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        "Accuracy on the 10,000 test images after the last epoch, over several seeds the mean, "
        "smallest to largest; clean images, but for dilated's original and its recipe, which "
        "measure on augmented ones. Mirror views: the mean over each image and its mirror image. "
        "Minutes: training, evaluation and compilation; on CPU other work ran beside them, or they "
        "were paused for it. Every run's seed, commit and versions: "
        "[docs/results.md](docs/results.md).",
        "",
        "![Test accuracy by epoch over the originals' logged points](results/curves.svg)",
    ]
    return "\n".join(lines)


def farthest(runs):
    """(where, those of `runs` that went farthest there) for each device and dtype."""
    for where in dict.fromkeys(map(place, runs)):
        here = [run for run in runs if place(run) == where]
        epochs = max(run["epochs"] for run in here)
        yield where, [run for run in here if run["epochs"] == epochs]


def ours(runs):
    """The cells of a row for each device and dtype: how far the runs that went farthest went,
    their last accuracy, of one view and of mirror views, how many they are, how long they took,
    where."""
    rows = []
    for where, far in farthest(runs):
        accuracy = spread([run["last"]["accuracy"] for run in far])
        if far[0]["config"]["eval"]["augmented"]:
            accuracy += " augmented"
        views = [views_of(run) for run in far]
        if all("accuracy_clean" in v for v in views):
            accuracy += f", {spread([v['accuracy_clean'] for v in views])} clean"
        mirrored = all(v.get("tta") == "mirror" for v in views)
        minutes = sum(run["seconds"]["total"] for run in far) / len(far) / 60
        rows.append(
            [
                f"{far[0]['epochs']:g} of {far[0]['epochs_planned']:g}",
                accuracy,
                spread([v["accuracy_tta"] for v in views]) if mirrored else "",
                f"{len(far)}",
                f"{minutes:.0f}",
                where,
            ]
        )
    return rows


def views_of(run):
    """What has the accuracies of other views at the end of a run, if they were measured."""
    same = run["last"].get("epoch") == run["best"].get("epoch")
    return run["test"] if same else run["last"]


def spread(values):
    mean = f"{sum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def epochs():
    """The table of the originals' recipes along the originals' logged curves."""
    runs = runs_by_recipe()
    lines = [
        "| config | epoch | original's log | ours | seeds | train, ours | on |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, original in ORIGINALS.items():
        for where in dict.fromkeys(map(place, runs[name, ""])):
            found = [run["records"] for run in runs[name, ""] if place(run) == where]
            last = max(map(len, found))
            for epoch in sorted({1, 2, 3, last, *original["curve"]}):
                records = [records[epoch - 1] for records in found if len(records) >= epoch]
                if not records:
                    continue
                theirs = original["curve"].get(epoch)
                logged = "not stated" if theirs is None else f"{theirs:.2f}"
                evals, trains = (
                    spread([r[key] for r in records]) for key in ("eval_accuracy", "train_accuracy")
                )
                lines.append(
                    f"| {name} | {epoch} | {logged} | {evals} | {len(records)} | {trains} "
                    f"| {where} |"
                )
    return "\n".join(lines)


def classes():
    """The table of test accuracy by class of the runs that went farthest, and the originals'."""
    runs = runs_by_recipe()
    names = list(contents(RUNS)[0]["per_class"])
    lines = [
        f"| config | epochs | top-5 | {' | '.join(names)} | on |",
        "|---|--:|--:|" + "--:|" * len(names) + "---|",
    ]
    for name, original in ORIGINALS.items():
        known = original.get("per_class", {})
        if known:
            values = " | ".join(f"{known[c]:.1f}" for c in names)
            lines.append(f"| {name}, original | {original['epochs']} | not stated | {values} | |")
        for recipe in RECIPES:
            for where, far in farthest(runs[name, recipe]):
                means = [sum(r["per_class"][c] for r in far) / len(far) for c in names]
                top5 = sum(r["test"]["top5"] for r in far) / len(far)
                lines.append(
                    f"| {title(name, recipe)} | {far[0]['epochs']:g} of "
                    f"{far[0]['epochs_planned']:g} | {top5:.2f} "
                    f"| {' | '.join(f'{x:.1f}' for x in means)} | {where} |"
                )
    return "\n".join(lines)


def sources():
    """What made each run: a row a file of RUNS."""
    lines = [
        "| config | seed | epochs | device | python, jax, flax, optax | commit |",
        "|---|--:|--:|---|---|---|",
    ]
    for (name, recipe), group in runs_by_recipe().items():
        for run in sorted(group, key=lambda run: run["seed"]):
            versions = ", ".join(
                run["versions"][package] for package in ("python", "jax", "flax", "optax")
            )
            sessions = [run, *run.get("resumed", [])]
            commits = dict.fromkeys(short_commit(session["commit"]) for session in sessions)
            lines.append(
                f"| {title(name, recipe)} | {run['seed']} "
                f"| {run['epochs']:g} of {run['epochs_planned']:g} | {place(run)} | {versions} "
                f"| {', then '.join(commits)} |"
            )
    digests = {run["dataset"]["sha256"]["train"] for run in contents(RUNS)}
    lines += ["", f"Training data by sha256: {', '.join(sorted(digests))}."]
    return "\n".join(lines)


def title(name, recipe):
    """A system's recipe as --config names it: vgg, vgg:tuned."""
    return f"{name}{recipe and ':'}{recipe}"


def curves():
    """(results/curves.svg as text, digest of what it shows): accuracy by epoch, a panel a system,
    the original's points, its recipe's runs and ours."""
    runs = runs_by_recipe()
    shown = {
        name + "\n(grey, blue: augmented)" * ("note" in original): {
            "original": sorted(original["curve"].items()),
            **{
                recipe: [
                    [(r["epoch"], r["eval_accuracy"]) for r in run["records"]]
                    for run in runs[name, recipe]
                ]
                for recipe in RECIPES
            },
        }
        for name, original in ORIGINALS.items()
    }
    digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
    text = io.StringIO()
    figure = report.draw_beside_original(shown)
    figure.savefig(text, format="svg", metadata={"Date": None, "Description": digest})
    return text.getvalue(), digest
