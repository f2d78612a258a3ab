"""The HTML pages: what their templates show, made of numpy arrays and plain values."""

import base64
import collections
import io
import math
import pathlib

import numpy as np
from PIL import Image

from cifar_jax import metrics, workdir

TABLE = 20  # classes of a confusion matrix that is a table; of more it is a picture
FIRST, HELD, EACH = 24, 240, 2  # mistakes: shown at first, held, of each pair of classes at least
FILTERS = 128
POINTS = 1000  # of a curve


def write(path, template, **values):
    """Render a template of templates/ to `path`, whole or not at all."""
    import jinja2  # a run needs it at its end only

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        trim_blocks=True,
    )
    environment.globals |= {"p_value": p_value, "duration": duration}
    environment.filters["loss"] = lambda x: f"{x:.4f}" if _finite(x) else "not finite"
    part = path.with_name(f".{path.name}.part")
    part.write_text(environment.get_template(template).render(**values), encoding="utf-8")
    part.replace(path)


def write_run(
    path,
    *,
    result,
    records,
    class_names,
    confusion,
    logits,
    images,
    labels,
    samples,
    learning_rate,
    config,
    filters=None,
):
    """Write the page of a run.

    `result` and `records` as in result.json and metrics.jsonl; confusion [C, C], logits [N, C],
    images uint8 [N, H, W, 3] and labels [N] of the test split at the best checkpoint; samples as
    samples.sample_images makes them; learning_rate [steps]; config a nested dict; filters
    [H, W, 3, F] of the first convolution.
    """
    eval_name = evaluated(result)
    probabilities = metrics.softmax(logits)
    calibration = metrics.calibration(probabilities, labels)
    predicted = metrics.predictions(logits)
    confusion = np.asarray(confusion).astype(int)
    found = mistakes(images, labels, predicted, probabilities)
    charts = curves(records, learning_rate, steps_per_epoch(result), eval_name) if records else {}
    kernels = filter_pictures(filters) if filters is not None else []
    speeds = [r["images_per_second"] for r in records]
    per_class = list(result["per_class"].values())
    table = len(class_names) <= TABLE
    write(
        path,
        "report.html",
        data={
            "charts": charts,
            "confusion": confusion.tolist(),
            "unclassed": np.bincount(labels[predicted < 0], minlength=len(class_names)).tolist(),
            "first": FIRST,
        },
        charts_of=charts,
        result=result,
        records=records,
        config=workdir.flatten(config).items(),
        eval_name=eval_name,
        smoothing=config["loss"]["label_smoothing"],
        accuracy_interval=metrics.wilson(
            result["test"]["accuracy"], result["dataset"]["sizes"]["test"]
        ),
        speed=float(np.median(speeds)) if speeds else None,
        duration=duration(result["seconds"]["total"]),
        classes=classes(result["per_class"], confusion),
        mean_accuracy=float(np.mean(per_class)),
        confusion=confusion_cells(confusion, class_names) if table else None,
        matrix=None if table else confusion_picture(confusion),
        confused=most_confused(confusion, class_names),
        calibration=calibration,
        reliability=reliability(calibration),
        mistakes=found,
        wrong=int((predicted != labels).sum()),
        samples=[
            {"name": name, "src": picture(strip(row))}
            for name, row in zip(class_names[:TABLE], samples["by_class"][:TABLE], strict=True)
        ],
        augmented=[
            {"name": name, "original": picture(row[0]), "src": picture(strip(row[1:]))}
            for name, row in zip(samples["augmented_names"], samples["augmented"], strict=True)
        ],
        filters=kernels,
        filter_count=0 if filters is None else filters.shape[-1],
        filter_shape="" if filters is None else f"{filters.shape[0]} x {filters.shape[1]}",
    )


def steps_per_epoch(result):
    """Of a run, from its result.json."""
    return result["steps"] / result["epochs"] if result["epochs"] else 1


def evaluated(result):
    """The split that every epoch is evaluated on."""
    return "validation" if "validation" in result["dataset"]["sizes"] else "test"


def series(name, color, x, y, seconds=None, **more):
    """One line of a chart (see charts.js): `color` 0 to 5, `seconds` of each point's epoch."""
    line = {"name": name, "color": color, "x": _short(x), "y": _short(y), **more}
    if seconds is not None:
        line["t"] = _short(np.cumsum(seconds) / 60.0)
    return line


def chart(title, unit, lines, **more):
    """A chart of such lines; log=True offers a log scale, zero=True begins at zero."""
    return {"title": title, "unit": unit, "label": f"{title} by epoch", "series": lines, **more}


