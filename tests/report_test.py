"""The pictures and the page from made-up numbers."""

import re

import numpy as np
import pytest

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
        "config": {"seed": 3, "model": {"name": "resnet"}},
    }


def test_page_holds_all_pictures_and_numbers(run, tmp_path):
    report.write_report(tmp_path, **run)
    page = (tmp_path / "index.html").read_text()
    pictures = {p.stem for p in tmp_path.glob("*.png")}
    assert pictures == {"curves", "per_class", "confusion", "mistakes", "samples", "augmented"}
    assert page.count("data:image/png;base64,") == 6
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # self-contained
    for text in (
        "55.00 %",
        "80.00 %",
        "92.50 %",
        "0.6100",
        "1,234,567",
        "not finite",
        "model.name",
        "not a git checkout",
    ):
        assert text in page, text
    assert "<b>made up</b>" not in page  # escaped
    assert not list(tmp_path.glob(".*"))


def test_a_run_without_an_epoch_and_without_mistakes(run, tmp_path):
    run["records"] = []
    run["result"]["best"] = None
    run["logits"] = 10.0 * np.eye(10)[run["labels"]]
    report.write_report(tmp_path, **run)
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "mistakes.png").exists()


def test_mistakes_are_the_most_confident_ones(run):
    figure = report.draw_mistakes(run["images"], run["labels"], run["logits"], NAMES)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    shares = [int(re.search(r"(\d+) %", title).group(1)) for title in titles]
    assert shares == sorted(shares, reverse=True)
    wrong = (run["logits"].argmax(1) != run["labels"]).sum()
    assert len(titles) == min(24, wrong)
    for title in titles:
        true, taken = re.match(r"(\w+)\ntaken for (\w+)", title).groups()
        assert true != taken


def test_bars_and_matrix_show_the_numbers(run):
    texts = [t.get_text() for t in report.draw_per_class(run["result"]["per_class"]).axes[0].texts]
    assert texts == [f"{50 + i:.1f}" for i in range(10)]
    matrix = report.draw_confusion(run["confusion"], NAMES).axes[0]
    assert [int(t.get_text()) for t in matrix.texts] == run["confusion"].astype(
        int
    ).ravel().tolist()
