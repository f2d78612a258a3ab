"""README and docs/ say what results/ holds, no more and no less."""

import importlib
import json
import pathlib
import re
import sys

import pytest
from cases import CASES

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import results_runs  # noqa: E402
import results_store  # noqa: E402
import results_table  # noqa: E402
import speedrun  # noqa: E402

from cifar_jax import InputError, report  # noqa: E402
from configs import speedrun as configs_speedrun  # noqa: E402


@pytest.mark.parametrize("page", results_table.PAGES, ids=lambda p: p.name)
def test_pages_are_in_step_with_results(page):
    text = page.read_text()
    assert results_table.with_tables(text) == text, "run: python scripts/results_table.py"


def test_every_table_stands_on_one_page():
    texts = [page.read_text() for page in results_table.PAGES]
    for name in results_table.BLOCKS:
        assert sum(text.count(f"<!-- {name} -->") for text in texts) == 1, name


def test_readme_accuracies_come_from_results():
    """A figure that no JSON holds would stand outside the marks: there is none."""
    text = (ROOT / "README.md").read_text()
    outside = text
    for name in re.findall(r"<!-- (\w+) -->", text):
        before, rest = outside.split(f"<!-- {name} -->")
        outside = before + rest.split(f"<!-- /{name} -->")[1]
    assert not re.findall(r"\d[\d.]* ?%", outside)


def test_comparisons_say_where_they_come_from():
    paths = sorted(results_store.COMPARISONS.glob("*.json"))
    assert {path.stem for path in paths} >= {*results_store.ORIGINALS}
    for path in paths:
        comparison = json.loads(path.read_text())
        assert comparison["status"] == "done"
        assert "-dirty" not in comparison["commit"]
        for key in ("settings", "versions", "device", "dataset", "runs", "timing"):
            assert comparison[key], key


@pytest.mark.parametrize("path", sorted(results_store.RUNS.glob("*.json")), ids=lambda p: p.stem)
def test_results_say_where_they_come_from(path):
    result = json.loads(path.read_text())
    for key in ("config", "seed", "commit", "versions", "device", "dataset", "records"):
        assert result[key] not in (None, "", [], {}), key
    assert [r["epoch"] for r in result["records"]] == list(range(1, int(result["epochs"]) + 1))


def test_every_case_is_shown_by_tests_that_passed():
    found = json.loads((ROOT / "results" / "faults.json").read_text())["cases"]
    assert found.keys() == {str(number) for number in CASES}
    for tests in found.values():
        for test, outcome in tests.items():
            file, _, name = test.partition("::")
            source = (ROOT / "tests" / file).read_text()
            assert f"def {name.partition('[')[0]}(" in source, test
            assert outcome == "passed", test


HERE = {
    "device": "1 x NVIDIA H200",
    "versions": {"jax": "0.11.0"},
    "commit": "0123456789abcdef",
}


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_speedruns_have_a_row_for_each_choice_of_views(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "SPEEDRUNS", tmp_path)
    assert results_table.speedruns() == results_table.speedrun_sources() == "Not yet measured."
    config = json.loads(configs_speedrun.get_config().to_json_best_effort())
    config["model"]["dtype"] = "bfloat16"
    runs = [
        {"accuracy": {"none": 93.0 + x, "mirror": 93.5 + x, "multicrop": 94.0 + x}, "seconds": 3.0}
        for x in (0.0, 0.2)
    ]
    content = {
        "config": config,
        "dataset": {"name": "cifar10", "sha256": {"train": "f912919bdea3"}},
        "runs": runs,
        "sessions": [
            {"compile_seconds": {"cold": 41.23, "cached": 2.0}, "process_seconds": 60.0, **HERE}
        ]
        * 2,
        "summary": speedrun.summarize(runs),
        **HERE,
    }
    quick = {**content, "dataset": {"name": "digits"}}
    other = {**content, "config": {**config, "epochs": 99.0}}
    write(tmp_path, h200=content, quick=quick, other=other)
    lines = results_table.speedruns().splitlines()
    assert lines[2] == (
        "| `speedrun`, bfloat16 | 2 | 93.10 ± 0.14 (91.83 to 94.37) "
        "| 93.60 ± 0.14 (92.33 to 94.87) "
        "| 94.10 ± 0.14 (92.83 to 95.37) | 94.01 (airbench94) | 1 x NVIDIA H200 |"
    )
    assert sum("H200" in line for line in lines) == 1
    lines = results_table.speedrun_sources().splitlines()
    assert lines[2] == (
        "| speedrun, bfloat16 | 3.000 ± 0.000 (3.000 to 3.000) | 41.2 | 2.0 | 60.0 |"
    )
    assert lines[-1].startswith("- speedrun: 1 x NVIDIA H200, jax 0.11.0, commit 0123456789,")
    assert sum("H200" in line for line in lines) == 1