def curves(records, learning_rate, steps_per_epoch, eval_name):
    """{name: chart} of loss, accuracy, learning rate [steps] and throughput of a run."""

    def line(name, color, key, **more):
        of = {name: [r[name] for r in records] for name in ("epoch", key, "seconds")}
        return series(name, color, of["epoch"], of[key], of["seconds"], **more)

    rate = np.asarray(learning_rate, float)
    kept = np.unique(np.linspace(0, len(rate) - 1, min(len(rate), POINTS)).round().astype(int))
    return {
        "loss": chart(
            "Loss",
            "cross-entropy, nats",
            [line("train", 0, "train_loss"), line(eval_name, 1, "eval_loss")],
            log=True,
        ),
        "accuracy": chart(
            "Accuracy",
            "%",
            [
                line("train", 0, "train_accuracy"),
                line(eval_name, 1, "eval_accuracy"),
                line(f"{eval_name} top-3", 2, "eval_top3", dash=1),
                line(f"{eval_name} top-5", 3, "eval_top5", dash=2),
            ],
            top=100,
        ),
        "rate": chart(
            "Learning rate",
            "every step",
            [series("learning rate", 2, kept / steps_per_epoch, rate[kept])],
            log=True,
            zero=True,
        ),
        "speed": chart(
            "Throughput",
            "images/s in training",
            [line("images/s", 0, "images_per_second")],
            zero=True,
        ),
    }


def classes(per_class, confusion):
    """Accuracy and precision of each class in percent (None where it was never called)."""
    right, called = confusion.diagonal(), confusion.sum(0)
    return [
        {
            "name": name,
            "accuracy": accuracy,
            "precision": 100.0 * right[i] / called[i] if called[i] else None,
        }
        for i, (name, accuracy) in enumerate(per_class.items())
    ]


def shades(confusion):
    """How dark a cell is, 0 to 1: right ones by their share of the class, mistakes by count."""
    wrong = confusion * (1 - np.eye(len(confusion), dtype=int))
    shade = np.sqrt(wrong / max(wrong.max(), 1))
    np.fill_diagonal(shade, confusion.diagonal() / np.maximum(confusion.sum(1), 1))
    return shade


def confusion_cells(confusion, class_names):
    """Rows of what the template needs of each cell."""
    shade = shades(confusion)
    return [
        [
            {
                "count": int(count),
                "right": i == j,
                "shade": f"{shade[i, j]:.2f}",
                "pair": f"{i} {j}",
                "tip": f"{class_names[i]} called {class_names[j]}: {count:,} of {row.sum():,}",
            }
            for j, count in enumerate(row)
        ]
        for i, row in enumerate(confusion)
    ]


def confusion_picture(confusion):
    """A pixel a cell, clear where it is empty, so that it suits a light and a dark page."""
    canvas = np.empty((*confusion.shape, 4), np.uint8)
    canvas[..., :3] = (214, 92, 20)
    canvas[np.arange(len(confusion)), np.arange(len(confusion)), :3] = (40, 124, 200)
    canvas[..., 3] = np.round(255 * shades(confusion))
    return picture(canvas)


def most_confused(confusion, class_names, count=6):
    """The pairs of classes with the most mistakes."""
    wrong = confusion * (1 - np.eye(len(confusion), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(place), len(confusion)) for place in order]
    return [
        {
            "true": class_names[i],
            "predicted": class_names[j],
            "count": int(wrong[i, j]),
            "share": 100.0 * wrong[i, j] / confusion[i].sum(),
        }
        for i, j in pairs
        if wrong[i, j]
    ]


def reliability(calibration):
    """Bars in percent of the diagram's box, of the bins that hold an image."""
    bins = calibration["bins"]
    top = max((b["count"] for b in bins), default=0)
    return [
        {
            "left": round(b["low"], 3),
            "width": round(b["high"] - b["low"], 3),
            "accuracy": round(b["accuracy"], 2),
            "gap_bottom": round(min(b["accuracy"], b["confidence"]), 2),
            "gap": round(abs(b["accuracy"] - b["confidence"]), 2),
            "height": round(100.0 * b["count"] / top, 2),
            "few": b["count"] < 10,
            "tip": f"confidence {b['low']:.0f} to {b['high']:.0f} %: {b['count']:,} images, "
            f"{b['accuracy']:.1f} % right, mean confidence {b['confidence']:.1f} %",
        }
        for b in bins
        if b["count"]
    ]


def surest_mistakes(labels, predicted, probabilities):
    """The indices of the wrong images, first those of whose class the network was surest, last
    those without a prediction; `predicted` as metrics.predictions gives it."""
    confidence = np.nan_to_num(probabilities[np.arange(len(labels)), predicted], nan=-1.0)
    wrong = np.flatnonzero(predicted != labels)
    return wrong[np.argsort(-confidence[wrong], kind="stable")]


