"""Whether runs differ: python scripts/compare_runs.py RUN RUN... [--out compare_runs.html]

RUN is a workdir of main.py or a file of results/runs/; a workdir of --mode=seeds is as many runs as
it has replicas. Runs that differ in nothing but the seed are one group; the group of the first RUN
is what the others are compared with. Two groups that share seeds: paired t-test over those; others:
Welch's t-test; two single runs: McNemar's exact test on their predictions
(report/predictions.npz); more than two groups: p-values adjusted by Holm's method. Prints the
verdicts and writes one page with curves, intervals and tables.
"""

import argparse
import itertools
import json
import pathlib
import sys
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from cifar_jax import InputError, metrics, page, significance, usage  # noqa: E402
from cifar_jax import workdir as files  # noqa: E402
from cifar_jax.workdir import short_commit  # noqa: E402

LEVEL = 0.05
NEEDED = ("status", "model", "seed", "dataset", "epochs", "seconds", "device", "test")
LOGGED = ("epoch", "lr", "seconds", "images_per_second", "train_loss", "eval_loss", "eval_accuracy")


def read(path):
    """The runs in `path`, of each: its path, result, config {dotted name: value}, records, and
    which test images it gets right ({'labels', 'right'}, None where it kept no predictions)."""
    path = pathlib.Path(path)
    if path.is_dir():
        config = (files.read_json(path / "config.json") or {}).get("config")
        records = read_records(path / "metrics.jsonl")
        if (path / "seeds.json").exists():
            return read_replicas(path, config, records)
        result = files.read_json(path / "result.json")
    elif path.is_file():
        result = files.read_json(path)
        config, records = (
            result.get(key) if isinstance(result, dict) else None for key in ("config", "records")
        )
    else:
        raise InputError(f"{path} holds no run: there is no such folder or file")
    return [make_run(path, result, config, records)]


