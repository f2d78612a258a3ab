"""The pictures and the page from made-up numbers."""

import json
import re

import numpy as np
import pytest
from browser import look, needs_chromium

from cifar_jax import report

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def run(rng):
    n = 60
    labels = np.arange(n) % 10
    logits = rng.normal(size=(n, 10)).astype(np.float32)
    logits[np.arange(0, n, 2), labels[::2]] += 9.0
    predicted = logits.argmax(1)
    confusion = np.zeros((10, 10))
    np.add.at(confusion, (labels, predicted), 1)
    figures = {"eval_loss": 0.61, "accuracy": 55.0, "top3": 80.0, "top5": 92.5}
    records = [
        {
            "epoch": e,
            "step": 4 * e,
            "lr": 0.1 / e,
            "train_loss": 2.0 / e,
            "train_accuracy": 20.0 * e,
        }
        | {"eval_loss": 2.1 / e, "eval_accuracy": 19.0 * e, "eval_top3": 50.0, "eval_top5": 70.0}
        | {"images_per_second": 1234.5, "seconds": 3.0}
        for e in (1, 2, 3)
    ]
    records[1]["eval_loss"] = None  # a loss that was not finite
    result = {
        "status": "done",
        "model": "resnet",
        "params": 1234567,
        "dataset": {
            "name": "<b>made up</b>",
            "sizes": {"train": 16, "test": n},
            "sha256": {"train": "a", "test": "b"},
        },
        "seed": 3,
        "epochs": 3.0,
        "epochs_planned": 3,
        "steps": 12,
        "best": {"epoch": 3, **figures},
        "last": {"epoch": 3, **figures},
        "test": {**figures, "augmented": False},
        "per_class": {name: 50.0 + i for i, name in enumerate(NAMES)},
        "seconds": {"compile": 1.0, "train": 2.0, "eval": 3.0, "total": 6.0},
        "device": "1 x cpu",
        "versions": {"jax": "0.10.2"},
        "commit": None,
    }
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return {
        "result": result,
        "records": records,
        "class_names": NAMES,
        "confusion": confusion,
        "logits": logits,
        "images": images,
        "labels": labels,
        "samples": {
            "by_class": images[:50].reshape(10, 5, 32, 32, 3),
            "augmented": images[:40].reshape(8, 5, 32, 32, 3),
            "augmented_names": NAMES[:8],
        },
        "learning_rate": np.linspace(0.1, 0.0, 12),
        "config": {"seed": 3, "model": {"name": "resnet"}, "loss": {"label_smoothing": 0.1}},
        "filters": rng.normal(size=(3, 3, 3, 5)),
    }


def page_data(path):
    """The numbers that the page's script draws."""
    text = re.search(r'id="data">(.*?)</script>', path.read_text(), re.S).group(1)
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


def test_page_holds_all_pictures_and_numbers(run, tmp_path):
    report.write_report(tmp_path, **run)
    page = (tmp_path / "index.html").read_text()
    pictures = {p.stem for p in tmp_path.glob("*.png")}
    assert pictures == {"curves", "per_class", "confusion", "mistakes", "samples", "augmented"}
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # self-contained
    for text in (
        "55.00 %",
        "80.00 %",
        "92.50 %",
        "0.6100",
        "1,234,567",
        "not finite",
        "model.name",
        "not a git checkout",
        "5 kernels of 3 x 3 pixels",
        "label smoothing of 0.1, the test loss does not",
        "of epoch 3, whose test loss was lowest.\n",
    ):
        assert text in page, text
    assert "<b>made up</b>" not in page  # escaped
    assert not list(tmp_path.glob(".*"))
    charts = page_data(tmp_path / "index.html")["charts"]
    assert {*charts} == {"loss", "accuracy", "rate", "speed"}
    train, test = charts["loss"]["series"]
    assert train["y"] == [2.0, 1.0, 0.666667] and test["y"] == [2.1, None, 0.7]
    assert test["x"] == [1, 2, 3] and test["t"] == [0.05, 0.1, 0.15]
    assert charts["rate"]["series"][0]["y"][:2] == [0.1, 0.0909091]


def test_predictions_are_kept_for_comparisons(run, tmp_path):
    report.write_report(tmp_path, **run)
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["logits"], run["logits"])
        np.testing.assert_array_equal(kept["labels"], run["labels"])


def test_outputs_that_are_not_finite_do_no_harm(run, tmp_path):
    run["logits"][3] = np.nan
    run["logits"][4, 1] = np.inf
    run["filters"][0, 0, 0, 0] = np.nan
    report.write_report(tmp_path, **run)
    page = (tmp_path / "index.html").read_text()
    assert "(NaN)" in page and "left out, outputs not finite</td><td>2</td>" in page
    assert "no class<br>(NaN)" in page
    [unclassed] = re.findall(r'"unclassed": (\[.*?\])', page)
    assert sum(json.loads(unclassed)) == 2


def test_a_checkpoint_chosen_on_the_test_images_says_so(run, tmp_path):
    run["result"]["best"] = {**run["result"]["best"], "epoch": 2}
    run["result"]["last"] = {**run["result"]["last"], "accuracy": 54.25}
    report.write_report(tmp_path, **run)
    page = (tmp_path / "index.html").read_text()
    assert "chosen on these same images; top-1 after the last epoch is 54.25 %.\n" in page


