"""Pictures and the page of a run, from numpy arrays. The only file that says matplotlib."""

import functools
import io
import pathlib

import numpy as np

from cifar_jax import metrics, page

TRAIN_COLOR, EVAL_COLOR, ACCENT = "#4c78a8", "#e4572e", "#2f6f4f"
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "savefig.dpi": 120,
    "svg.hashsalt": "cifar_jax",  # the same figure is the same file
}
MANY = 20  # classes: of more, figures say less


@functools.cache
def _matplotlib():
    """matplotlib in our style, loaded when the first picture is drawn: training starts without."""
    import matplotlib
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import matplotlib.ticker

    matplotlib.rcParams.update(STYLE)
    return matplotlib


def _figure(width, height):
    matplotlib = _matplotlib()
    figure = matplotlib.figure.Figure((width, height), layout="constrained", facecolor="white")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def _whole_numbers(axes):
    axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(integer=True))


def draw_curves(records, learning_rate, steps_per_epoch, eval_name="test", smoothing=0.0):
    """Loss, accuracy, learning_rate [steps] against the epoch; `records` as in metrics.jsonl.

    `smoothing`: of the labels, which the training loss includes and the other does not.
    """
    figure = _figure(10, 3.2)
    left, middle, right = figure.subplots(1, 3)
    epochs = [r["epoch"] for r in records]
    marker = {"marker": "o", "markersize": 3} if len(records) <= 30 else {}
    for axes, key, label in (
        (left, "loss", "cross-entropy (nats)"),
        (middle, "accuracy", "accuracy (%)"),
    ):
        axes.plot(
            epochs,
            [_number(r[f"train_{key}"]) for r in records],
            color=TRAIN_COLOR,
            label=f"train, labels smoothed by {smoothing:g}"
            if smoothing and key == "loss"
            else "train",
            **marker,
        )
        axes.plot(
            epochs,
            [_number(r[f"eval_{key}"]) for r in records],
            color=EVAL_COLOR,
            label=eval_name,
            **marker,
        )
        axes.set(xlabel="epoch", ylabel=label, title=key.capitalize())
        _whole_numbers(axes)
        axes.legend()
    right.plot(np.arange(len(learning_rate)) / steps_per_epoch, learning_rate, color=ACCENT)
    right.set(xlabel="epoch", ylabel="learning rate", title="Learning rate", ylim=(0, None))
    return figure


