"""The counter of FLOPs, the parts of the timing, and scripts/benchmark.py as it is run."""

import argparse
import contextlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from running import ROOT

from cifar_jax import InputError, report, timing
from cifar_jax.experiment import make_experiment, make_model
from cifar_jax.flops import by_layer, forward_macs, macs
from cifar_jax.models import MODELS, create_model
from cifar_jax.models.layers import Conv, Dense, avg_pool, max_pool
from configs import quickstart

sys.path.insert(0, str(ROOT / "scripts"))

import benchmark  # noqa: E402


def convolution(size, channels, features, k=3):
    return size * size * k * k * channels * features


# layer by layer from the architecture: (side of the output, channels in, channels out)
RESNET = [
    *((32, 3, 64), (32, 64, 128), (16, 128, 128), (16, 128, 128)),
    *((14, 128, 256), (7, 256, 512), (3, 512, 512), (3, 512, 512)),
]


def test_resnet_is_counted_layer_by_layer():
    config = importlib.import_module("configs.resnet").get_config()
    expected = sum(convolution(*layer) for layer in RESNET) + 512 * 10
    assert forward_macs(make_model(config, range(10))) == expected == 310_842_368


class PaddedResNet9(nn.Module):
    """The DAWNBench net, every convolution padded, as others count it: 379.27 M."""

    @nn.compact
    def __call__(self, x, train):
        def unit(x, width, pool=1):
            return max_pool(Conv(width, use_bias=False)(x), pool)

        x = unit(unit(x, 64), 128, 2)
        x = x + unit(unit(x, 128), 128)
        x = unit(unit(x, 256, 2), 512, 2)
        x = x + unit(unit(x, 512), 512)
        return Dense(10, use_bias=False)(max_pool(x, 4).reshape(x.shape[0], -1))


class Untrained(nn.Module):
    """A layer as a network that takes `train`."""

    layer: nn.Module

    def __call__(self, x, train):
        return self.layer(x)


def test_the_known_figure_of_resnet9():
    assert forward_macs(PaddedResNet9()) / 1e6 == pytest.approx(379.27, abs=0.01)


def test_count_does_not_depend_on_the_form_of_the_convolution(rng, monkeypatch):
    """Not on the backend (a single CPU multiplies matrices, fewer of them), and groups count."""
    model = Conv(24, padding=0, dilation=2, use_bias=False)
    for devices in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        assert forward_macs(Untrained(model), (32, 32, 16)) == convolution(28, 16, 24)
    x = rng.normal(size=(6, 32, 32, 16)).astype("float32")
    kernel = rng.normal(size=(3, 3, 16, 24)).astype("float32")

    def grouped(x, k):
        names = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=names, feature_group_count=4
        )

    assert macs(jax.make_jaxpr(grouped)(x, kernel[:, :, :4])) == 6 * convolution(32, 4, 24)


def test_layers_of_the_systems_add_up():
    """Mult-adds by layer, and receptive fields: resnet's by hand, another's by its gradient."""
    for name in MODELS:
        model = create_model(name, num_classes=10)
        products, fields = by_layer(model)
        assert sum(products.values()) == forward_macs(model)
        if name == "resnet":
            seen = [fields[f"{layer}_bn"].size for layer in ("prep", "layer1", "res1b", "layer2")]
            assert seen == [3, 6, 14, 20] and fields["fc"].size == 80
        if name == "mixture":  # its gates see all
            assert fields["block1_conv"].size == 3 and fields["block2_conv"].size == math.inf

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = avg_pool(Conv(4, dilation=2)(x), 3)
            return Conv(4, name="last")(max_pool(Conv(4)(x), 2))

    net, x = Net(), jax.random.normal(jax.random.key(0), (1, 96, 96, 3))
    variables = net.init(jax.random.key(0), x, False)
    gradient = jax.grad(lambda x: net.apply(variables, x, False)[0, 7, 7].sum())(x)
    rows = jnp.flatnonzero(jnp.abs(gradient).sum((0, 2, 3)))
    # the maxima of pools may lie further in: what is seen is at most the field
    field = by_layer(net, (96, 96, 3))[1]["last"]
    assert field.step == 6
    assert field.size - 6 <= rows[-1] - rows[0] + 1 <= field.size


def test_a_loop_of_unknown_length_is_refused():
    def body(x):
        return lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="while"):
        macs(jax.make_jaxpr(body)(jnp.eye(3)))


@pytest.mark.long
def test_a_given_batch_makes_the_same_step():
    config = quickstart.get_config()
    config.model.widths, config.batch_size = (4, 8, 8, 8), 64
    sides = timing.Sides(make_experiment(config), None)
    exp, state = sides.exp, sides.exp.init_state()
    given = timing.with_given_batch(sides, exp, state)
    assert given.train.images.dtype == jnp.float32 and len(given.train) == 64
    (ours, sums), (same, same_sums) = (jax.jit(e.step)(state, e.train) for e in (exp, given))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours.params, same.params)
    assert float(same_sums.loss) == pytest.approx(float(sums.loss), rel=1e-5)


