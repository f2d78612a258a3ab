"""Keep results/ and the pages' tables in step: python scripts/results_table.py [--add DIR ...]

--add copies what a workdir holds: a run (result.json, config, every epoch) to
results/runs/MODEL[-RECIPE]_seedN.json, a comparison to results/comparisons/MODEL.json. What
speedrun.py, benchmark.py and many_seeds.py write lies in folders of results/ already. The tables
between the marks in README.md and docs/ and results/curves.svg are made again from those files;
--check only says whether they are in step (exit code 1 if not).
"""

import argparse
import collections
import hashlib
import io
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from results_store import (  # noqa: E402
    BENCHMARKS,
    COMPARISONS,
    ORIGINALS,
    RECIPES,
    RESULTS,
    RUNS,
    SEEDS,
    SPEEDRUNS,
    add,
    contents,
    measured,
    place,
    runs_by_recipe,
)

from cifar_jax.workdir import short_commit  # noqa: E402

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# By model.depth and optim.name: our recipe; the published mean of the record it follows.
RECORDS = {
    (2, "sgd"): ("speedrun", "94.01 (airbench94)"),
    (3, "sgd"): ("speedrun:96", "96.03 (airbench96)"),
    (2, "muon"): ("speedrun:muon", "94.01 (airbench94_muon, whose Muon is another)"),
}
VIEWS = {
    "none": "the image",
    "mirror": "and its mirror image",
    "multicrop": "and both shifted (the record's)",
}
NOT_YET = "Not yet measured."
CURVES = RESULTS / "curves.svg"


def status():
    """What stands behind the figures: devices, and which recipes were only begun."""
    accuracies = devices_of([*contents(RUNS), *speedruns_found()])
    speeds = devices_of(benchmarks_of("families"))
    text = f"Accuracies are from {' and '.join(accuracies)}, speeds from {' and '.join(speeds)}"
    if not any("NVIDIA" in device for device in accuracies + speeds):
        text += "; nothing has been measured on a GPU yet"
    begun = [
        f"`{title(name, recipe)}`"
        for (name, recipe), group in runs_by_recipe().items()
        if group and all(run["epochs"] < run["epochs_planned"] for run in group)
    ]
    if begun:
        text += f". Begun only, which says nothing of where they end: {', '.join(begun)}"
    return f"{text}."


def title(name, recipe):
    """A system's recipe as --config names it: vgg, vgg:tuned."""
    return f"{name}{recipe and ':'}{recipe}"


