"""The program as a user runs it: whole runs on the embedded digits in processes of their own."""

import gzip
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from running import (
    QUICK,
    ROOT,
    SPEEDRUN,
    arrays,
    assert_same_run,
    finish,
    metrics,
    result,
)

from cifar_jax import InputError, data
from cifar_jax import workdir as files


def test_a_run_leaves_what_the_contract_says(reference):
    for name in ("config.json", "metrics.jsonl", "result.json", "checkpoints", "report/index.html"):
        assert (reference / name).exists(), name
    records = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    fields = "epoch step lr train_loss train_accuracy eval_loss eval_accuracy eval_top3 eval_top5"
    assert list(records[0]) == [*fields.split(), "images_per_second", "seconds"]
    made = result(reference)
    assert made["status"] == "done" and made["model"] == "resnet" and made["epochs"] == 3
    assert made["steps"] == records[-1]["step"] == 57
    best = min(records, key=lambda r: r["eval_loss"])
    assert made["best"]["epoch"] == best["epoch"]
    assert made["best"]["accuracy"] == best["eval_accuracy"] == made["test"]["accuracy"]
    assert made["last"]["eval_loss"] == records[-1]["eval_loss"]
    kept = np.load(reference / "report" / "predictions.npz")
    right = kept["logits"].argmax(1) == kept["labels"]
    shares = [100 * right[kept["labels"] == i].mean() for i in range(10)]
    assert [*made["per_class"].values()] == pytest.approx(shares)
    assert made["test"]["accuracy"] == pytest.approx(100 * right.mean())
    assert set(made["seconds"]) == {"compile", "train", "eval", "total"}
    assert made["dataset"]["sizes"] == {"train": 1501, "test": 296}
    assert {"jax", "flax", "optax", "python"} <= set(made["versions"])
    config = json.loads((reference / "config.json").read_text())
    assert config["config"]["model"]["widths"] == [4, 8, 8, 8]
    # the best two and the latest are kept, no more
    steps = {int(p.name) for p in (reference / "checkpoints").iterdir()}
    assert best["step"] in steps and 57 in steps and len(steps) <= 3
    assert not list(reference.rglob("*.part")) and not list(reference.rglob("*tmp*"))


def test_evaluate_loads_the_best(reference, program):
    out, _ = finish(program(*QUICK, f"--workdir={reference}", "--mode=evaluate"))
    evaluation = json.loads((reference / "evaluation.json").read_text())
    made = result(reference)
    assert evaluation["accuracy"] == made["test"]["accuracy"]
    assert evaluation["loss"] == pytest.approx(made["test"]["eval_loss"], rel=1e-6)
    assert evaluation["epoch"] == made["best"]["epoch"]
    assert f"accuracy {evaluation['accuracy']:.2f} %" in out


@pytest.mark.case(20, 40)
def test_a_finished_run_says_so_and_changes_nothing(reference, program):
    def state():
        return {
            p: p.stat().st_mtime_ns
            for p in reference.rglob("*")
            if p.is_file() and "evaluation" not in p.name
        }

    before = state()
    out, _ = finish(program(*QUICK, f"--workdir={reference}"))
    assert "finished" in out
    assert state() == before


