"""Runs grouped, tested against each other and refused, from made-up workdirs."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from browser import look, needs_chromium
from scipy import stats

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import compare_runs  # noqa: E402

from cifar_jax import InputError  # noqa: E402


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, seed, accuracy, field=value, ...) -> the workdir of such a run."""

    def make(name, seed, accuracy, right=None, result=None, **fields):
        path = tmp_path / name
        (path / "report").mkdir(parents=True)
        config = {"model": {"name": "resnet"}, "seed": seed, "data": {"dir": name}, **fields}
        figures = {"eval_loss": 0.5, "accuracy": accuracy, "top3": 90.0, "top5": 95.0}
        found = {
            "status": "done",
            "model": config["model"]["name"],
            "seed": seed,
            "epochs": 2,
            "test": {**figures, "augmented": False},
            "dataset": {
                "name": "made up",
                "sizes": {"train": 9, "test": 100},
                "sha256": {"train": "a", "test": "b"},
            },
            "seconds": {"total": 6.0},
            "device": "1 x cpu",
            "versions": {"jax": "0.10.2"},
            "commit": "0123456789abcdef",
            **(result or {}),
        }
        records = [
            {"epoch": e, "lr": 0.1, "seconds": 3.0, "images_per_second": 10.0}
            | {"train_loss": 1.0 / e, "eval_loss": None if e == 1 else 0.5}
            | {"eval_accuracy": accuracy - 2 + e}
            for e in (1, 2)
        ]
        (path / "result.json").write_text(json.dumps(found))
        (path / "config.json").write_text(json.dumps({"config": config}))
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if right is not None:
            labels = np.zeros(len(right), np.int32)
            logits = np.stack([right, 1 - np.asarray(right)], 1).astype(np.float32)
            np.savez(path / "report" / "predictions.npz", logits=logits, labels=labels)
        return path

    return make


def compared(paths, out):
    return compare_runs.compare(paths, out / "page.html")


def test_groups_that_share_seeds_are_paired(make_run, tmp_path):
    a, b = [90.0, 91.0, 90.5], [90.6, 91.5, 91.2]
    runs = [make_run(f"a{i}", i, x) for i, x in enumerate(a)]
    runs += [make_run(f"b{i}", i, x, optim={"name": "sgd"}) for i, x in enumerate(b)]
    runs.append(make_run("b9", 9, 99.0, optim={"name": "sgd"}))
    groups, [found] = compared(runs, tmp_path)
    assert [(g["label"], len(g["runs"])) for g in groups] == [("optim adam", 3), ("optim sgd", 4)]
    assert found["p_value"] == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert found["significant"] and "optim sgd has a higher test accuracy" in found["verdict"]
    assert "the 3 seeds that both have; 1 run without a partner left out" in found["how"]
    page = (tmp_path / "page.html").read_text()
    assert found["verdict"] in page and "NaN" not in page.split('id="data"')[1].split("</script")[0]


def test_groups_without_shared_seeds_are_welchs(make_run, tmp_path):
    a, b = [90.0, 91.0], [90.2, 91.5, 91.2]
    runs = [make_run(f"a{i}", i, x) for i, x in enumerate(a)]
    runs += [make_run(f"b{i}", 10 + i, x, batch_size=64) for i, x in enumerate(b)]
    _, [found] = compared(runs, tmp_path)
    assert found["p_value"] == pytest.approx(stats.ttest_ind(b, a, equal_var=False).pvalue)
    assert not found["significant"] and found["verdict"].startswith("No significant difference")
    assert found["how"] == "Welch's t-test of 3 against 2 runs."