@pytest.mark.parametrize("model", [*results_store.ORIGINALS])
def test_a_run_belongs_to_the_recipe_whose_config_it_has(model):
    module = importlib.import_module(f"configs.{model}")
    for variant in ("", "tuned"):
        config = json.loads(module.get_config(variant).to_json_best_effort())
        config["seed"], config["stop_after"] = 77, 2.0
        assert results_store.recipe_of(model, config) == variant
        config["optim"]["weight_decay"] = 0.123
        assert results_store.recipe_of(model, config) is None


def test_only_a_recipe_from_its_start_is_added(tmp_path, monkeypatch):
    """And never a run in the place of a longer one."""
    monkeypatch.setattr(results_store, "RUNS", tmp_path / "runs")
    config = json.loads(importlib.import_module("configs.vgg").get_config().to_json_best_effort())
    kept = {"config": config, "commit": "a", "resumed": [{"commit": "b"}]}
    result = {"status": "stopped", "model": "vgg", "device": "cpu", "seed": 0, "epochs": 3}
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"epoch": 1}\n')

    def add(**more):
        write(workdir, config=kept, result={**result, **more})
        (path,) = results_store.add(workdir)
        return json.loads(path.read_text())

    added = add()
    assert (added["commit"], added["resumed"]) == ("a", [{"commit": "b"}])
    assert "dir" not in added["config"]["data"] and added["records"] == [{"epoch": 1}]
    for more, says in (
        ({"imported": {"file": "w.pt"}}, "it began from imported weights"),
        ({"rollbacks": [24]}, "it diverged"),
        ({"epochs": 2}, "holds a longer run"),
        ({"status": "interrupted"}, "is interrupted"),
    ):
        with pytest.raises(InputError, match=says):
            add(**more)
    assert add(epochs=4)["epochs"] == 4
    with pytest.raises(InputError, match=r"airbench are kept by scripts/speedrun\.py"):
        add(model="airbench")


def test_only_a_comparison_of_a_recipe_is_added(tmp_path, monkeypatch):
    monkeypatch.setattr(results_store, "COMPARISONS", tmp_path / "comparisons")
    comparison = {"status": "done", "model": "resnet", "runs": [{}, {}], "device": "1 x cpu"}
    comparison["steps_trained"] = 10

    def add(config, **more):
        (tmp_path / "comparison.json").write_text(json.dumps({**comparison, **more}))
        config = json.loads(config.to_json_best_effort())
        (tmp_path / "config.json").write_text(json.dumps({"config": config}))
        return [*results_store.add(tmp_path)]

    resnet, quickstart = (
        importlib.import_module(f"configs.{name}").get_config() for name in ("resnet", "quickstart")
    )
    with pytest.raises(InputError, match="another config"):
        add(quickstart)
    assert add(resnet) == [tmp_path / "comparisons" / "resnet.json"]
    with pytest.raises(InputError, match="more seeds"):
        add(resnet, runs=[{}])
    with pytest.raises(InputError, match="a longer comparison"):
        add(resnet, steps_trained=9)
    (path,) = add(resnet, steps_trained=9, device="1 x NVIDIA H200")
    assert path == tmp_path / "comparisons" / "resnet_1-x-nvidia-h200.json"