def read_replicas(path, config, records):
    """The runs in a workdir of --mode=seeds, each with an equal share of the time of all."""
    together = files.read_json(path / "seeds.json")
    try:
        replicas = together.pop("replicas")
        n = len(replicas)
        together["seconds"] = {part: spent / n for part, spent in together["seconds"].items()}
        return [
            make_run(
                path / f"replica-{i}",
                {**together, **replica},
                {**files.flatten(config), **replica["fields"]},
                [_alone(record, n) for record in records if record["replica"] == i],
                folder=path,
            )
            for i, replica in enumerate(replicas)
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no runs: its seeds.json cannot be used") from error


def _alone(record, n):
    """A line of metrics.jsonl, with its share of what n replicas took."""
    speed = record["images_per_second"] * n
    return {**record, "seconds": record["seconds"] / n, "images_per_second": speed}


def make_run(path, result, config, records, folder=None):
    """What `read` says of a run, a replica's `folder` is that of all; InputError if anything is
    missing."""
    if not isinstance(result, dict) or not isinstance(config, dict):
        raise InputError(f"{path} holds no run that has ended: it lacks result.json or config.json")
    missing = [key for key in NEEDED if key not in result]
    if missing == ["test"]:
        raise InputError(f"{path} has no test accuracy: that run is {result['status']}")
    if missing:
        raise InputError(f"{path} holds no run: its result lacks {missing[0]!r}")
    for name in LOGGED:
        if not all(isinstance(r, dict) and name in r for r in records or []):
            raise InputError(f"{path} cannot be read: its metrics.jsonl lacks {name!r} in a line")
    fields = {**files.defaults(), **files.flatten(config)}
    for name in [n for n in fields if n == "seed" or {n, n.split(".")[0]} & {*files.FREE_FIELDS}]:
        del fields[name]
    return {
        "path": str(path),
        "folder": str(folder or path),
        "result": result,
        "config": {
            **fields,
            "epochs trained": result["epochs"],
            "imported": str(result.get("imported")),
            "rolled back to": str(result.get("rollbacks")),
        },
        "records": records or [],
        "predictions": read_predictions(path / "report" / "predictions.npz"),
    }


def read_records(path):
    """The lines of metrics.jsonl; none where there is no such file."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_predictions(path):
    """{'labels', 'right'} of the test images; None where they were not kept."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            logits, labels = kept["logits"], kept["labels"]
        right = metrics.predictions(logits) == labels
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return {"labels": labels, "right": right}


def check(runs):
    """InputError unless the runs can be compared: different ones, measured on the same images."""
    paths = [pathlib.Path(run["path"]).resolve() for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise InputError(f"{runs[i]['path']} is named twice")
    if len(runs) < 2:
        raise InputError("name at least two runs")
    first = runs[0]
    for run in runs[1:]:
        shas = [r["result"]["dataset"]["sha256"].get("test") for r in (first, run)]
        if shas[0] != shas[1]:
            raise InputError(f"{first['path']} and {run['path']} were tested on different images")
        kinds = [r["result"]["test"].get("augmented", False) for r in (first, run)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{first['path']} and {run['path']} were tested on different images: "
                "only one of them on augmented ones"
            )


def make_groups(runs):
    """[{'label', 'fields', 'runs'}] in the order of their first run.

    Where runs of one config repeat a seed, their commit, device and versions, and then their
    folder, tell them apart.
    """
    told = (
        lambda run: {},
        lambda run: {
            "commit": short_commit(run["result"].get("commit")),
            "device": run["result"]["device"],
            **run["result"].get("versions", {}),
        },
        lambda run: {"run": run["folder"]},
    )
    for more in told:
        groups = {}
        for run in runs:
            fields = {**run["config"], **more(run)}
            key = json.dumps(fields, sort_keys=True)
            groups.setdefault(key, {"fields": fields, "runs": []})["runs"].append(run)
        groups = list(groups.values())
        if all(len(g["runs"]) == len({r["result"]["seed"] for r in g["runs"]}) for g in groups):
            break
    for most, told in ((2, shown), (None, shown), (None, str)):
        for group in groups:
            group["label"] = label(group, groups, most, told)
        if len({group["label"] for group in groups}) == len(groups):
            break
    return groups


def fields_that_differ(groups):
    """Names of the fields in which not all groups are the same."""
    names = dict.fromkeys(name for group in groups for name in group["fields"])
    return [n for n in names if len({json.dumps(g["fields"].get(n)) for g in groups}) > 1]


def label(group, groups, most, told):
    """A short name: the model where it tells the groups apart, else `most` fields that differ
    (None: all), their values as told(value)."""
    model = group["runs"][0]["result"]["model"]
    alike = [g for g in groups if g["runs"][0]["result"]["model"] == model]
    if len(alike) == 1:
        return model
    names = fields_that_differ(alike)
    parts = [
        f"{n.removesuffix('.name').split('.')[-1]} {told(group['fields'].get(n))}"
        for n in names[:most]
    ]
    more = len(names) - len(parts)
    text = ", ".join(parts) + (f" and {more} more" if more else "")
    return text if len(alike) == len(groups) else f"{model}, {text}"


def shown(value):
    """A config's value in a table."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def sound(group):
    """Its runs that did not diverge: only these count, as in seeds.json."""
    return [run for run in group["runs"] if run["result"]["status"] != "diverged"]


def left_out(*groups):
    """How many runs diverged, in words; '' where none did."""
    count = sum(len(group["runs"]) - len(sound(group)) for group in groups)
    return f"; {count} diverged {'run' if count == 1 else 'runs'} left out" if count else ""


def accuracies(group):
    """{seed: test accuracy in percent}."""
    return {run["result"]["seed"]: run["result"]["test"]["accuracy"] for run in sound(group)}


def contrast(group, baseline):
    """`group` - `baseline` in points of test accuracy: mean, interval, p_value, and how tested."""
    ours, theirs = accuracies(group), accuracies(baseline)
    shared = sorted(ours.keys() & theirs.keys())
    found = {"label": group["label"], "baseline": baseline["label"]}
    if len(shared) > 1:
        left = len(ours) + len(theirs) - 2 * len(shared)
        how = f"paired t-test over the {len(shared)} seeds that both have"
        if left:
            how += f"; {left} {'run' if left == 1 else 'runs'} without a partner left out"
        test = significance.paired([ours[s] for s in shared], [theirs[s] for s in shared])
        return {**found, **test, "how": how}
    if min(len(ours), len(theirs)) > 1:
        test = significance.welch([*ours.values()], [*theirs.values()])
        how = f"Welch's t-test of {len(ours)} against {len(theirs)} runs"
        return {**found, **test, "how": how}
    mean = float(np.mean([*ours.values()]) - np.mean([*theirs.values()]))
    untested = {**found, "mean": mean, "interval": None, "p_value": None}
    if len(ours) != len(theirs):
        return {**untested, "how": "a group of one run has no spread: train it from another seed"}
    predictions = [sound(side)[0]["predictions"] for side in (group, baseline)]
    if None in predictions:
        how = "single runs are compared by report/predictions.npz, which one of them lacks"
        return {**untested, "how": how}
    a, b = predictions
    if not np.array_equal(a["labels"], b["labels"]):
        raise InputError("the runs' predictions.npz are of different images")
    test = significance.mcnemar(a["right"], b["right"])
    how = (
        f"McNemar's exact test on {len(a['labels']):,} images: {test['only_ours']:,} are right in "
        f"{group['label']} alone, {test['only_theirs']:,} in {baseline['label']} alone. This is "
        "about these two networks; whether the recipes differ takes more seeds"
    )
    return {**found, **test, "how": how}


def judge(contrasts):
    """Add to each what it amounts to: p_value adjusted for their number, significant, verdict."""
    tested = [c for c in contrasts if c["p_value"] is not None]
    adjusted = significance.holm([c["p_value"] for c in tested])
    for c, p in zip(tested, adjusted, strict=True):
        c["p_value"] = p
    for c in contrasts:
        p = c["p_value"]
        c["significant"] = p is not None and p < LEVEL
        size = f"{c['mean']:+.2f} points"
        if c["interval"]:
            size += f" (95 % interval {c['interval'][0]:+.2f} to {c['interval'][1]:+.2f}"
            size += ")" if p is None else f", p {page.p_value(p)})"
        way = "higher" if c["mean"] > 0 else "lower"
        if c["significant"]:
            told = f"{c['label']} has a {way} test accuracy than {c['baseline']}"
        elif p is None:
            told = f"{c['label']} against {c['baseline']} is not tested"
        else:
            told = f"No significant difference of {c['label']} to {c['baseline']}"
        c["verdict"] = f"{told}: {size}."
        if len(tested) > 1 and p is not None:
            c["how"] += f"; p adjusted for {len(tested)} comparisons (Holm)"
        c["how"] = c["how"][0].upper() + c["how"][1:] + "."
    return contrasts


def charts(groups):
    """The groups' curves over each other, a line a run; of several runs their mean is thicker."""
    keys = (
        ("accuracy", "Evaluation accuracy", "%", "eval_accuracy", {"top": 100}),
        ("loss", "Evaluation loss", "cross-entropy, nats", "eval_loss", {"log": True}),
        ("train", "Training loss", "cross-entropy, nats", "train_loss", {"log": True}),
        ("rate", "Learning rate", "at the epoch's end", "lr", {"log": True, "zero": True}),
        ("speed", "Throughput", "images/s", "images_per_second", {"zero": True}),
    )
    found = {}
    for name, title, unit, key, more in keys:
        lines = []
        for k, group in enumerate(groups):
            several = len(group["runs"]) > 1
            found_in = [(run["records"], {"thin": several}) for run in group["runs"]]
            if several:
                rows = zip(*(run["records"] for run in sound(group)), strict=False)
                found_in.append(([mean_record(row) for row in rows], {"mean": True}))
            for records, look in found_in:
                columns = [[r[n] for r in records] for n in ("epoch", key, "seconds")]
                x, y, seconds = columns
                # colours that are alike to some eyes, 1 and 4, 3 and 5, have other dashes
                dash = {"dash": (k // 2 + k // 6) % 3} | look
                lines.append(page.series(group["label"], k % 6, x, y, seconds, **dash))
        if any(line["x"] for line in lines):
            found[name] = page.chart(title, unit, lines, **more)
    return found


def mean_record(records):
    """What several runs logged at one epoch, each figure's mean; None where one has none."""
    found = {name: [r.get(name) for r in records] for name in records[0]}
    return {n: None if None in values else float(np.mean(values)) for n, values in found.items()}


def compare(paths, out):
    """Write the page `out` of the runs in `paths`; returns the contrasts with the first group."""
    runs = [run for path in paths for run in read(path)]
    check(runs)
    out = files.output(out)
    groups = make_groups(runs)
    for k, group in enumerate(groups):
        group["color"] = k % 6
        if not sound(group):
            raise InputError(f"no run of {group['label']} is left to compare: all diverged")
        group["summary"] = significance.interval([*accuracies(group).values()])
    contrasts = [contrast(group, groups[0]) for group in groups[1:]]
    for c, group in zip(contrasts, groups[1:], strict=True):
        c["how"] += left_out(group, groups[0])
    contrasts = judge(contrasts)
    for c, group in zip(contrasts, groups[1:], strict=True):
        c["color"] = group["color"]
    curves = charts(groups)
    lanes = [
        {
            "label": g["label"],
            "color": g["color"],
            "dots": sorted(accuracies(g).values()),
            "mean": g["summary"]["mean"],
            "interval": g["summary"]["interval"],
        }
        for g in groups
    ]
    differences = [{**c, "label": f"{c['label']} - {c['baseline']}", "dots": []} for c in contrasts]
    names = fields_that_differ(groups)
    page.write(
        out,
        "compare_runs.html",
        data={"charts": curves, "confusion": [], "first": 0},
        charts_of=curves,
        groups=groups,
        contrasts=contrasts,
        accuracy_axis=page.axis(lanes),
        difference_axis=page.axis(differences, zero=True),
        smoothed=any(g["fields"].get("loss.label_smoothing") for g in groups),
        fields=[(n, [shown(g["fields"].get(n)) for g in groups]) for n in names],
        dataset=runs[0]["result"]["dataset"],
        versions=dict.fromkeys(
            ", ".join(f"{k} {v}" for k, v in run["result"].get("versions", {}).items())
            + f", commit {short_commit(run['result'].get('commit'))}"
            for run in runs
        ),
        runs=list(itertools.chain.from_iterable(g["runs"] for g in groups)),
    )
    return groups, contrasts


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs, or results/runs/*.json")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("compare_runs.html"))
    args = parser.parse_args(argv)
    groups, contrasts = compare(args.runs, args.out)
    for group in groups:
        told = significance.told(group["summary"], "%") + left_out(group)
        print(f"{group['label']}: test accuracy {told}")
    for c in contrasts:
        print(f"{c['verdict']} {c['how']}")
    if not contrasts:
        print("These runs differ in the seed only: one group.")
    print(f"page: {args.out}")


if __name__ == "__main__":
    with usage.exit_codes():
        main(sys.argv[1:])