def test_single_runs_are_compared_image_by_image(make_run, tmp_path):
    ours, theirs = np.ones(100, int), np.ones(100, int)
    ours[:2], theirs[2:14] = 0, 0
    runs = make_run("a", 0, 88.0, theirs), make_run("b", 0, 98.0, ours, batch_size=64)
    _, [found] = compared(runs, tmp_path)
    assert found["p_value"] == pytest.approx(stats.binomtest(12, 14).pvalue)
    assert found["mean"] == pytest.approx(10.0) and found["significant"]
    (runs[0] / "report" / "predictions.npz").unlink()
    _, [found] = compared(runs, tmp_path)
    assert found["p_value"] is None and "is not tested: +10.00 points" in found["verdict"]


def test_replicas_of_one_workdir_are_runs(make_run, tmp_path):
    a = [make_run(f"a{i}", i, x) for i, x in enumerate([90.0, 91.0, 90.5])]
    many = make_run("many", 0, 0.0)
    result, records = (json.loads(s) for s in ((many / "result.json").read_text(), "[]"))
    (many / "result.json").unlink()
    for i, accuracy in enumerate([90.6, 91.5, 91.2]):
        replica = {"seed": i, "fields": {"seed": i, "optim.name": "sgd"}, "status": "done"}
        test = {**result["test"], "accuracy": accuracy}
        result.setdefault("replicas", []).append({**replica, "test": test})
        lines = map(json.loads, (many / "metrics.jsonl").read_text().splitlines())
        records += [{**line, "replica": i} for line in lines]
    (many / "seeds.json").write_text(json.dumps(result))
    (many / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    groups, [found] = compared([*a, many], tmp_path)
    assert [(g["label"], len(g["runs"])) for g in groups] == [("optim adam", 3), ("optim sgd", 3)]
    assert found["p_value"] == pytest.approx(
        stats.ttest_rel([90.6, 91.5, 91.2], [90.0, 91.0, 90.5]).pvalue
    )
    result["replicas"][1]["status"] = "diverged"
    (many / "seeds.json").write_text(json.dumps(result))
    groups, [found] = compared([*a, many], tmp_path)
    assert groups[1]["summary"]["n"] == 2
    assert found["p_value"] == pytest.approx(stats.ttest_rel([90.6, 91.2], [90.0, 90.5]).pvalue)
    assert "1 run without a partner left out; 1 diverged run left out" in found["how"]
    (many / "seeds.json").write_text('{"replicas": [{}]}')
    with pytest.raises(InputError, match="cannot be used"):
        compared([*a, many], tmp_path)


def test_several_groups_are_adjusted(make_run, tmp_path):
    values = {128: [90.0, 91.0, 90.5], 64: [90.6, 91.5, 91.2], 32: [90.1, 91.2, 90.4]}
    runs = [
        make_run(f"{size}-{i}", i, x, batch_size=size)
        for size, group in values.items()
        for i, x in enumerate(group)
    ]
    _, found = compared(runs, tmp_path)
    raw = [stats.ttest_rel(values[size], values[128]).pvalue for size in (64, 32)]
    assert found[0]["p_value"] == pytest.approx(2 * raw[0])
    assert found[1]["p_value"] == pytest.approx(max(raw[1], 2 * raw[0]))
    assert all("adjusted for 2 comparisons (Holm)" in c["how"] for c in found)


def test_the_same_config_and_seed_twice_is_told_apart_by_commit_or_folder(make_run, tmp_path):
    old = make_run("old", 0, 90.0, result={"commit": "f" * 40})
    new, again = make_run("new", 0, 91.0), make_run("again", 0, 91.5)
    groups, _ = compared([old, new], tmp_path)
    assert [g["label"] for g in groups] == ["commit ffffffffff", "commit 0123456789"]
    groups, _ = compared([new, again], tmp_path)
    assert [g["label"] for g in groups] == [f"run {new}", f"run {again}"]


def test_no_two_groups_have_one_name(make_run, tmp_path):
    def labels(name, *settings):
        runs = [make_run(f"{name}{i}", 0, 90.0, **fields) for i, fields in enumerate(settings)]
        return [group["label"] for group in compared(runs, tmp_path)[0]]

    rates = [{"optim": {"b1": b1, "eps": eps}} for b1, eps in ((0.9, 0.1), (0.9, 0.100001))]
    assert labels("a", *rates) == ["eps 0.1", "eps 0.100001"]
    sizes = [
        {"epochs": e, "batch_size": b, "save_every": s}
        for e, b, s in ((9, 8, 1), (9, 8, 2), (9, 7, 1), (5, 8, 1))
    ]
    assert labels("b", *sizes)[:2] == [
        *("epochs 9, batch_size 8, save_every 1", "epochs 9, batch_size 8, save_every 2"),
    ]
    assert labels("c", *sizes[1:])[0] == "epochs 9, batch_size 8 and 1 more"


def test_files_of_results_are_runs(tmp_path):
    paths = sorted((ROOT / "results" / "runs").glob("*.json"))
    # the faithful recipes (a variant's name has a dash); dilated is tested on augmented images
    plain = [p for p in paths if "-" not in p.name and "dilated" not in p.name]
    groups, _ = compared(plain, tmp_path)
    assert {"vgg", "convnet", "mixture"} <= {g["label"] for g in groups}
    assert max(len(g["runs"]) for g in groups) > 1  # the fields that came later count as defaults


def test_what_cannot_be_compared_is_refused(make_run, tmp_path):
    good = make_run("good", 0, 90.0)
    other = {"dataset": {"name": "made up", "sizes": {"test": 100}, "sha256": {"test": "c"}}}
    torn = make_run("torn", 1, 90.0)
    (torn / "metrics.jsonl").write_text('{"epoch": 1')
    strange = make_run("strange", 1, 90.0)
    (strange / "metrics.jsonl").write_text('{"epoch": 1}\n[]\n')
    broken = make_run("broken", 1, 90.0)
    (broken / "report" / "predictions.npz").write_bytes(b"PK not a zip")
    empty = tmp_path / "empty"
    empty.mkdir()
    for paths, sentence in (
        ([good], "at least two"),
        ([good, good], "named twice"),
        ([good, tmp_path / "none"], "no such folder or file"),
        ([good, empty], "holds no run that has ended"),
        ([good, make_run("c", 1, 90.0, result=other)], "tested on different images"),
        ([good, torn], "cannot be read"),
        ([good, strange], "metrics.jsonl lacks"),
        ([good, broken], "cannot be read"),
        ([good, make_run("lost", 1, 9.0, result={"status": "diverged"}, batch_size=1)], "diverged"),
    ):
        with pytest.raises(InputError, match=sentence):
            compared(paths, tmp_path)
    with pytest.raises(InputError, match="is a folder"):
        compare_runs.compare([good, make_run("second", 1, 90.0)], tmp_path)
    command = [sys.executable, "scripts/compare_runs.py", str(good), str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("compare_runs.py: ") and done.stderr.count("\n") == 1


@needs_chromium
@pytest.mark.slow
def test_page_in_a_browser(make_run, tmp_path):
    runs = [make_run(f"a{i}", i, 90.0 + i) for i in range(3)]
    runs += [make_run(f"b{i}", i, 91.0 + i, optim={"name": "sgd"}) for i in range(3)]
    compared(runs, tmp_path)
    script = """
    const paths = [...document.querySelectorAll("[data-chart=accuracy] .plot path")];
    const legend = [...document.querySelectorAll("[data-chart=accuracy] .legend button")];
    const plot = document.querySelector("[data-chart=accuracy] .plot");
    const box = plot.getBoundingClientRect();
    plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right, clientY: box.top }));
    return { paths: paths.length, names: legend.map((b) => b.textContent),
      tip: document.getElementById("tip").textContent };
    """
    found = look(tmp_path / "page.html", tmp_path, script, width=360, dark=True)
    assert found["overflow"] <= 0 and found["paths"] == 8
    assert found["names"] == ["optim adam", "optim sgd"]
    assert found["tip"] == "epoch 2optim adam91 (90 to 92)optim sgd92 (91 to 93)"