def test_one_epoch(run, tmp_path):
    run["records"] = run["records"][:1]
    run["result"] |= {"epochs": 1, "epochs_planned": 3, "steps": 4, "status": "stopped"}
    run["learning_rate"] = run["learning_rate"][:4]
    report.write_report(tmp_path, **run)
    assert page_data(tmp_path / "index.html")["charts"]["loss"]["series"][1]["y"] == [2.1]


def test_a_hundred_classes(run, rng, tmp_path):
    names = [f"class {i}" for i in range(100)]
    labels = np.arange(400) % 100
    logits = rng.normal(size=(400, 100)).astype(np.float32)
    confusion = np.zeros((100, 100))
    np.add.at(confusion, (labels, logits.argmax(1)), 1)
    images = rng.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    run |= {"class_names": names, "labels": labels, "logits": logits, "confusion": confusion}
    run["images"] = images
    run["samples"] |= {"by_class": images[:200].reshape(100, 2, 32, 32, 3)}
    run["result"] |= {"per_class": dict.fromkeys(names, 1.0)}
    run["result"]["dataset"]["sizes"]["test"] = 400
    report.write_report(tmp_path, **run)
    page = (tmp_path / "index.html").read_text()
    assert 'data-pair="' not in page and "the first 20 of 100" in page
    assert page.count("<figure data-t=") == 240
    assert len(page) < 2e6


def test_a_run_without_an_epoch_and_without_mistakes(run, tmp_path):
    run["records"] = []
    run["result"]["best"] = None
    run["logits"] = 10.0 * np.eye(10)[run["labels"]]
    report.write_report(tmp_path, **run)
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "mistakes.png").exists()
    page = (tmp_path / "index.html").read_text()
    assert "data-chart=" not in page and 'id="epochs"' not in page
    assert "All 60 test images are right" in page


def test_mistakes_are_the_most_confident_ones(run):
    figure = report.draw_mistakes(run["images"], run["labels"], run["logits"], NAMES)
    titles = [text.get_text() for text in figure.axes[0].texts]
    shares = [float(re.search(r"([\d.]+)\s%", title).group(1)) for title in titles]
    assert shares == sorted(shares, reverse=True)
    wrong = (run["logits"].argmax(1) != run["labels"]).sum()
    assert len(titles) == min(24, wrong)
    for title in titles:
        true, taken = re.match(r"(\w+)\ntaken for (\w+)", title).groups()
        assert true != taken


def test_bars_and_matrix_show_the_numbers(run):
    values = {**run["result"]["per_class"], "one more": 0.5}  # no room within its bar
    texts = [t for t in report.draw_per_class(values).axes[0].texts if t.get_text()]
    assert [t.get_text() for t in texts] == [*(f"{50 + i:.1f}" for i in range(10)), "0.5"]
    assert [t.get_text() for t in texts if t.get_color() != "white"] == ["0.5"]
    matrix = report.draw_confusion(run["confusion"], NAMES).axes[0]
    assert [int(t.get_text()) for t in matrix.texts] == run["confusion"].astype(
        int
    ).ravel().tolist()


LOOK = """
const every = (selector) => [...document.querySelectorAll(selector)];
const texts = (selector) => every(selector).map((node) => node.textContent);
const drawn = every("[data-chart] .plot path").map((path) => path.getAttribute("d"));
document.querySelector("button.log").click();
const log = document.querySelector("[data-chart=loss] .plot path").getAttribute("d");
const plot = document.querySelector("[data-chart=loss] .plot"), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 15, clientY: box.top }));
const tip = document.getElementById("tip").textContent;
document.querySelector("[data-clock=time]").click();
const shown = () => every(".gallery figure:not([hidden])").length;
const first = shown();
document.querySelector("td.c1[style*='1.00']").click();
const choice = [document.getElementById("true").value, document.getElementById("predicted").value];
const seen = every("img").filter((image) => image.naturalWidth > 0).length;
return { drawn, log, tip, first, chosen: shown(), choice, seen,
  images: every("img").length, told: texts("#told")[0],
  clock: texts("[data-chart=loss] text").at(-1) };
"""


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width,dark", [(1280, False), (360, True)], ids=["desk", "phone"])
def test_page_in_a_browser(run, tmp_path, width, dark):
    """Curves are drawn, controls work, nothing sticks out, no word in the console."""
    report.write_report(tmp_path / "report", **run)
    found = look(tmp_path / "report" / "index.html", tmp_path, LOOK, width, dark)
    assert "error" not in found, found
    assert found["width"] == width and found["overflow"] <= 0
    assert found["paper"] == ("rgb(16, 19, 23)" if dark else "rgb(255, 255, 255)")
    assert len(found["drawn"]) == 8 and all(found["drawn"])
    assert found["drawn"][1].count("M") == 2  # a gap where the loss was not finite
    assert found["log"] and found["log"] != found["drawn"][0]
    assert found["tip"] == "epoch 3train0.6667test0.7"
    assert found["clock"] == "minutes"
    wrong = int((run["logits"].argmax(1) != run["labels"]).sum())
    assert found["first"] == min(24, wrong)
    true, predicted = map(int, found["choice"])
    count = int(run["confusion"][true, predicted])
    assert true != predicted and found["chosen"] == count > 0
    assert found["told"] == f"{count} of {count} shown"
    assert found["seen"] == found["images"] > 20