@pytest.mark.case(19, 20)
@pytest.mark.slow
def test_stop_after_and_going_on_is_the_uninterrupted_run(reference, program, tmp_path):
    workdir = tmp_path / "run"
    for epochs, steps in (("0.47", 9), ("2", 38)):
        out, _ = finish(program(*QUICK, f"--workdir={workdir}", f"--config.stop_after={epochs}"))
        stopped = result(workdir)
        assert stopped["status"] == "stopped" and stopped["steps"] == steps
        assert stopped["last"]["epoch"] == steps / 19
        assert (f"at epoch {9 / 19:g}\n" in out) == (steps == 38)
    assert [r["epoch"] for r in metrics(workdir)] == [1, 2]
    out, _ = finish(program(*QUICK, f"--workdir={workdir}"))
    assert "at epoch 2\n" in out
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_the_last_epoch_may_be_part_of_one(speedrun):
    """1.5 epochs of 23 steps are 35: the end is evaluated, kept, and measured with more views."""
    records = [json.loads(line) for line in (speedrun / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"]) for r in records] == [(1, 23), (1.5, 35)]
    made = result(speedrun)
    assert made["status"] == "done" and made["steps"] == 35
    assert made["epochs"] == made["epochs_planned"] == made["last"]["epoch"] == 1.5
    assert made["last"]["eval_loss"] == records[1]["eval_loss"]
    assert (speedrun / "checkpoints" / "35").is_dir()
    assert made["test"]["tta"] == "multicrop" and 0 < made["test"]["accuracy_tta"] < 100
    seconds = [r["seconds"] for r in records]
    trained = [64 * steps / r["images_per_second"] for steps, r in zip((23, 12), records)]
    assert made["seconds"]["train"] == pytest.approx(sum(trained))
    assert made["seconds"]["eval"] > sum(seconds) - sum(trained) > 0  # the last ones count too
    kept = arrays(speedrun)
    slow = {key: value for key, value in kept.items() if key.startswith("training['slow']")}
    for key, value in slow.items():  # at the end the slow weights are the model
        np.testing.assert_array_equal(value, kept[key.replace("training['slow']", "model")])
    assert len(slow) > 20


def test_evaluate_measures_with_the_views_asked_for(speedrun, program):
    out, _ = finish(program(*SPEEDRUN, f"--workdir={speedrun}", "--mode=evaluate"))
    evaluation = json.loads((speedrun / "evaluation.json").read_text())
    test = result(speedrun)["test"]
    assert evaluation["accuracy"] == test["accuracy"]
    assert evaluation["accuracy_tta"] == test["accuracy_tta"]
    extra = (f"--workdir={speedrun}", "--mode=evaluate", "--config.eval.tta=none")
    finish(program(*SPEEDRUN, *extra))
    assert "tta" not in json.loads((speedrun / "evaluation.json").read_text())


@pytest.mark.long
def test_going_on_within_the_last_part_of_an_epoch(speedrun, program, tmp_path):
    """Stopped between two meetings of the lookahead, and again within the last, partial epoch."""
    workdir = tmp_path / "run"
    for epochs, steps in (("0.5", 12), ("1.2", 28)):
        finish(program(*SPEEDRUN, f"--workdir={workdir}", f"--config.stop_after={epochs}"))
        stopped = result(workdir)
        assert stopped["status"] == "stopped" and stopped["steps"] == steps
        assert stopped["last"]["epoch"] == steps / 23
    finish(program(*SPEEDRUN, f"--workdir={workdir}"))
    assert_same_run(workdir, speedrun)


@pytest.mark.slow
@pytest.mark.case(22)
def test_one_and_eight_devices_give_the_same_losses(program, tmp_path):
    """The sum of the losses of the first three steps, before rounding grows: after five it made
    1.6e-4 on one machine. And a run may go on on another number of devices."""
    sums = {}
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        extra = (*QUICK, f"--workdir={workdir}")
        finish(program(*extra, "--config.stop_after=0.15", devices=devices))
        held = arrays(workdir)
        assert held["step"] == 3
        sums[devices] = next(v for k, v in held.items() if "epoch_metrics" in k and "loss" in k)
    assert sums[8] == pytest.approx(sums[1], rel=1e-5)
    finish(program(*extra, devices=1))
    assert [r["epoch"] for r in metrics(workdir)] == [1, 2, 3]


@pytest.mark.long
def test_several_steps_a_call(program, tmp_path):
    """What an accelerator does: a scan of steps; stopped after a call, it goes on exactly."""
    extra = (*QUICK, "--config.epochs=1", "--config.steps_per_call=12")
    finish(program(*extra, f"--workdir={tmp_path}/whole"))
    finish(program(*extra, f"--workdir={tmp_path}/parts", "--config.stop_after=0.64"))
    assert result(tmp_path / "parts")["steps"] == 12
    finish(program(*extra, f"--workdir={tmp_path}/parts"))
    assert [r["step"] for r in metrics(tmp_path / "whole")] == [19]
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_evaluating_a_live_run_does_not_touch_it(reference, program, tmp_path):
    """A checkpoint being written by another process stays."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    half = workdir / "checkpoints" / "96.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "data").write_text("half")
    finish(program(*QUICK, f"--workdir={workdir}", "--mode=evaluate"))
    assert (half / "data").read_text() == "half"


def test_validation_is_held_out_and_the_test_set_measured_once(program, tmp_path):
    extra = (*QUICK, "--config.epochs=1", "--config.data.validation=200")
    extra += ("--config.batch_size=325", "--config.drop_last=True")  # four calls of one program
    extra += ("--config.schedule.pct_start=0.5", f"--workdir={tmp_path}/run")
    finish(program(*extra, "--config.eval.augmented=True"))
    made = result(tmp_path / "run")
    finish(program(*extra, "--mode=evaluate"))  # of images as they are
    clean = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert made["test"]["augmented"] and not clean["augmented"]
    assert made["test"]["accuracy_clean"] == clean["accuracy"]
    assert made["dataset"]["sizes"] == {"train": 1301, "validation": 200, "test": 296}
    assert made["best"]["accuracy"] * 2 == pytest.approx(
        round(made["best"]["accuracy"] * 2)
    )  # of 200 images
    assert made["test"]["accuracy"] * 2.96 == pytest.approx(round(made["test"]["accuracy"] * 2.96))


# ------------------------------------------------------------------------------------------------
# bad input


def refused(process, says):
    """Exit code 2 and one sentence that holds `says`."""
    _, err = finish(process, code=2)
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("main.py: "), err
    assert says in lines[0], lines[0]


BAD = {
    "no config": (("--workdir=W",), "name a config"),
    "unknown config file": (("--config=configs/alexnet.py", "--workdir=W"), "configs/alexnet.py"),
    "misspelt config file": (
        ("--config=configs/resent.py", "--workdir=W"),
        "did you mean 'configs/resnet.py'?",
    ),
    "a field of another section": (
        (*QUICK, "--config.peak_lr=3", "--workdir=W"),
        "did you mean --config.schedule.peak_lr?",
    ),
    "misspelt mode": ((*QUICK, "--mode=pedict", "--workdir=W"), "did you mean 'predict'?"),
    "misspelt dataset": (
        (*QUICK, "--config.data.name=cifar1", "--workdir=W"),
        "did you mean 'cifar10'?",
    ),
    "a range of another kind": (
        (*QUICK, "--mode=lr_find", "--config.lr_find.range=log", "--workdir=W"),
        "unknown lr_find.range 'log'; choose exponential or linear",
    ),
    "a config that is a folder": (("--config=configs", "--workdir=W"), "configs"),
    "unknown variant": (
        ("--config=configs/mixture.py:wide", "--workdir=W"),
        "no variant 'wide'; it has: sequential, tuned",
    ),
    "variant of a config without": (
        ("--config=configs/quickstart.py:x", "--workdir=W"),
        "no variant 'x'",
    ),
    "misspelt field": (("--config.sed=3", *QUICK, "--workdir=W"), 'Did you mean "seed"'),
    "misspelt nested field": ((*QUICK, "--config.optim.wd=3", "--workdir=W"), "wd"),
    "wrong type": (
        (*QUICK, "--config.batch_size=many", "--workdir=W"),
        "config.batch_size must be a whole number, not 'many'",
    ),
    "a fraction for a whole number": (
        (*QUICK, "--config.epochs=2.5", "--workdir=W"),
        "config.epochs must be a whole number, not '2.5'",
    ),
    "a word for a number": (
        (*QUICK, "--config.schedule.peak_lr=high", "--workdir=W"),
        "config.schedule.peak_lr must be a number, not 'high'",
    ),
    "neither true nor false": (
        (*QUICK, "--config.report=maybe", "--workdir=W"),
        "config.report must be True or False, not 'maybe'",
    ),
    "unknown flag": ((*QUICK, "--epochs=2", "--workdir=W"), "epochs"),
    "unknown mode": ((*QUICK, "--mode=fly", "--workdir=W"), "fly"),
    "stray argument": ((*QUICK, "fast", "--workdir=W"), "unexpected argument 'fast'"),
    "no workdir": (QUICK, "--workdir"),
    "unknown model": (
        (*QUICK, "--config.model.name=lenet", "--workdir=W"),
        "unknown model 'lenet'",
    ),
    "too many widths": (
        (*QUICK, "--config.model.widths=4,4", "--workdir=W"),
        "config.model cannot be used",
    ),
    "unknown dataset": (
        (*QUICK, "--config.data.name=mnist", "--workdir=W"),
        "unknown dataset 'mnist'",
    ),
    "unknown optimizer": (
        (*QUICK, "--config.optim.name=lion", "--workdir=W"),
        "unknown optimizer 'lion'",
    ),
    "batch size 0": (
        (*QUICK, "--config.batch_size=0", "--workdir=W"),
        "batch_size must be at least 1",
    ),
    "batch larger than the data": (
        (*QUICK, "--config.batch_size=2000", "--workdir=W"),
        "more than the 1501",
    ),
    "epochs that are no number": (
        ("--config=configs/speedrun.py", "--config.epochs=nan", "--workdir=W"),
        "config.epochs must be finite, not nan",
    ),
    "a list with an infinity": (
        (*QUICK, "--config.augment.normalize.std=(1.0, 1.0, 1e999)", "--workdir=W"),
        "config.augment.normalize.std must be finite, not inf",
    ),
    "clipping to less than nothing": (
        (*QUICK, "--config.optim.clip_value=-0.1", "--workdir=W"),
        "config.optim.clip_value must be above 0, not -0.1",
    ),
    "a momentum of 1.5": (
        (*QUICK, "--config.optim.b1=1.5", "--workdir=W"),
        "config.optim.b1 must be at least 0 and below 1, not 1.5",
    ),
    "half an epoch of a phase": (
        ("--config=configs/convnet.py", "--config.schedule.epochs=0.5,399.5", "--workdir=W"),
        "config.schedule.epochs must be whole and at least 1, not 0.5",
    ),
    "colours after the normalisation": (
        (*QUICK, "--config.augment.ops=('normalize', 'color_jitter')", "--workdir=W"),
        "'color_jitter' works on values in 0..255",
    ),
    "weights for another mode": (
        (*QUICK, "--weights=w.pt", "--workdir=W"),
        "--weights is not for the mode train",
    ),
    "huge padding": (
        (*QUICK, "--config.augment.random_crop.padding=10000000000", "--workdir=W"),
        "config.augment cannot be used",
    ),
    "no epochs": ((*QUICK, "--config.epochs=0", "--workdir=W"), "epochs must be at least 1"),
    "unknown dtype": ((*QUICK, "--config.model.dtype=int4", "--workdir=W"), "unknown dtype 'int4'"),
    "float64": ((*QUICK, "--config.model.dtype=float64", "--workdir=W"), "compute in float64"),
    "unknown augmentation": (
        (*QUICK, "--config.augment.ops=('blur', 'normalize')", "--workdir=W"),
        "augmentation 'blur'",
    ),
    "unknown views": ((*QUICK, "--config.eval.tta=both", "--workdir=W"), "unknown eval.tta 'both'"),
    "unknown variant of the speedrun": (
        ("--config=configs/speedrun.py:95", "--workdir=W"),
        "no variant '95'; it has: 96",
    ),
    "a seed of 32 bits": (
        (*QUICK, "--config.seed=2147483648", "--workdir=W"),
        "seed must be from 0 to 2147483647",
    ),
    "negative seed": ((*QUICK, "--config.seed=-1", "--workdir=W"), "seed must be from 0 to"),
    "a schedule without its fields": (
        (*QUICK, "--config.schedule.name=phases", "--workdir=W"),
        "config.schedule lacks",
    ),
    "negative padding": (
        (*QUICK, "--config.augment.random_crop.padding=-1", "--workdir=W"),
        "config.augment cannot",
    ),
    "two channels": (
        (*QUICK, "--config.augment.normalize.mean=0.5,0.5", "--workdir=W"),
        "config.augment cannot",
    ),
    "no normalisation": (
        (*QUICK, "--config.augment.ops=random_crop", "--workdir=W"),
        "must hold 'normalize'",
    ),
    "unwritable workdir": (
        (*QUICK, "--workdir=/proc/nothing"),
        "cannot write to /proc/nothing",
    ),
    "evaluating nothing": ((*QUICK, "--workdir=W", "--mode=evaluate"), "holds no run"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.case(13)) if name == "unwritable workdir" else name
        for name in BAD
    ],
)
def test_bad_input_is_one_sentence(case, program, tmp_path):
    arguments, says = BAD[case]
    refused(program(*(a.replace("=W", f"={tmp_path}/w") for a in arguments)), says)
    assert not (tmp_path / "w").exists() or "--mode=lr_find" in arguments


@pytest.mark.case(13)
def test_a_workdir_that_is_a_file(program, tmp_path):
    """This one through the command line, as a user has it."""
    (tmp_path / "file").write_text("mine")
    refused(
        program(*QUICK, f"--workdir={tmp_path}/file", prefix=()), f"cannot write to {tmp_path}/file"
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.case(24)
def test_a_workdir_with_another_run_is_left_alone(reference, program):
    before = (reference / "metrics.jsonl").read_bytes()
    process = program(*QUICK, "--config.seed=7", f"--workdir={reference}")
    refused(process, "another config (seed is 0 there, 7 here)")
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_a_field_that_an_older_run_lacks_counts_as_its_default(reference, tmp_path):
    kept = json.loads((reference / "config.json").read_text())
    del kept["config"]["ghost_batches"], kept["config"]["data"]["split_seed"]
    (tmp_path / "config.json").write_text(json.dumps(kept))
    config = json.loads((reference / "config.json").read_text())["config"]
    files.check_config(tmp_path, config, ())
    with pytest.raises(InputError, match="ghost_batches is 1 there, 2 here"):
        files.check_config(tmp_path, {**config, "ghost_batches": 2}, ())


def test_where_a_run_went_on_is_kept(reference, tmp_path):
    """Once for each change of device, versions or commit."""
    kept = json.loads((reference / "config.json").read_text())
    here = {key: kept[key] for key in ("device", "versions", "commit")}
    assert "resumed" not in kept  # it was begun and ended by one program
    (tmp_path / "config.json").write_text(json.dumps(kept))
    for commit in (here["commit"], "b", "b", "c"):
        files.open_workdir(tmp_path, kept["config"], {**here, "commit": commit}, kept["data"])
    left = json.loads((tmp_path / "config.json").read_text())
    assert left.pop("resumed") == [{**here, "commit": "b"}, {**here, "commit": "c"}]
    assert left == kept


@pytest.mark.case(27, 29)
def test_damaged_cifar10_is_one_sentence(program, tmp_path):
    """A truncated file and a pickle that wants to run something."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    resnet = ("--config=configs/resnet.py", f"--config.data.dir={tmp_path}")
    resnet = (*resnet, f"--workdir={tmp_path}/w")
    (folder / "data_batch_1").write_bytes(b"\x80\x02}q\x00")
    refused(program(*resnet), "data_batch_1 has 5 bytes where the official file has 31035704")
    trap = tmp_path / "ran"
    evil = b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR."
    (folder / "data_batch_1").write_bytes(evil.ljust(31035704, b"\x00"))
    refused(program(*resnet), "data_batch_1 differs from the official file")
    assert not trap.exists()


# ------------------------------------------------------------------------------------------------
# other modes


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ("vgg", "2,882,474"),
        ("convnet", "2,791,434"),
        ("resnet", "6,573,120"),
        ("mixture", "4,796,649"),
        ("mixture:sequential", "7,941,594"),
        ("dilated", "2,034,040"),
        ("speedrun", "1,971,352"),
        ("speedrun:96", "9,915,416"),
    ],
)
def test_summary(config, total, program):
    name, _, variant = config.partition(":")
    path = f"configs/{name}.py" + (f":{variant}" if variant else "")
    out, _ = finish(program(f"--config={path}", "--mode=summary"))
    assert out.splitlines()[-1] == f"Total params: {total}"
    if name == "resnet":
        prep = "prep_conv 32 x 32 x 64 1,728 1,769,472 3 256.0"
        assert any(line.split() == prep.split() for line in out.splitlines())