def mistakes(images, labels, predictions, probabilities):
    """What the page shows of the surest mistakes: the first FIRST, then EACH of every pair of
    classes, HELD in all."""
    found, held = [], collections.Counter()
    for i in surest_mistakes(labels, predictions, probabilities):
        true, predicted = int(labels[i]), int(predictions[i])
        held[true, predicted] += 1
        if len(found) >= FIRST and held[true, predicted] > EACH:
            continue
        found.append(
            {
                "index": int(i),
                "true": true,
                "predicted": predicted,
                "confidence": percent(probabilities[i, predicted]),
                "src": picture(images[i]),
            }
        )
        if len(found) == HELD:
            break
    return found


def filter_pictures(kernel):
    """Pictures of a convolution's kernel [H, W, 3, filters], mid-grey where it is zero."""
    kernel = np.nan_to_num(np.asarray(kernel, np.float32))
    scale = max(float(np.quantile(np.abs(kernel), 0.995)), 1e-12)
    shown = np.clip(127.5 + 127.5 * kernel / scale, 0, 255).round().astype(np.uint8)
    norms = np.sqrt((kernel**2).sum((0, 1, 2)))
    return [
        {"src": picture(shown[..., i]), "tip": f"filter {i + 1}, norm {norms[i]:.3g}"}
        for i in range(min(kernel.shape[-1], FILTERS))
    ]


def strip(images, gap=2):
    """Images [N, H, W, 3] uint8 beside each other, [H, N * (W + gap) - gap, 4], clear between."""
    n, height, width, _ = images.shape
    canvas = np.zeros((height, n, width + gap, 4), np.uint8)
    canvas[:, :, :width, :3] = images.transpose(1, 0, 2, 3)
    canvas[:, :, :width, 3] = 255
    return canvas.reshape(height, -1, 4)[:, :-gap]


def picture(image):
    """A data URI of a uint8 image [H, W, 3] or [H, W, 4]."""
    return data_uri(png(image))


def png(image):
    """The bytes of a PNG file of a uint8 image [H, W, 3] or [H, W, 4]."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "png")
    return buffer.getvalue()


def data_uri(data):
    """The bytes of a PNG file as the address of a picture."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def percent(share):
    """A share of 1 in percent; what rounds to 100 but is less says so."""
    text = f"{100.0 * share:.1f}"
    if np.isnan(share):
        return "(NaN)"
    return ("> 99.9" if text == "100.0" and share < 1 else text) + "\N{NO-BREAK SPACE}%"


def p_value(p):
    """A p-value in words; never 0."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}" if p < 0.1 else f"= {p:.2f}"


def axis(lanes, zero=False):
    """Groups on a common axis in percent of its width: {'ticks', 'zero', 'lanes'}.

    A lane is {label, color, dots, mean, interval (or None)}. Where intervals are far wider than
    what was measured, they run out of the picture.
    """
    values = [v for lane in lanes for v in (*lane["dots"], lane["mean"])] + [0.0] * zero
    if not lanes:
        return None
    ends = [v for lane in lanes if lane["interval"] for v in lane["interval"]]
    spread = max(max(values) - min(values), 0.1)
    low = max(min([*values, *ends]), min(values) - 2 * spread)
    high = min(max([*values, *ends]), max(values) + 2 * spread)
    low, high = low - 0.06 * (high - low) - 1e-3, high + 0.06 * (high - low) + 1e-3
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(m for m in (5, 2, 1, 0.5) if (high - low) / (m * step) >= 2 or m == 0.5)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))

    def place(value):
        return round(min(100.0, max(0.0, 100.0 * (value - low) / (high - low))), 2)

    ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return {
        "ticks": [{"at": place(t), "text": f"{t + 0.0:.{digits}f}"} for t in ticks],
        "zero": place(0.0) if zero else None,
        "lanes": [
            {
                "label": lane["label"],
                "color": lane["color"],
                "dots": [{"at": place(v), "tip": f"{v:.2f}"} for v in lane["dots"]],
                "mean": place(lane["mean"]),
                "span": [place(v) for v in lane["interval"]] if lane["interval"] else None,
                "tip": f"mean {lane['mean']:.2f}"
                + (
                    ", 95 % interval {:.2f} to {:.2f}".format(*lane["interval"])
                    if lane["interval"]
                    else ""
                ),
            }
            for lane in lanes
        ],
    }


def duration(seconds):
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _finite(value):
    return value is not None and math.isfinite(value)


def _short(values):
    """Numbers with six digits, for JSON; None where one is not finite."""
    return [float(f"{x:.6g}") if _finite(x) else None for x in values]