def draw_beside_original(systems):
    """Test accuracy (percent) by epoch, a panel a system; `systems` {name: {recipe: curves}}, a
    curve [(epoch, accuracy)], under "original" one alone, the original's logged points."""
    looks = {
        "original": ("original's log", {"color": "#8a8a8a", "linestyle": ":", "linewidth": 1}),
        "": (
            "its recipe, here (a line a seed)",
            {"color": TRAIN_COLOR, "markerfacecolor": "white"},
        ),
        "tuned": (":tuned, here", {"color": EVAL_COLOR}),
        "short": (":short, here", {"color": ACCENT}),
    }
    figure = _figure(12, 3.3)
    panels = figure.subplots(1, len(systems), sharey=True)
    handles = {}
    for axes, (name, curves) in zip(panels, systems.items(), strict=True):
        for recipe, found in curves.items():
            label, look = looks[recipe]
            for curve in filter(None, [found] if recipe == "original" else found):
                size = 3 if len(curve) > 1 else 5
                (handles[label],) = axes.plot(
                    *zip(*curve, strict=True), marker="o", markersize=size, **look
                )
        axes.set(xscale="log", xlabel="epoch (log scale)", title=name)
        axes.xaxis.set_major_formatter(_matplotlib().ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(_matplotlib().ticker.NullFormatter())
    panels[0].set_ylabel("test accuracy (%)")
    shown = [label for label, _ in looks.values() if label in handles]
    handles = [handles[label] for label in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=len(looks))
    return figure


def draw_lr_find(lr, loss, smoothed, suggestions, range):
    """Loss against the learning rate of a range test, the suggestions {name: rate} marked."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    axes.plot(lr, loss, color=TRAIN_COLOR, alpha=0.3, label="each step")
    axes.plot(lr, smoothed, color=TRAIN_COLOR, label="smoothed")
    for (name, rate), color, dash in zip(
        suggestions.items(), (EVAL_COLOR, ACCENT), ("--", ":"), strict=True
    ):
        if rate is not None:
            place = np.searchsorted(lr, rate)
            axes.axvline(rate, color=color, linestyle=dash, label=f"{name} {rate:.3g}")
            axes.plot(rate, smoothed[place], "o", color=color, markersize=5)
    low = min(smoothed, default=0.0)
    span = max(smoothed[: max(1, len(smoothed) // 2)], default=1.0) - low
    scale = "log" if range == "exponential" else "linear"
    axes.set(xscale=scale, xlabel="learning rate", ylabel="cross-entropy (nats)")
    if span > 0:
        axes.set_ylim(low - 0.15 * span, low + 1.5 * span)
    axes.set_title("Learning-rate range test")
    axes.legend()
    return figure


def draw_search(trials, ranges, measure):
    """`measure` (percent) of each of `trials` against the hyper-parameters of `ranges` {name: (low,
    high)}, one by one, and against both if they are two; the best is ringed."""
    best = trials[int(np.argmax([trial[measure] for trial in trials]))]
    values, told = [t[measure] for t in trials], f"{measure.replace('_', ' ')} (%)"
    pairs = [(name, measure) for name in ranges] + ([(*ranges,)] if len(ranges) == 2 else [])
    figure = _figure(4.2 * len(pairs), 3.6)
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, (x, y) in zip(panels, pairs, strict=True):
        color = {"color": TRAIN_COLOR} if y == measure else {"c": values, "cmap": "viridis"}
        points = axes.scatter([t[x] for t in trials], [t[y] for t in trials], s=24, **color)
        axes.scatter([best[x]], [best[y]], facecolor="none", edgecolor=EVAL_COLOR, s=110)
        _log_axis(axes, "x", x, ranges[x])
        if y == measure:
            axes.set(ylabel=told)
        else:
            _log_axis(axes, "y", y, ranges[y])
            figure.colorbar(points, ax=axes, label=told)
    figure.suptitle(f"{len(trials)} proposals (ringed: the best)", fontweight="bold")
    return figure


def _log_axis(axes, which, name, limits):
    """A log scale over `limits`, with names at the decades where it spans one."""
    low, high = limits
    axes.set(**{f"{which}scale": "log", f"{which}label": name.replace("_", " ")})
    axes.set(**{f"{which}lim": (low / 1.2, high * 1.2)})
    if high >= 10 * low:
        axis = getattr(axes, f"{which}axis")
        axis.set_minor_formatter(_matplotlib().ticker.NullFormatter())


def draw_per_class(per_class):
    """A bar for each class with its accuracy in percent; the dashed line is their mean."""
    names, values = list(per_class), list(per_class.values())
    figure = _figure(_class_width(names), 3.4)
    axes = figure.subplots()
    bars = axes.bar(names, values, color=TRAIN_COLOR, width=0.72)
    if len(names) <= MANY:
        inside = [f"{value:.1f}" if value > 8 else "" for value in values]  # where there is room
        above = ["" if text else f"{v:.1f}" for text, v in zip(inside, values, strict=True)]
        axes.bar_label(bars, inside, label_type="center", color="white", fontsize=9)
        axes.bar_label(bars, above, padding=2, fontsize=9)
    mean = float(np.mean(values))
    axes.axhline(mean, color=EVAL_COLOR, linestyle="--", linewidth=1.2)
    axes.set(ylabel="accuracy (%)", ylim=(0, 102), yticks=range(0, 101, 20))
    axes.set_title(f"Accuracy by class, test images (dashed: mean, {mean:.2f} %)")
    axes.grid(axis="x", visible=False)
    _name_classes(axes, names)
    return figure


def draw_confusion(confusion, class_names):
    """Counts of true (rows) by predicted (columns) classes; mistakes have a colour scale."""
    few = len(class_names) <= MANY
    figure = _figure(*((6.6, 5.8) if few else (12, 10.8)))
    axes = figure.subplots()
    confusion = np.asarray(confusion)
    mistakes = confusion * (1 - np.eye(len(confusion)))
    top = max(1.0, mistakes.max())
    image = axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=top)
    for i, row in enumerate(confusion if few else ()):
        for j, value in enumerate(row):
            axes.text(
                j,
                i,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if mistakes[i, j] > 0.6 * top else "#222222",
                fontweight="bold" if i == j else "normal",
            )
    _name_classes(axes, class_names)
    axes.set_yticks(range(len(class_names)), _plain(class_names), fontsize=None if few else 5)
    axes.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix, test images")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="images confused", shrink=0.8)
    return figure


def draw_mistakes(images, labels, logits, class_names, rows=4, columns=6):
    """The images of whose wrong class the model was most certain, with both names."""
    probabilities = metrics.softmax(logits)
    names = _plain([n if len(n) <= 17 else f"{n[:16]}\N{HORIZONTAL ELLIPSIS}" for n in class_names])
    predictions = metrics.predictions(logits)
    found = page.surest_mistakes(labels, predictions, probabilities)
    rows = min(rows, max(1, -(-len(found) // columns)))
    figure = _figure(10, 0.5 + 2.0 * rows)
    axes = figure.subplots()
    height, width = images.shape[1:3]
    down, right = round(1.56 * height), round(1.3 * width)  # from one image to the next
    canvas = np.full((rows * down, columns * right, 3), 255, np.uint8)
    for place, i in enumerate(found[: rows * columns]):
        y, x = place // columns * down, place % columns * right
        canvas[y : y + height, x : x + width] = images[i]
        predicted = predictions[i]
        told = f"taken for {names[predicted]}\n{page.percent(probabilities[i, predicted])}"
        told = f"{names[labels[i]]}\n{told if predicted >= 0 else 'not finite'}"
        axes.text(x + width / 2, y - 1.5, told, ha="center", va="bottom", fontsize=8)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xlim(-0.15 * width, columns * right - 0.15 * width)
    axes.set_ylim(rows * down - 0.54 * height, -0.54 * height)  # room for the first row's names
    axes.set_axis_off()
    axes.set_title(
        f"{len(found):,} of {len(labels):,} test images are wrong; the most confident mistakes"
        if len(found)
        else f"All {len(labels):,} test images are right"
    )
    return figure


def draw_grid(grid, row_names, title, column_names=None, scale=0.62):
    """Images [rows, columns, H, W, 3] uint8 as a grid with a name beside each row."""
    rows, columns, height, width, _ = grid.shape
    gap = 2
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i in range(rows):
        for j in range(columns):
            y, x = i * (height + gap), j * (width + gap)
            canvas[y : y + height, x : x + width] = grid[i, j]
    figure = _figure(1.6 + scale * columns, 0.7 + scale * rows)
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks([i * (height + gap) + height / 2 for i in range(rows)], _plain(row_names))
    if column_names:
        axes.xaxis.tick_top()
        axes.set_xticks([j * (width + gap) + width / 2 for j in range(columns)], column_names)
    else:
        axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    return figure


def draw_counts(counts, class_names):
    """Images of each class in each split: counts {split: [C]}."""
    figure = _figure(_class_width(class_names), 3.2)
    axes = figure.subplots()
    width = 0.8 / len(counts)
    for k, (split, values) in enumerate(counts.items()):
        places = np.arange(len(class_names)) + (k - (len(counts) - 1) / 2) * width
        bars = axes.bar(
            places, values, width * 0.92, label=split, color=(TRAIN_COLOR, EVAL_COLOR, ACCENT)[k]
        )
        if len(class_names) <= MANY:
            axes.bar_label(bars, fontsize=7, padding=1, fmt="%d")
    _name_classes(axes, class_names)
    axes.set(ylabel="images", title="Images by class")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_samples(samples, class_names):
    """{name: figure} of the sample grid (a row a class) and the augmented (original first)."""
    augmented = samples["augmented"]
    columns = ["original", *[""] * (augmented.shape[1] - 1)]
    names = samples["augmented_names"]

    def of(names):
        few = len(names) < len(class_names)
        return f", the first {len(names)} of {len(class_names)} classes" if few else ""

    grid = draw_grid(
        samples["by_class"][:MANY], class_names[:MANY], f"Training images{of(class_names[:MANY])}"
    )
    title = f"Training images under the augmentation{of(names)}"
    return {"samples": grid, "augmented": draw_grid(augmented, names, title, columns)}


def render(figures):
    """{name: PNG bytes} of {name: figure}."""
    return {name: _png(figure) for name, figure in figures.items()}


def save(figures, folder):
    """Write {name: figure} as folder/NAME.png; returns {name: PNG bytes}."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = render(figures)
    for name, picture in pictures.items():
        part = folder / f".{name}.png.part"
        part.write_bytes(picture)
        part.replace(folder / f"{name}.png")
    return pictures


def write_report(folder, **run):
    """Draw a run: folder/*.png, folder/index.html, which holds all that it shows, and
    folder/predictions.npz with `logits` and `labels`, by which runs are compared.

    `run`: what page.write_run takes. Returns {name: PNG bytes}.
    """
    folder = pathlib.Path(folder)
    result, records, class_names = run["result"], run["records"], run["class_names"]
    logits, labels = run["logits"], run["labels"]
    figures = {
        "per_class": draw_per_class(result["per_class"]),
        "confusion": draw_confusion(run["confusion"], class_names),
        "mistakes": draw_mistakes(run["images"], labels, logits, class_names),
        **draw_samples(run["samples"], class_names),
    }
    if records:
        each, eval_name = page.steps_per_epoch(result), page.evaluated(result)
        smoothing = run["config"]["loss"]["label_smoothing"]
        figures["curves"] = draw_curves(records, run["learning_rate"], each, eval_name, smoothing)
    pictures = save(figures, folder)
    part = folder / ".predictions.npz.part"
    with open(part, "wb") as file:
        np.savez(file, logits=np.asarray(logits, np.float32), labels=np.asarray(labels, np.int32))
    part.replace(folder / "predictions.npz")
    page.write_run(folder / "index.html", **run)
    return pictures


def draw_losses(runs):
    """Training loss a step of each pair of `runs` (see compare.py), both sides over each other."""
    figure = _figure(10, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    count = len(runs[0]["jax"]["losses"])
    steps = np.arange(1, count + 1)
    for axes, shown, title in (
        (left, slice(0, min(20, count)), "the first steps"),
        (right, slice(0, count), "all steps, running mean"),
    ):
        for k, run in enumerate(runs):
            for side, label, color, dash in SIDES:
                losses = np.array([_number(x) for x in run[side]["losses"]])
                if axes is right:
                    losses = _running_mean(losses, max(1, count // 50))
                axes.plot(
                    steps[shown],
                    losses[shown],
                    dash,
                    color=color,
                    linewidth=1.4,
                    alpha=0.85,
                    label=label if k == 0 else None,
                )
        axes.set(xlabel="step", ylabel="cross-entropy (nats)", title=f"Training loss, {title}")
        _whole_numbers(axes)
        axes.legend()
    return figure


def draw_speed(timing):
    """Images a second of each form, a bar each with the range over the rounds."""
    forms = {name: form for name, form in timing.items() if "error" not in form}
    figure = _figure(8, 0.9 + 0.42 * len(forms))
    axes = figure.subplots()
    names = list(forms)
    values = np.array([form["images_per_second"] for form in forms.values()])
    low, high = np.array([form["spread"] for form in forms.values()]).T
    colors = [TRAIN_COLOR if name.startswith("jax") else EVAL_COLOR for name in names]
    bars = axes.barh(
        names, values, color=colors, xerr=[values - low, high - values], ecolor="#444444", capsize=3
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=5)
    axes.invert_yaxis()
    axes.set(xlabel="images/s in training", xlim=(0, 1.15 * high.max()), title="Speed")
    axes.grid(axis="y", visible=False)
    return figure


def draw_benchmark(rows):
    """Bars of the device's peak reached in training, a panel a dtype, images/s beside each bar.

    `rows`: {dtype: {(family, batch): {form: {'mfu', 'images_per_second', 'spread'}}}}; a form is
    'jax', 'jax.given', 'torch' or 'torch.compile'. Whiskers: slowest and fastest round.
    """
    forms = (
        ("jax", "JAX, augmenting", TRAIN_COLOR),
        ("jax.given", "JAX, given batches", "#a9c1de"),
        ("torch", "PyTorch", EVAL_COLOR),
        ("torch.compile", "PyTorch, compiled", "#f2a58e"),
    )
    count = max(map(len, rows.values()))
    figure = _figure(5.2 * len(rows), 1.3 + 0.75 * count)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, (dtype, groups) in zip(panels, rows.items(), strict=True):
        top = 0.0
        for k, (form, label, color) in enumerate(forms):
            found = [(i, group[form]) for i, group in enumerate(groups.values()) if form in group]
            if not found:
                continue
            places = np.array([i for i, _ in found]) + 0.2 * (k - 1.5)
            share = np.array([100 * entry["mfu"] for _, entry in found])
            rate = np.array([entry["images_per_second"] for _, entry in found])
            low, high = share / rate * np.array([entry["spread"] for _, entry in found]).T
            error = {"xerr": [share - low, high - share], "ecolor": "#444444", "capsize": 2}
            bars = axes.barh(places, share, 0.19, color=color, label=label, **error)
            axes.bar_label(bars, [f"{value:,.0f}" for value in rate], padding=4, fontsize=8)
            top = max(top, high.max())
        axes.set_yticks(range(len(groups)), [f"{name}, {batch}" for name, batch in groups])
        axes.invert_yaxis()
        axes.set(xlabel="% of the measured peak", xlim=(0, 1.3 * top), title=f"Training, {dtype}")
        axes.grid(axis="y", visible=False)
    handles, labels = panels[0].get_legend_handles_labels()
    note = "images/s beside each bar; family, batch"
    columns = min(4, 2 * len(rows))  # more would be wider than the figure
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=note)
    return figure


SIDES = (("jax", "JAX", TRAIN_COLOR, "-"), ("torch", "PyTorch", EVAL_COLOR, "--"))


def _running_mean(values, width):
    """Mean of the last `width` values at each place."""
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def write_comparison(folder, comparison):
    """Write folder/comparison.html, which holds its pictures, from a comparison.json's content."""
    figures = {
        "losses": draw_losses(comparison["runs"]),
        "speed": draw_speed(comparison["timing"]),
    }
    captions = {
        "losses": "Loss of the training batches, a line a side and a seed: PyTorch's (dashed) over "
        "JAX's where they are the same; dropout, where the net has it, differs",
        "speed": "Training speed; whiskers: slowest and fastest round",
    }
    page.write(
        pathlib.Path(folder) / "comparison.html",
        "comparison.html",
        pictures=[
            (captions[name], page.data_uri(_png(figure))) for name, figure in figures.items()
        ],
        c=comparison,
    )


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _name_classes(axes, names):
    """The class names under an axis, turned so that long or many ones do not touch."""
    turned = {}
    if len(names) > MANY:
        turned = {"rotation": 90, "fontsize": 5}
    elif max(map(len, names)) > 3:
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), _plain(names), **turned)


def _class_width(names):
    """Inches for a place a class; at most what a PNG's side can be."""
    return min(max(8, 0.16 * len(names)), 500)


def _plain(names):
    """Class names as matplotlib shows them letter by letter: $ would begin a formula."""
    return [name.replace("$", r"\$") for name in names]


def _number(value):
    return np.nan if value is None else value