@pytest.mark.long  # own_data_test.py predicts too
def test_predict_names_classes_and_unreadable_files(reference, program, tmp_path):
    """A digit of the test set as PNG and, resized, as grey JPEG; a text file is named."""
    image = Image.fromarray(data.load("digits", "", "test").images[0])
    image.save(tmp_path / "a.png")
    image.resize((90, 70)).convert("L").save(tmp_path / "b.jpg")
    files = f"--images={tmp_path}/a.png,{tmp_path}/b.jpg"
    out, _ = finish(program(*QUICK, f"--workdir={reference}", "--mode=predict", files))
    lines = out.splitlines()
    assert len(lines) == 2
    for line in lines:
        shares = [float(v) for v in re.findall(r"([\d.]+) %", line)]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.2
    (tmp_path / "c.txt").write_text("no image")
    files = f"--images={tmp_path}/a.png,{tmp_path}/c.txt,{tmp_path}/none.png"
    command = (*QUICK, f"--workdir={reference}", "--mode=predict", files)
    out, err = finish(program(*command), code=2)
    assert len(out.splitlines()) == 1
    assert "c.txt (not an image)" in err and "none.png (No such file" in err


@pytest.mark.long
def test_weights_go_out_and_in_again(reference, program, tmp_path):
    """Flax -> PyTorch and safetensors -> Flax: unchanged, and usable for all that a run is."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    imported, tuned = tmp_path / "imported", tmp_path / "tuned"
    for kind, suffix in (("torch", "pt"), ("safetensors", "safetensors")):
        finish(program("--mode=export", f"--format={kind}", *QUICK, f"--workdir={run}"))
        assert (run / "export" / f"resnet.{suffix}").stat().st_size > 1000
    weights = run / "export" / "resnet.pt"
    taken = (*QUICK, "--mode=import", f"--weights={weights}")
    out, _ = finish(program(*taken, f"--workdir={imported}"))
    best = result(reference)["best"]
    assert f"accuracy {best['accuracy']:.2f} %" in out
    ours = {k: v for k, v in arrays(imported).items() if k.startswith("model")}
    safe = run / "export" / "resnet.safetensors"
    finish(program(*QUICK, "--mode=import", f"--weights={safe}", f"--workdir={tuned}"))
    for key, value in arrays(tuned).items():
        if key.startswith("model"):
            np.testing.assert_array_equal(ours[key], value)
    _, err = finish(program(*taken, f"--workdir={imported}"), code=2)
    assert "holds a run already" in err and err.count("\n") == 1
    finish(program("--mode=evaluate", *QUICK, f"--workdir={imported}"))
    evaluation = json.loads((imported / "evaluation.json").read_text())
    assert evaluation["accuracy"] == best["accuracy"]
    assert evaluation["loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    finish(program(*QUICK, f"--workdir={tuned}"))
    trained = result(tuned)
    assert trained["status"] == "done" and trained["epochs"] == 3
    assert trained["imported"]["file"] == str(safe)
    assert trained["best"]["eval_loss"] <= evaluation["loss"] + 1e-6


@pytest.mark.slow
def test_weights_of_another_net_are_refused_by_name(reference, program, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    finish(program("--mode=export", "--format=safetensors", *QUICK, f"--workdir={run}"))
    weights = run / "export" / "resnet.safetensors"
    widths = "--config.model.widths=4,8,8,16"
    other = ("--config=configs/quickstart.py", widths, "--mode=import", f"--weights={weights}")
    _, err = finish(program(*other, f"--workdir={tmp_path}/new"), code=2)
    assert "layer3.conv.weight [8, 8, 3, 3] instead of [16, 8, 3, 3]" in err
    assert err.count("\n") == 1 and not (tmp_path / "new" / "config.json").exists()


@pytest.mark.long
def test_compare_trains_times_and_reports_both_sides(program, tmp_path):
    short = ("--config.compare.epochs=0.5", "--config.compare.rounds=2")
    small = (*short, "--config.compare.dtypes=('float32',)", "--config.compare.compiled=False")
    run = ("--mode=compare", *QUICK, *small, f"--workdir={tmp_path}")
    out, _ = finish(program(*run, "--config.compare.seeds=2"))
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert comparison["status"] == "done"
    for pair in comparison["runs"]:
        ours, theirs = pair["jax"], pair["torch"]
        assert len(ours["losses"]) == len(theirs["losses"]) == 10
        # no dropout here: the same numbers, until rounding tells (it grows fivefold a step)
        np.testing.assert_allclose(ours["losses"][:2], theirs["losses"][:2], rtol=1e-3)
        np.testing.assert_allclose(ours["losses"][:4], theirs["losses"][:4], rtol=2e-2)
        same = pair["same_weights"]
        assert same["largest_difference"] < 1e-5
        assert same["predictions_differ"] <= same["ties"]
    assert set(comparison["timing"]) == {"jax float32", "torch float32"}
    for form in comparison["timing"].values():
        low, high = form["spread"]
        assert 0 < low <= form["images_per_second"] <= high
        assert form["peak_memory"] > 0 and form["first_steps"] > 0
    assert (tmp_path / "comparison.md").read_text() in out
    assert "<h1>resnet: JAX and PyTorch</h1>" in (tmp_path / "comparison.html").read_text()


@pytest.mark.slow
def test_profile_leaves_a_trace_and_the_run_as_it_is(reference, program, tmp_path):
    extra = ("--config.profile=True", "--config.stop_after=1", f"--workdir={tmp_path}")
    finish(program(*QUICK, *extra))
    assert metrics(tmp_path) == metrics(reference)[:1]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))  # TensorBoard's
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum("dot" in event.get("name", "") for event in events) >= 3  # a product a step at least


def modules(code):
    """The modules that are imported once `code` has run in a process of its own."""
    code += "\nprint('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("MODULES")[1].split())


def test_help_does_not_wait_for_jax():
    code = """