def test_devices_keep_to_themselves_and_partial_runs_say_so():
    def run(device, epochs, accuracy, best_epoch=1, augmented=False, **test):
        made = {"device": device, "epochs": epochs, "epochs_planned": 24}
        made["config"] = {"model": {"dtype": "float32"}, "eval": {"augmented": augmented}}
        best, last = (
            {"accuracy": 99.0, "epoch": best_epoch},
            {"accuracy": accuracy, "epoch": epochs},
        )
        return {**made, "best": best, "last": last, "test": test, "seconds": {"total": 300.0}}

    found = [run("cpu", 2, 60.0), run("cpu", 3, 70.0), run("cpu", 3, 72.0), run("gpu", 24, 93.0)]
    assert results_runs.ours(found) == [
        ["3 of 24", "71.00 (70.00 to 72.00)", "", "2", "5", "cpu"],
        ["24 of 24", "93.00", "", "1", "5", "gpu"],
    ]

    def accuracies(run):
        ((_, accuracy, mirrored, *_),) = results_runs.ours([run])
        return accuracy, mirrored

    views = run("gpu", 24, 94.0, tta="mirror", accuracy_tta=94.5)
    assert accuracies(views) == ("94.00", "")  # the views are the best's
    views["last"] |= {"tta": "mirror", "accuracy_tta": 94.2}
    assert accuracies(views) == ("94.00", "94.20")
    views = run("gpu", 24, 94.0, best_epoch=24, tta="mirror", accuracy_tta=94.5)
    assert accuracies(views) == ("94.00", "94.50")
    views["config"]["model"]["dtype"] = "bfloat16"
    assert results_runs.ours([views])[0][-1] == "gpu in bfloat16"
    augmented = run("gpu", 24, 79.0, best_epoch=24, augmented=True, accuracy_clean=88.0)
    assert accuracies(augmented) == ("79.00 augmented, 88.00 clean", "")


def test_curves_hold_what_results_say():
    assert results_runs.curves()[1] in results_runs.CURVES.read_text(), (
        "run: python scripts/results_table.py"
    )


def test_a_run_stopped_within_its_first_epoch_has_no_curve():
    found = {"vgg": {"": [[], [(1, 40.0), (2, 60.0)]]}, "resnet": {"tuned": [[]]}}
    vgg, resnet = report.draw_beside_original(found).axes
    assert [len(line.get_xdata()) for line in vgg.lines] == [2] and not resnet.lines


def test_benchmarks_are_shown_but_for_small_runs_and_growth_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "BENCHMARKS", tmp_path)
    assert results_table.benchmarks() == "Not yet measured."
    form = {"images_per_second": 1000.0, "spread": [900.0, 1150.0], "mfu": 0.25}
    form["rounds"] = [900.0, 1150.0, 1000.0]
    other = {
        "images_per_second": 500.0,
        "spread": [500.0, 500.0],
        "mfu": 0.125,
        "rounds": [500.0] * 3,
    }
    content = {
        **{
            "status": "running",
            "data": "CIFAR-10",
            "glibc_tunables": "",
            "peaks": {"bfloat16": {"jax": 5e14}},
            **HERE,
        },
        "settings": {"quick": False, "measure": ["speed"], "dtypes": ["bfloat16"], "rounds": 5},
        "families": {
            "vgg": {
                "batches": {
                    "32": {"train": {"jax bfloat16": form, "torch bfloat16": other}},
                    "64": {"train": {"jax bfloat16": form}},
                }
            }
        },
    }
    quick = {**content, "settings": {**content["settings"], "quick": True}}
    rows = [{"value": 8, "seconds": 2.0, "work_ratio": 1}]
    rows += [{"value": 16, "seconds": 6.0, "work_ratio": 4}]
    base = {"width": 8, "images": 512, "batch_size": 64, "classes": 10}
    grown = {**HERE, "settings": content["settings"], "base": base, "growth": {"width": rows}}
    write(tmp_path, a=content, b=quick, c=grown)
    text = results_table.benchmarks()
    assert "| JAX, augmenting | PyTorch eager | augmenting / PyTorch eager |" in text
    row = "| vgg, 32 | bfloat16 | train | 1,000 (25.0 %) | 500 (12.5 %) | 2.00 (1.90 to 2.15) |"
    assert text.count(row) == 1
    assert "| vgg, 64 | bfloat16 | train | 1,000 (25.0 %) | - | - |" in text
    assert "NVIDIA H200; 5 rounds a task" in text and "; cut short." in text
    assert "25 % of its median (the middle of all forms), at most 25 % (vgg, train, jax" in text
    assert "width" not in text
    assert "| width | 16 | 6.000 | 3.00 | 4.00 | 0.75 |" in results_table.growth()
