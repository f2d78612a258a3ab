"""Keep results/ and the README's tables in step: python scripts/results_table.py [--add RUN ...]

--add copies a run's result.json, config and every epoch into results/NAME.json. Without it the
tables between the
README's <!-- results --> marks are written again from results/*.json; --check only says whether
they are in step
(exit code 1 if not).
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"

# What the originals state or log (test accuracy in percent): final figure, epochs, points of the
# curve by epoch.
ORIGINALS = {
    "vgg": {
        "project": "ZiadHelal/pytorch-cifar10",
        "params": 2_882_474,
        "accuracy": 88.24,
        "epochs": 120,
        "curve": {10: 71.1, 20: 79.8, 40: 84.2, 60: 85.9, 80: 87.5, 100: 87.8, 120: 88.2},
    },
    "convnet": {
        "project": "iVishalr/cifar10-pytorch",
        "params": 2_791_434,
        "accuracy": 87.27,
        "epochs": 400,
        "curve": {1: 41.03, 10: 71.51, 50: 81.91, 100: 83.37, 200: 84.88, 300: 84.92, 301: 86.30},
    },
    "resnet": {
        "project": "Sualeh77/ERAV1S10",
        "params": 6_573_120,
        "accuracy": 92.87,
        "epochs": 24,
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
        "note": " on augmented test images",
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


def add(run):
    """Copy a run into results/MODEL.json; returns the file written."""
    run = pathlib.Path(run)
    result = json.loads((run / "result.json").read_text())
    start = json.loads((run / "config.json").read_text())
    config = start["config"]
    result["commit"] = start["commit"]  # of the code that trained, not of the last look at the run
    config["data"].pop("dir")  # where the data lay on one machine says nothing
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    path = RESULTS / f"{result['model']}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({**result, "config": config, "records": records}, indent=1) + "\n")
    return path


def tables():
    """The Markdown between the marks."""
    measured = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    lines = [
        "| config | original project | parameters | original, accuracy | ours, accuracy |",
        "|---|---|--:|---|---|",
    ]
    for name, original in ORIGINALS.items():
        theirs = (
            f"{original['accuracy']:.2f} %{original.get('note', '')}, {original['epochs']} epochs"
        )
        lines.append(
            f"| [{name}](configs/{name}.py) | {original['project']} | {original['params']:,} "
            f"| {theirs} | {ours(measured.get(name), original)} |"
        )
    lines += [
        "",
        "Along the originals' logged curves (test accuracy in percent, every epoch run here):",
        "",
    ]
    lines += ["| config | epoch | original's log | ours | train, ours |", "|---|--:|--:|--:|--:|"]
    for name, original in ORIGINALS.items():
        for record in measured.get(name, {"records": []})["records"]:
            theirs = original["curve"].get(record["epoch"])
            logged = "not stated" if theirs is None else f"{theirs:.2f}"
            measures = f"{record['eval_accuracy']:.2f} | {record['train_accuracy']:.2f}"
            lines.append(f"| {name} | {record['epoch']} | {logged} | {measures} |")
    lines += ["", "How these were measured (one run each, official data, `results/*.json`):", ""]
    for name, result in measured.items():
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        commit, sha = (
            (result["commit"] or "unknown")[:10],
            result["dataset"]["sha256"]["train"][:12],
        )
        lines.append(
            f"- {name}: seed {result['seed']}, {result['device']}, {versions}, commit {commit}, "
            f"train sha256 {sha}"
        )
    return "\n".join(lines)


def ours(result, original):
    if result is None:
        return "not yet measured"
    accuracy = f"{result['best']['accuracy']:.2f} %"
    if result["epochs"] == original["epochs"]:
        return accuracy
    return f"{accuracy} after {result['best']['epoch']:g} of {original['epochs']} epochs"


def with_tables(readme):
    """README text with the block between the marks made anew."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--add", nargs="+", default=[], metavar="RUN", help="workdirs to copy into results/"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README is out of step"
    )
    args = parser.parse_args()
    for run in args.add:
        print(add(run))
    text = README.read_text()
    new = with_tables(text)
    if args.check:
        sys.exit(text != new)
    README.write_text(new)


if __name__ == "__main__":
    main()