def devices_of(found):
    return sorted({r["device"] for r in found})


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
        f"| config | epochs | top-5 | {' | '.join(names)} |",
        "|---|--:|--:|" + "--:|" * len(names),
    ]
    for name, original in ORIGINALS.items():
        known = original.get("per_class", {})
        if known:
            values = " | ".join(f"{known[c]:.1f}" for c in names)
            lines.append(f"| {name}, original | {original['epochs']} | not stated | {values} |")
        for recipe in RECIPES:
            group = runs[name, recipe]
            far = [r for r in group if r["epochs"] == max(run["epochs"] for run in group)]
            if far:
                means = [sum(r["per_class"][c] for r in far) / len(far) for c in names]
                top5 = sum(r["test"]["top5"] for r in far) / len(far)
                lines.append(
                    f"| {title(name, recipe)} | {far[0]['epochs']:g} of "
                    f"{far[0]['epochs_planned']:g} | {top5:.2f} "
                    f"| {' | '.join(f'{x:.1f}' for x in means)} |"
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


def spread(values):
    mean = f"{sum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def ours(runs):
    """The cells of a row for each device and dtype: how far the runs that went farthest went,
    their last accuracy, of one view and of mirror views, how many they are, how long they took,
    where."""
    rows = []
    for where in dict.fromkeys(map(place, runs)):
        here = [run for run in runs if place(run) == where]
        epochs = max(run["epochs"] for run in here)
        farthest = [run for run in here if run["epochs"] == epochs]
        accuracy = spread([run["last"]["accuracy"] for run in farthest])
        if farthest[0]["config"]["eval"]["augmented"]:
            accuracy += " augmented"
        views = [views_of(run) for run in farthest]
        if all("accuracy_clean" in v for v in views):
            accuracy += f", {spread([v['accuracy_clean'] for v in views])} clean"
        mirrored = all(v.get("tta") == "mirror" for v in views)
        minutes = sum(run["seconds"]["total"] for run in farthest) / len(farthest) / 60
        rows.append(
            [
                f"{epochs:g} of {farthest[0]['epochs_planned']:g}",
                accuracy,
                spread([v["accuracy_tta"] for v in views]) if mirrored else "",
                f"{len(farthest)}",
                f"{minutes:.0f}",
                where,
            ]
        )
    return rows


def views_of(run):
    """What has the accuracies of other views at the end of a run, if they were measured."""
    same = run["last"].get("epoch") == run["best"].get("epoch")
    return run["test"] if same else run["last"]


def curves():
    """(results/curves.svg as text, digest of what it shows): accuracy by epoch, a panel a system,
    the original's points, its recipe's runs and ours."""
    from cifar_jax import report

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


def provenance(result):
    """Device, versions, commit and data (if it has any) of a result, in words."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    # XLA's devices of a CPU may be more than its cores
    device = re.sub(r"^(\d\d+|[2-9]) x cpu", r"\1 virtual devices of one CPU", result["device"])
    text = f"{device}, {versions}, commit {short_commit(result['commit'])}"
    if "dataset" in result:
        text += f", train sha256 {result['dataset']['sha256']['train'][:12]}"
    return text


def comparisons():
    """The table of accuracies beside PyTorch's; speeds are benchmark.py's."""
    from cifar_jax.compare import accuracies

    found = [comparison for group in measured(COMPARISONS).values() for comparison in group]
    if not found:
        return NOT_YET
    lines = [accuracies(found), "", "Measured (`results/comparisons/*.json`):", ""]
    lines += [f"- {c['model']}: {provenance(c)}" for c in found]
    return "\n".join(lines)


def speedruns_found():
    """The contents of SPEEDRUNS that are of CIFAR-10 and of a recipe in RECORDS."""
    found = contents(SPEEDRUNS)
    return [r for r in found if r["dataset"]["name"] == "cifar10" and record_of(r)]


def speedruns():
    """The table of the speedruns' accuracies, a row a file, a column for each choice of views."""
    found = speedruns_found()
    if not found:
        return NOT_YET
    lines = [
        f"| recipe | runs | {' | '.join(VIEWS.values())} | published | device |",
        "|---|--:|" + "--:|" * len(VIEWS) + "--:|---|",
    ]
    for r in found:
        name, published = record_of(r)
        accuracies = [r["summary"]["accuracy"][views] for views in VIEWS]
        cells = " | ".join(figure(accuracy, 2) for accuracy in accuracies)
        lines.append(
            f"| `{name}`, {r['config']['model']['dtype']} | {accuracies[0]['n']} | {cells} "
            f"| {published} | {r['device']} |"
        )
    lines += [
        "",
        "Test accuracy in percent by the views of an image that are averaged: mean ± standard "
        "deviation over the runs (95 % interval of the mean).",
    ]
    return "\n".join(lines)


def speedrun_sources():
    """The speedruns' times, where nothing else ran beside them, and what made each."""
    found = speedruns_found()
    if not found:
        return NOT_YET
    lines = []
    timed = [r for r in found if "cpu" not in r["device"]]
    if timed:
        lines += [
            "| recipe | seconds a run (95 %) | compilation, s: cold | cached | first process, s |",
            "|---|--:|--:|--:|--:|",
        ]
    for r in timed:
        first = r["sessions"][0]
        compiled = " | ".join(f"{first['compile_seconds'][k]:.1f}" for k in ("cold", "cached"))
        lines.append(
            f"| {record_of(r)[0]}, {r['config']['model']['dtype']} "
            f"| {figure(r['summary']['seconds'], 3)} | {compiled} "
            f"| {first['process_seconds']:.1f} |"
        )
    if len(timed) < len(found):
        lines += ["Times on CPU are left out: that machine did other work as well."]
    lines += [""]
    lines += [
        f"- {record_of(r)[0]}: {source}"
        for r in found
        for source in dict.fromkeys(provenance({**r, **session}) for session in r["sessions"])
    ]
    return "\n".join(lines)


def record_of(result):
    """The entry of RECORDS that a speedrun is; None for another recipe."""
    config = result["config"]
    return RECORDS.get((config["model"].get("depth"), config["optim"]["name"]))


def figure(summary, digits):
    """significance.interval's mean, deviation and interval in words."""
    text = f"{summary['mean']:.{digits}f}"
    if summary["interval"] is None:
        return text
    low, high = (f"{x:.{digits}f}" for x in summary["interval"])
    return f"{text} ± {summary['sd']:.{digits}f} ({low} to {high})"


def benchmarks():
    """The tables of the benchmarks, device by device; small runs and growth are left out."""
    from benchmark import markdown

    return benchmark_tables("families", markdown)


def growth():
    """The tables of how time grows, device by device."""
    from growth import markdown

    return benchmark_tables("growth", markdown)


def benchmark_tables(field, table):
    """table(result) of each of benchmarks_of(field)."""
    return "\n".join(table(r) for r in benchmarks_of(field)).rstrip() or NOT_YET


def benchmarks_of(field):
    """The benchmarks that hold `field` and are no small runs."""
    return [r for r in contents(BENCHMARKS) if field in r and not r["settings"]["quick"]]


def seeds():
    """The table of many seeds at once against the same runs in turn, and the strategies' rates."""
    found = contents(SEEDS)
    if not found:
        return NOT_YET
    lines = [
        "| recipe | seeds, steps each | at once, s (CPU s) | in turn, s (CPU s) | times as fast "
        "| images/s in training: at once, in turn | same figures |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for r in found:
        both = (r["together"], r["single"])
        spent = " | ".join(f"{s['seconds']:,.0f} ({s['cpu_seconds']:,.0f})" for s in both)
        rates = ", ".join(f"{s['images_per_second']:,.0f}" for s in both)
        lines.append(
            f"| {r['model']} | {r['settings']['seeds']}, {r['steps']} | {spent} "
            f"| {r['times_faster']:.2f} ({r['less_cpu']:.2f} by CPU s) | {rates} "
            f"| {r['same_figures']} of {r['settings']['seeds']} |"
        )
    lines += [
        "",
        "Each is a process from its start to its end, with an evaluation on all test images; the "
        "machine did other work as well, which CPU seconds leave out. The network has hardly begun "
        "to learn.",
        "",
    ]
    for r in found:
        rates = ", ".join(
            f"{name} {s['images_per_second']:,.0f} images/s ({s['cpu_seconds']:,.0f} CPU s in all)"
            for name, s in r["strategies"].items()
        )
        lines.append(f"Strategies with {r['settings']['few']} seeds of {r['model']}: {rates}.")
    lines += ["", "How these were measured (`results/seeds/*.json`):", ""]
    lines += [f"- {r['model']}, {r['strategy']}: {provenance(r)}" for r in found]
    return "\n".join(lines)


def faults():
    """A row for each case of tests/cases.py: how many tests show that it holds; soak and fuzz."""
    from cases import CASES

    path = RESULTS / "faults.json"
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    rows = ["| | what happens | what the run does | tests |", "|--:|---|---|---|"]
    for number, (fault, outcome) in CASES.items():
        tests = found["cases"].get(str(number), {})
        counts = collections.Counter(tests.values())
        told = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
        where = sorted({test.partition("::")[0] for test in tests})
        where = f" ({', '.join(where)})" if where else ""
        rows.append(f"| {number} | {fault} | {outcome} | {told}{where} |")
    rows += ["", f"Tested on {provenance(found)}."]
    path = RESULTS / "soak.json"
    if path.exists():
        soak = json.loads(path.read_text())
        memory, signals = soak.get("memory"), collections.Counter()
        for what, count in soak["kills"].items():  # an older file has a guess of where, too
            signals[what.partition(" in ")[0]] += count
        rows += [
            "",
            f"{soak['runs']} runs were killed or signalled {soak['survived']} times in all, at "
            "random moments, and each ended bit for bit as an uninterrupted one: "
            + ", ".join(f"{count} x {name}" for name, count in sorted(signals.items()))
            + f". {provenance(soak)}.",
        ]
        if memory:
            rows += [
                "",
                f"Resident memory of a run of {memory['epochs']:,} epochs with a save each: "
                f"{memory['settled']:.0f} MiB in the second fifth of them, "
                f"{memory['end']:.0f} MiB in the last (medians; commit "
                f"{short_commit(memory['commit'])}).",
            ]
    path = RESULTS / "fuzz.json"
    if path.exists():
        fuzz = json.loads(path.read_text())
        limits = fuzz["limits"]
        rows += [
            "",
            "Every reader of files and names, and the parser of overrides, was handed mutated "
            "inputs; each gave the right data or one sentence, within "
            f"{limits['seconds']} s and {limits['bytes'] >> 20} MiB (an image: "
            f"{limits['bytes_of_an_image'] >> 20} MiB). {provenance(fuzz)}; of some readers an "
            "earlier count, with the commit of that. CI hands each the same few again.",
            "",
            "| reader | inputs | commit |",
            "|---|--:|---|",
        ]
        rows += [
            f"| {reader} | {found['inputs']:,} | {short_commit(found['commit'])} |"
            for reader, found in fuzz["readers"].items()
        ]
    return "\n".join(rows)


def scaling():
    """The tables of docs/scaling.md."""
    from scaling import markdown

    path = RESULTS / "scaling.json"
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    return f"{markdown(found)}\n\nCounted on {provenance(found)}."


BLOCKS = {
    "status": status,
    "results": results,
    "epochs": epochs,
    "classes": classes,
    "sources": sources,
    "comparison": comparisons,
    "benchmark": benchmarks,
    "growth": growth,
    "speedrun": speedruns,
    "speedrun sources": speedrun_sources,
    "seeds": seeds,
    "faults": faults,
    "scaling": scaling,
}


def with_tables(page):
    """The text of a page with the block between each pair of marks made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in page:
            before, rest = page.split(begin)
            page = f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--add", nargs="+", default=[], metavar="DIR", help="workdirs to copy into results/"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a page is out of step"
    )
    args = parser.parse_args()
    for workdir in args.add:
        print(*add(workdir), sep="\n")
    texts = {page: page.read_text() for page in PAGES}
    new = {page: with_tables(text) for page, text in texts.items()}
    picture, digest = curves()
    if args.check:
        sys.exit(texts != new or digest not in CURVES.read_text())
    CURVES.write_text(picture)
    for page, text in new.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