class Here:
    """As an OwnProcess, in this process."""

    def __call__(self, function, *arguments):
        return function(*arguments)

    def see(self, environment):
        assert environment == {}  # the caller of the tests says how many devices there are


@pytest.fixture
def time_here(monkeypatch):
    """timing.time_forms of forms that make(name) makes, in this process."""

    def time_forms(make, names, **settings):
        monkeypatch.setattr(timing, "make_form", lambda sides, name, task, steps: make(name))
        config = quickstart.get_config()
        config.model.widths, config.batch_size = (4, 4, 4, 4), 8
        here = dict.fromkeys(["jax", "torch"], Here())
        return timing.time_forms(here, config.to_dict(), names, steps=1, **settings)

    return time_forms


def test_forms_take_turns_and_failures_are_told(time_here):
    order = []

    def make(name):
        if name == "torch.compile float32":
            raise RuntimeError("no compiler\nand much more")
        return timing.Form(lambda: order.append(name), 10, 1.0, None)

    names = timing.form_names(["float32"])
    timed = time_here(make, names, rounds=3)
    assert timed["torch.compile float32"] == {"error": "RuntimeError: no compiler"}
    assert order == [
        *["jax float32"] * 2,
        *["torch float32"] * 2,
        *["jax float32", "torch float32"],
        *["torch float32", "jax float32"],
        *["jax float32", "torch float32"],
    ]
    for name in names[:2]:
        form = timed[name]
        assert form["n"] == 3 and 1.0 <= form["first_steps"] < 1.5
        low, high = form["spread"]
        assert low <= form["images_per_second"] <= high


def test_a_short_task_has_more_rounds(time_here):
    ends = []

    def run():
        time.sleep(0.05)
        ends.append(time.perf_counter())

    form = timing.Form(run, 10, 1.0, None)
    timed = time_here(lambda name: form, ["jax float32"], rounds=1, least_seconds=1.0)
    _, warm, *_, last = ends
    assert last - warm >= 0.99
    assert 2 <= timed["jax float32"]["n"] == len(timed["jax float32"]["rounds"]) <= 3