import runpy
sys.argv = ["main.py", "--help"]
try:
    runpy.run_path("main.py", run_name="__main__")
except SystemExit:
    pass
"""
    assert not {"jax", "numpy", "cifar_jax"} & modules(code)


def test_training_imports_nothing_of_other_modes():
    others = {"cifar_jax.compare", "cifar_jax.exchange", "cifar_jax.overview", "torch", "sklearn"}
    assert not others & modules("from cifar_jax import train")


@pytest.mark.parametrize(
    ("kind", "steps", "end"),
    [("exponential", 60, 100), pytest.param("linear", 20, 10, marks=pytest.mark.long)],
)
def test_lr_find_suggests_and_leaves_no_trace_in_a_run(
    kind, steps, end, reference, program, tmp_path
):
    run = shutil.copytree(reference, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    test = (f"--config.lr_find.{k}={v}" for k, v in (("range", kind), ("steps", steps)))
    ends = ("--config.lr_find.start_lr=1e-4", f"--config.lr_find.end_lr={end}")
    out, _ = finish(program(*QUICK, *test, *ends, "--mode=lr_find", f"--workdir={run}"))
    found = json.loads((run / "lr_find.json").read_text())
    assert found["range"] == kind and "steepest" in out and "valley" in out
    assert found["lr"][0] == pytest.approx(1e-4, rel=1e-4)
    assert all(1e-4 <= rate < 10.0 for rate in found["suggestions"].values())
    taken = len(found["lr"])
    assert taken == len(found["loss"]) == len(found["smoothed"]) <= steps
    smoothed = np.array(found["smoothed"])
    if kind == "exponential":  # it ends where the loss has diverged
        assert taken < steps and smoothed[-1] > 4 * smoothed.min() > smoothed[-2]
    after = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert {p.name for p in after.keys() - before.keys()} == {"lr_find.json", "lr_find.png"}
    assert all(after[p] == before[p] for p in before if p != run)


def test_data_mode_counts_and_draws(program, tmp_path):
    out, _ = finish(program(*QUICK, f"--workdir={tmp_path}", "--mode=data"))
    assert "1,501" in out and "296" in out
    images = data.load("digits", "", "train").images / 255.0
    for field, value in (("mean", images.mean()), ("std", images.std())):
        assert f"normalize.{field}={','.join([f'{value:.4f}'] * 3)}" in out
    for name in ("counts", "samples", "augmented"):
        assert (tmp_path / "data" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------
# real CIFAR-10


@pytest.mark.cifar10
@pytest.mark.slow
def test_the_program_takes_steps_on_cifar10(cifar10_dir, program, tmp_path):
    """A few steps of system 001's recipe, stopped within the first epoch and evaluated.

    The cheapest to evaluate; torch_twin_test.py takes the steps of all five on real images.
    """
    extra = (
        "--config=configs/convnet.py",
        f"--config.data.dir={cifar10_dir}",
        "--config.stop_after=0.02",
        f"--workdir={tmp_path}/run",
        "--config.report=False",
    )
    finish(program(*extra))
    made = result(tmp_path / "run")
    assert made["dataset"]["sizes"] == {"train": 50000, "test": 10000}
    assert made["status"] == "stopped" and made["steps"] == 16
    assert 2.0 < made["last"]["eval_loss"] < 2.4  # about ln 10
