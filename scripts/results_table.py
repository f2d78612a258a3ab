"""Keep results/ and the pages' tables in step: python scripts/results_table.py [--add DIR ...]

--add copies what a workdir holds: a run (result.json, config, every epoch) to
results/runs/MODEL[-RECIPE]_seedN.json, a comparison to results/comparisons/MODEL.json. What
speedrun.py, benchmark.py and many_seeds.py write lies in folders of results/ already. The tables
between the marks in README.md and docs/ and results/curves.svg are made again from those files;
--check only says whether they are in step (exit code 1 if not).
"""

import argparse
import collections
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from results_runs import (  # noqa: E402
    CURVES,
    classes,
    curves,
    epochs,
    results,
    sources,
    title,
)
from results_store import (  # noqa: E402
    BENCHMARKS,
    COMPARISONS,
    RESULTS,
    RUNS,
    SEEDS,
    SPEEDRUNS,
    add,
    contents,
    measured,
    runs_by_recipe,
    variant_of,
)

from cifar_jax import usage  # noqa: E402
from cifar_jax.workdir import short_commit  # noqa: E402

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# By the variant of configs/speedrun.py: its name; the published mean of the record it follows.
RECORDS = {
    "": ("speedrun", "94.01 (airbench94)"),
    "96": ("speedrun:96", "96.03 (airbench96)"),
    "muon": ("speedrun:muon", "94.01 (airbench94_muon, whose Muon is another)"),
}
VIEWS = {
    "none": "the image",
    "mirror": "and its mirror image",
    "multicrop": "and both shifted (the record's)",
}
NOT_YET = "Not yet measured."


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


def devices_of(found):
    return sorted({r["device"] for r in found})


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
    return RECORDS.get(variant_of("speedrun", RECORDS, result["config"]))


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
    with usage.exit_codes():
        main()