def script(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.long
def test_first_steps_are_medians_of_rounds_with_a_cache_each(monkeypatch):
    seconds, caches = iter([20.0, 6.0, 10.0, 4.0, 30.0, 5.0]), []

    class Process(contextlib.nullcontext):
        def __call__(self, function, config, name, sizes):
            caches.append(self.enter_result["JAX_COMPILATION_CACHE_DIR"])
            return {"first_step": next(seconds), "peak_memory": 7}

        def __enter__(self):
            return self

    monkeypatch.setattr(benchmark, "OwnProcess", Process)
    monkeypatch.setattr(benchmark, "make_sides", lambda *args: argparse.Namespace(twin=None))
    args = argparse.Namespace(starts=3, dtypes=["float32"], no_compiled=True, batch=["32"])
    entry = {}
    list(benchmark.measure_start(args, entry, quickstart.get_config(), None, None, None))
    (found,) = entry["start"].values()
    assert found["first_step"] == {"cold": 20.0, "warm": 5.0} and found["peak_memory"] == 7
    assert [r["warm"] for r in found["rounds"]] == [6.0, 4.0, 5.0]
    assert caches[::2] == caches[1::2] and len({*caches}) == 3


def test_quick_benchmark_measures_both_sides(tmp_path):
    out = tmp_path / "new" / "cpu.json"
    done = script("scripts/benchmark.py", "--quick", "--families=resnet", f"--out={out}")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["status"] == "done" and result["settings"]["rounds"] == 2
    assert {"device", "versions", "commit", "glibc_tunables", "data"} <= set(result)
    (resnet,) = result["families"].values()
    assert resnet["recipe_batch"] == 512 and "narrow" in result["data"]
    convolutions = [(n, c if c == 3 else c // 8, f // 8) for n, c, f in RESNET]
    assert resnet["macs"] == sum(convolution(*layer) for layer in convolutions) + 64 * 10
    for task, passes in (("train", 3), ("evaluate", 1)):
        forms = resnet["batches"]["32"][task]
        given = {"jax.given float32"} if task == "train" else set()
        assert set(forms) == {"jax float32", "torch float32"} | given
        for form in forms.values():
            low, high = form["spread"]
            assert 0 < low <= form["images_per_second"] <= high and form["n"] == 2
            peak = form["images_per_second"] * 2 * resnet["macs"] * passes / form["mfu"]
            assert peak == pytest.approx(max(result["peaks"]["float32"].values()))
    start = resnet["start"]["jax float32"]
    assert 0 < start["first_step"]["warm"] < start["first_step"]["cold"]
    assert set(resnet["start"]["torch float32"]["first_step"]) == {"cold"}
    assert all(form["peak_memory"] > 0 for form in resnet["start"].values())
    table = out.with_suffix(".md").read_text()
    assert "| resnet, 32 | float32 | train |" in table and table in done.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_quick_growth_counts_the_work_exactly(tmp_path):
    out = tmp_path / "growth.json"
    done = script("scripts/growth.py", "--quick", f"--out={out}")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    grown = {name: [row["work_ratio"] for row in rows] for name, rows in result["growth"].items()}
    assert grown["images"] == grown["epochs"] == [1, 2] and grown["batch_size"] == [1, 1]
    assert 3.5 < grown["width"][1] < 4 and 1 < grown["classes"][1] < 1.01
    assert all(row["n"] == 2 for rows in result["growth"].values() for row in rows)
    table = out.with_suffix(".md").read_text()
    assert "| width | 16 |" in table and table in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("benchmark.py", ("--families=vgg,lenet",), "unknown 'lenet'; choose of vgg, convnet"),
        ("benchmark.py", ("--dtypes=int4",), "unknown 'int4'"),
        ("benchmark.py", ("--batch=recipe,0",), "numbers of at least 1"),
        ("benchmark.py", ("--rounds=0",), "--rounds must be at least 1"),
        ("benchmark.py", ("--starts=0",), "--starts must be at least 1"),
        ("benchmark.py", ("--task-seconds=inf",), "--task-seconds must be a finite number"),
        ("benchmark.py", ("--device=gpu", "--quick"), "no gpu here"),
        ("growth.py", ("--rounds=0",), "--rounds must be at least 1"),
        ("growth.py", ("--out=/proc/nothing/x.json",), "cannot write"),
    ],
)
def test_bad_input_is_one_sentence(name, arguments, says):
    done = script(f"scripts/{name}", *arguments)
    assert done.returncode == 2 and says in done.stderr
    assert done.stderr.startswith(f"{name}: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("set_by_user", [None, "", "glibc.malloc.check=3"])
def test_setup_asks_for_huge_pages_unless_told_otherwise(set_by_user, tmp_path):
    for name in ("scripts/setup.sh", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    for name in ("requirements.txt", "requirements-cpu.txt"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv/bin/python"  # which has what it is asked to install
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if set_by_user is not None:
        environment["GLIBC_TUNABLES"] = set_by_user
    done = subprocess.run(
        ["bash", "-c", ". scripts/setup.sh && printenv GLIBC_TUNABLES"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = "glibc.malloc.hugetlb=1" if set_by_user is None else set_by_user
    assert done.stdout.strip() == wanted


def test_what_was_measured_otherwise_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--families=vgg"])
    args = benchmark.parse()
    out = benchmark.out_file(args, "")
    out.write_text(json.dumps({"settings": benchmark.settings_of(args)}))
    assert benchmark.out_file(args, "") == out
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    with pytest.raises(InputError, match="measured with other families; name another file"):
        benchmark.out_file(benchmark.parse(), "")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick"])
    assert benchmark.out_file(benchmark.parse(), "").stem == f"{out.stem}_quick"


def test_chart_has_a_panel_a_dtype_and_survives_gaps(tmp_path):
    form = {"mfu": 0.4, "images_per_second": 100.0, "spread": [90.0, 120.0]}
    rows = {
        "float32": {("vgg", "32"): {"jax": form, "torch": form}, ("resnet", "512"): {"jax": form}},
        "bfloat16": {("vgg", "32"): {"jax": form, "torch.compile": form}},
    }
    figure = report.draw_benchmark(rows)
    assert [axes.get_title() for axes in figure.axes] == ["Training, float32", "Training, bfloat16"]
    bars = [patch.get_width() for patch in figure.axes[0].patches]
    assert bars == pytest.approx([40.0] * 3)
    report.save({"chart": figure}, tmp_path)
    assert (tmp_path / "chart.png").stat().st_size > 1000


@pytest.mark.parametrize("dtypes", [["float32"], ["float32", "bfloat16"]])
def test_charts_legend_fits_in_it(dtypes):
    form = {"mfu": 0.4, "images_per_second": 100.0, "spread": [90.0, 120.0]}
    forms = dict.fromkeys(["jax", "jax.given", "torch", "torch.compile"], form)
    figure = report.draw_benchmark({dtype: {("vgg", "32"): forms} for dtype in dtypes})
    figure.canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4
    low, high = legend.get_window_extent().intervalx
    assert low >= 0 and high <= figure.bbox.width
