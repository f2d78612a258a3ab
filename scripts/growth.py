"""How time grows: python scripts/growth.py --device gpu

Times whole epochs of a narrow ResNet as one thing grows and the others stay: images, epochs, batch
size, width, classes; every size once in each round. Writes --out (default
results/benchmarks/DEVICE_growth.json) as it goes, and a table (.md) beside it. --quick is a small
run that shows that all works.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchmark import out_file, provenance, use, versions  # noqa: E402

from cifar_jax import compilation, sharding, timing, usage  # noqa: E402
from cifar_jax import workdir as files  # noqa: E402
from cifar_jax.experiment import make_experiment  # noqa: E402
from cifar_jax.flops import forward_macs  # noqa: E402
from configs import resnet  # noqa: E402

BASE = {"images": 512, "epochs": 1, "batch_size": 64, "width": 8, "classes": 10}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, every size once in each")
    parser.add_argument("--out", help="the JSON file")
    parser.add_argument("--quick", action="store_true", help="2 rounds, to twice the size only")
    args = parser.parse_args()
    if args.rounds < 1:
        usage.refuse("--rounds must be at least 1")
    if args.quick:
        args.rounds = 2
    with usage.exit_codes():
        sharding.use_cores(BASE["batch_size"])
        use(args.device)
        growth(args, out_file(args, "_growth"))


def growth(args, out):
    """Measure, write `out` and its table; see the file's docstring."""
    compilation.enable_cache()  # compiling is not measured here
    trained = {}
    factors = (1, 2) if args.quick else (1, 2, 4)
    result = {"status": "running", **provenance(args, None), "base": BASE, "growth": {}}
    for name, value in BASE.items():
        forms = {factor: epochs_of({**BASE, name: value * factor}, trained) for factor in factors}
        times = {factor: [] for factor in factors}
        for _ in range(args.rounds):
            for factor, (run, _) in forms.items():
                times[factor].append(timing.seconds(run))
        result["growth"][name] = [
            {
                "value": value * factor,
                **timing.summarize(times[factor], "seconds"),
                "work_ratio": macs / forms[1][1],
            }
            for factor, (_, macs) in forms.items()
        ]
        files.write_json(out, result)
    result["status"] = "done"
    files.write_json(out, result)
    text = markdown(result)
    out.with_suffix(".md").write_text(text)
    print(text)


def markdown(result):
    """The table of how time grew, with what it was measured on."""
    base = result["base"]
    lines = [
        f"{result['device']}; resnet of widths {tuple(base['width'] * k for k in (1, 2, 4, 8))}, "
        f"{base['images']} images in batches of {base['batch_size']}, {base['classes']} classes; "
        f"median of {result['settings']['rounds']} rounds; {versions(result)}.",
        "",
        "| what grows | to | seconds | time grew | work grew | time / work |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, rows in result["growth"].items():
        for row in rows:
            grew = row["seconds"] / rows[0]["seconds"]
            lines.append(
                f"| {name} | {row['value']} | {row['seconds']:.3f} | {grew:.2f} "
                f"| {row['work_ratio']:.2f} | {grew / row['work_ratio']:.2f} |"
            )
    lines += ["", "Work: multiply-adds of all the images trained on; 1.00 is linear."]
    return "\n".join(lines) + "\n"


def epochs_of(size, trained):
    """(run, multiply-adds) of training a narrow ResNet for size['epochs'] epochs; `trained` keeps
    one epoch's form by the other sizes, so that each is compiled once."""
    key = tuple(value for name, value in size.items() if name != "epochs")
    if key not in trained:
        config = resnet.get_config()
        config.model.widths = tuple(size["width"] * k for k in (1, 2, 4, 8))
        config.batch_size = size["batch_size"]
        splits = timing.random_splits({"train": size["images"], "test": 64}, size["classes"])
        names = tuple(map(str, range(size["classes"])))
        exp = make_experiment(config, splits=splits, class_names=names)
        sides = timing.Sides(exp, None)
        form = timing.make_form(sides, "jax float32", steps=exp.steps_per_epoch)
        form.run()
        trained[key] = form, form.images * forward_macs(exp.model)
    form, macs = trained[key]

    def run():
        for _ in range(size["epochs"]):
            form.run()

    return run, size["epochs"] * macs


if __name__ == "__main__":
    main()
