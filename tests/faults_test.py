"""Faults injected for real into runs of the program; every run must end as if there had been none.

Marked with the cases of docs/reliability.md. Faults of files are in data_test.py,
checkpoint_test.py and fuzz_run_test.py, those of several processes in distributed_test.py.
"""

import errno
import functools
import os
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from running import QUICK, ROOT, assert_same_run, finish, metrics, result, send, strike, wait_for

from cifar_jax import InputError, sharding, train
from cifar_jax import workdir as files
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.steps import TrainState

sys.path.insert(0, str(ROOT / "scripts"))

import soak  # noqa: E402

SIGKILL, SIGTERM, SIGINT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def fail(*args):
    raise MemoryError("planted")


def hold(path, *args):
    """Wait until `path` exists."""
    while not path.exists():
        time.sleep(0.02)


def plant_nan(collection, run, step):
    """NaN in the first array of the state's params or batch_stats."""
    import jax
    import jax.numpy as jnp

    leaves, treedef = jax.tree.flatten(getattr(run.state, collection))
    planted = treedef.unflatten([jnp.full_like(leaves[0], jnp.nan), *leaves[1:]])
    run.state = run.state.replace(**{collection: jax.device_put(planted, run.exp.placement)})


KILLED = -SIGKILL
MOMENTS = {  # (cases, place, call, before, after, exit code, step reached); 19 steps an epoch
    "killed before the first save": ((1,), "save", 1, (SIGKILL,), (), KILLED, None),
    "killed while saving": ((1, 21), "save", 2, (), (SIGKILL,), KILLED, None),
    "killed between log and save": ((38,), "log", 2, (), (SIGKILL,), KILLED, None),
    "killed in the report": ((40,), "report", 1, (SIGKILL,), (), KILLED, None),
    "killed before the result": ((40,), "result", 2, (SIGKILL,), (), KILLED, None),
    "SIGTERM while the data are read": ((20,), "data", 1, (SIGTERM,), (), -SIGTERM, None),
    "SIGTERM before the first step": ((20,), "restore", 1, (), (SIGTERM,), 75, 0),
    "SIGTERM within an epoch": ((3, 20), "step", 5, (SIGTERM,), (), 75, 25),
    "signals while compiling": ((6, 20), "compile", 1, (SIGINT,) * 3, (), 75, 6),
    "SIGTERM in an evaluation": ((6,), "evaluate", 1, (SIGTERM,), (), 75, 19),
    "signals while saving": ((4,), "save", 1, (SIGTERM,), (SIGINT, SIGTERM), 75, 19),
    "SIGTERM in the last step": ((20,), "step", 12, (SIGTERM,), (), 0, 57),
    "signals in the report": ((40,), "report", 1, (SIGTERM, SIGINT), (), 0, 57),
}
LONG = (
    *("killed before the first save", "SIGTERM while the data are read"),
    *("SIGTERM in the last step", "signals in the report"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(
            name,
            marks=[pytest.mark.case(*MOMENTS[name][0]), *([pytest.mark.long] * (name in LONG))],
        )
        for name in MOMENTS
    ],
)
def test_struck_and_started_again(moment, reference, program, tmp_path):
    """Killed or signalled at a moment; the same command again equals the uninterrupted run."""
    _, place, call, before, after, code, step = MOMENTS[moment]
    run = (*QUICK, f"--workdir={tmp_path}/run", f"--config.report={place == 'report'}")
    fault = functools.partial(strike, place, call, send(*before), send(*after))
    told, _ = finish(program(*run, fault=fault), code=code)
    assert told.endswith("the same command goes on from there\n") == (code == 75)
    if code < 0:
        assert not (tmp_path / "run" / "result.json").exists()
    else:
        left = result(tmp_path / "run")
        assert left["status"] == ("interrupted" if code else "done") and left["steps"] == step
    kept = [p.name for p in (tmp_path / "run").glob("checkpoints/*") if p.name.isdigit()]
    newest = max(map(int, kept), default=0)
    assert step is None or newest == step
    out, _ = finish(program(*run))
    if code:  # it goes on: from the start it would come to the same end
        assert ("resuming" in out) == bool(newest)
        assert not newest or f"at epoch {newest / 19:g}\n" in out
    assert_same_run(tmp_path / "run", reference)


def ctrl_c_as_the_data_are_read():
    signal.signal(SIGINT, signal.default_int_handler)  # tests in a shell's background ignore it
    strike("data", 1, before=send(SIGINT))


def test_ctrl_c_before_training_ends_without_a_traceback(program, tmp_path):
    fault = ctrl_c_as_the_data_are_read
    _, err = finish(program(*QUICK, f"--workdir={tmp_path}/run", fault=fault), code=130)
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize("signum, step", [(SIGTERM, 19), (SIGKILL, 0)])
def test_checkpoints_lie_as_far_apart_as_asked(signum, step, reference, program, tmp_path):
    """None after the first epoch, unless the run is interrupted there; that is never the best."""
    run = (*QUICK, f"--workdir={tmp_path}/run", "--config.save_every=2")
    fault = functools.partial(strike, "log", 1, after=send(signum))
    finish(program(*run, fault=fault), code=75 if step else KILLED)
    found = {path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")}
    assert found == ({str(step)} if step else set())
    if step:
        with Checkpoints(tmp_path / "run" / "checkpoints", None, read_only=True) as checkpoints:
            assert checkpoints.best_step() is None
    out, _ = finish(program(*run))
    assert ("resuming" in out) == bool(step)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")} <= {"19", "38", "57"}
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.case(2)
def test_a_program_that_fails_right_after_a_save_waits_for_it(reference, program, tmp_path):
    run = (*QUICK, f"--workdir={tmp_path}/run")
    fault = functools.partial(strike, "save", 2, after=fail)
    _, err = finish(program(*run, fault=fault), code=1)
    assert "MemoryError: planted" in err
    assert (tmp_path / "run" / "checkpoints" / "38").is_dir()
    out, _ = finish(program(*run))
    assert "at epoch 2" in out
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize("collection", ["params", "batch_stats", "opt_state", "slow"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_every_part_of_a_state_must_be_finite(collection, bad):
    x = {"a": jnp.ones(3), "count": jnp.zeros((), jnp.int32)}
    state = TrainState(jnp.zeros((), jnp.int32), x, x, x, jax.random.key(0), x)
    assert train.all_finite(state)
    assert not train.all_finite(state.replace(**{collection: {**x, "a": x["a"].at[1].set(bad)}}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "collection",
    [
        pytest.param("params", marks=pytest.mark.case(17)),
        pytest.param("batch_stats", marks=pytest.mark.case(18)),
    ],
)
def test_nan_is_never_saved(collection, reference, program, tmp_path):
    """Planted at the end of the second epoch, whose loss is finite; without it the run goes on."""
    run = (*QUICK, f"--workdir={tmp_path}/run")
    fault = functools.partial(plant_later, collection)
    _, err = finish(program(*run, fault=fault), code=3)
    assert "diverged at step 38" in err and "Traceback" not in err
    left = result(tmp_path / "run")
    assert (left["status"], left["diverged_at"], left["best"]["epoch"]) == ("diverged", 38, 1)
    out, _ = finish(program(*run))
    assert "at epoch 1" in out
    assert_same_run(tmp_path / "run", reference)


def plant_later(collection):
    """In the state that the second look for a divergence sees."""
    from cifar_jax import train

    original, count = train.Run.find_divergence, 0

    def look(run, step):
        nonlocal count
        count += 1
        if count == 2:
            plant_nan(collection, run, step)
        return original(run, step)

    train.Run.find_divergence = look


DIVERGING = ("--config.optim.name=sgd", "--config.schedule.peak_lr=1e30")


@pytest.mark.slow
@pytest.mark.case(17)
@pytest.mark.parametrize("steps_per_call", [1, pytest.param(6, marks=pytest.mark.long)])
def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(steps_per_call, program, tmp_path):
    run = (*QUICK, *DIVERGING, f"--config.steps_per_call={steps_per_call}")
    _, err = finish(program(*run, f"--workdir={tmp_path}/run"), code=3)
    assert err.count("\n") == 1 and "--config.on_nonfinite=rollback" in err
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert metrics(tmp_path / "run") == []
    assert result(tmp_path / "run")["diverged_at"] == 2


def newest(workdir):
    return max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=step_of)


def step_of(path):
    return int(path.name)


def array_files(step):
    """The files that can hold the weights of a checkpoint."""
    return [p for p in (step / "model").rglob("d/*") if p.stat().st_size > 1000]


def flip(path):
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def stop_after(program, workdir, epochs):
    finish(program(*QUICK, f"--workdir={workdir}", f"--config.stop_after={epochs}"))


@pytest.mark.slow
@pytest.mark.case(17)
def test_rollback_goes_on_from_the_checkpoint_at_half_the_rate(reference, program, tmp_path):
    """And a run that is interrupted after it goes on at that rate."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rollback = (*QUICK, "--config.on_nonfinite=rollback")
    fault = functools.partial(plant_later, "params")
    _, err = finish(program(*rollback, f"--workdir={whole}", fault=fault))
    assert "diverged at step 38; from step 19 on again at 0.5 of the learning rate" in err
    assert result(whole)["status"] == "done" and result(whole)["rollbacks"] == [19]
    rates = [[r["lr"] for r in metrics(run)] for run in (whole, reference)]
    assert [ours / full for ours, full in zip(*rates)] == pytest.approx([1, 0.5, 0.5])
    fault = functools.partial(plant_and_interrupt, 4 + 4 + 5)
    finish(program(*rollback, f"--workdir={parts}", fault=fault), code=75)
    assert result(parts)["steps"] == 38 + 6
    finish(program(*rollback, f"--workdir={parts}"))
    assert_same_run(whole, parts)


def plant_and_interrupt(call):
    plant_later("params")
    strike("step", call, send(SIGTERM))


@pytest.mark.long
@pytest.mark.case(17)
def test_rollbacks_come_to_an_end(program, tmp_path):
    run = (*QUICK, *DIVERGING, "--config.on_nonfinite=rollback", f"--workdir={tmp_path}/run")
    _, err = finish(program(*run), code=3)
    assert err.count("from step 0 on again") == 3
    assert result(tmp_path / "run")["rollbacks"] == [0, 0, 0]


@pytest.mark.long
@pytest.mark.case(22)
def test_a_run_moves_from_8_to_1_to_2_devices(reference, program, tmp_path):
    """The same images in the same order; sums over devices round in another way."""
    workdir = tmp_path / "run"
    for devices, epochs in ((8, 1), (1, 2), (2, 3)):
        run = (*QUICK, f"--workdir={workdir}", f"--config.stop_after={epochs}")
        finish(program(*run, devices=devices))
    for ours, theirs in zip(metrics(workdir), metrics(reference)):
        assert ours.keys() == theirs.keys()
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.case(34)
@pytest.mark.parametrize("harm", ["torn entries", "no such folder"])
def test_a_bad_compilation_cache_changes_nothing(harm, reference, cache, program, tmp_path):
    folder = tmp_path / "cache"
    evaluate = (*QUICK, f"--workdir={reference}", "--mode=evaluate")
    before, _ = finish(program(*evaluate))
    if harm == "torn entries":
        shutil.copytree(cache, folder)
        for path in folder.glob("*-cache"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        folder = "/proc/nothing"
    variables = {"JAX_COMPILATION_CACHE_DIR": str(folder)}
    out, err = finish(program(*evaluate, variables=variables))
    assert out == before and "Traceback" not in err


@pytest.mark.case(35)
def test_a_missing_gpu_is_one_sentence(program, tmp_path):
    """Asked for by name, as its user would."""
    run = (*QUICK, f"--workdir={tmp_path}/run")
    asked = program(*run, prefix=(), variables={"JAX_PLATFORMS": "cuda"})
    _, err = finish(asked, code=2)
    assert err.count("\n") == 1 and "cuda" in err


@pytest.mark.case(35)
def test_a_gpu_that_jax_cannot_use_is_not_passed_over(monkeypatch, tmp_path):
    """As where the driver does not match, or the CPU's list was installed."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  1.0")
    monkeypatch.setattr(sharding, "NVIDIA_DRIVER", tmp_path / "version")
    sharding.first_device()  # JAX_PLATFORMS=cpu: asked for
    asked = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(InputError, match="there is an NVIDIA GPU, but this JAX cannot use it"):
            sharding.first_device()
    finally:
        jax.config.update("jax_platforms", asked)


@pytest.mark.case(35)
def test_no_memory_is_one_sentence(program, tmp_path):
    fault = functools.partial(strike, "step", 6, before=ask_for_40_terabytes)
    _, err = finish(program(*QUICK, f"--workdir={tmp_path}/run", fault=fault), code=2)
    assert err.count("\n") == 1 and "has not enough memory" in err and "batch_size" in err
    assert (tmp_path / "run" / "checkpoints" / "19").is_dir()


def ask_for_40_terabytes(*args):
    with jax.transfer_guard("allow"):
        jax.numpy.zeros((10**7, 10**6)).block_until_ready()


@pytest.mark.slow
@pytest.mark.case(7)
def test_a_run_with_a_rotten_checkpoint_ends_as_if_nothing_had_been(reference, program, tmp_path):
    """It goes back one checkpoint, says so, and still equals the uninterrupted run bit for bit."""
    workdir = tmp_path / "run"
    stop_after(program, workdir, 2)
    bad = newest(workdir)
    for path in array_files(bad):
        flip(path)
    out, err = finish(program(*QUICK, f"--workdir={workdir}"))
    assert str(bad) in err and "going on from step 19" in err
    assert "resuming" in out and "Traceback" not in err
    assert_same_run(workdir, reference)


@pytest.mark.slow
@pytest.mark.case(14)
def test_with_no_sound_checkpoint_it_does_not_start_over(program, tmp_path):
    workdir = tmp_path / "run"
    stop_after(program, workdir, 1)
    for path in array_files(newest(workdir)):
        path.write_bytes(b"")
    before = (workdir / "metrics.jsonl").read_text()
    _, err = finish(program(*QUICK, f"--workdir={workdir}"), code=2)
    assert err.count("\n") == 1 and "to start over, delete" in err
    assert (workdir / "metrics.jsonl").read_text() == before
    shutil.rmtree(workdir / "checkpoints")  # told to
    stop_after(program, workdir, 1)
    assert result(workdir)["epochs"] == 1


@pytest.mark.slow
@pytest.mark.case(33)
def test_a_second_trainer_is_refused_and_the_first_goes_on(reference, program, tmp_path):
    workdir, told = tmp_path / "run", tmp_path / "told"
    wait = functools.partial(hold, told)
    first = program(
        *QUICK, f"--workdir={workdir}", fault=functools.partial(strike, "step", 1, wait)
    )
    wait_for(lambda: (workdir / "config.json").exists(), first)
    _, err = finish(program(*QUICK, f"--workdir={workdir}"), code=2)
    assert err.count("\n") == 1 and f"is being trained by process {first.pid} on" in err
    told.touch()
    finish(first)
    assert_same_run(workdir, reference)


def test_where_there_are_no_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", none)
    with files.only_writer(tmp_path / "run") as path:
        assert path == tmp_path / "run"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "a filesystem without locks" in err


@pytest.mark.slow
@pytest.mark.case(12)
def test_a_disk_that_fills_up_loses_nothing(reference, program, tmp_path):
    """No file may grow beyond 8 KiB: the second checkpoint does not reach the disk."""
    workdir = tmp_path / "run"
    stop_after(program, workdir, 1)
    before = metrics(workdir)
    small_files = ("bash", "-c", 'ulimit -f 8; exec "$@"', "-")
    _, err = finish(program(*QUICK, f"--workdir={workdir}", prefix=small_files), code=2)
    last = [line for line in err.splitlines() if line.startswith("main.py: ")]
    assert len(last) == 1 and "those before it are whole" in last[0], err
    finish(program(*QUICK, f"--workdir={workdir}"))
    assert metrics(workdir)[: len(before)] == before
    assert_same_run(workdir, reference)


@pytest.mark.slow
@pytest.mark.case(12)
def test_a_disk_that_refuses_a_line_is_one_sentence(reference, program, tmp_path):
    """The log's, which is small and comes before the checkpoint."""
    fault = functools.partial(strike, "log", 2, before=refuse_to_write)
    _, err = finish(program(*QUICK, f"--workdir={tmp_path}/run", fault=fault), code=2)
    assert err.count("\n") == 1 and "the disk failed at x (No space left on device)" in err
    finish(program(*QUICK, f"--workdir={tmp_path}/run"))
    assert_same_run(tmp_path / "run", reference)


def refuse_to_write(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")


@pytest.mark.slow
@pytest.mark.case(38)
def test_a_lost_or_torn_log_is_made_again_from_the_checkpoint(reference, program, tmp_path):
    """Deleted, then of another shape with a torn end and all files from the year 2096."""
    workdir = tmp_path / "run"
    stop_after(program, workdir, 1)
    (workdir / "metrics.jsonl").unlink()
    stop_after(program, workdir, 2)
    assert [r["epoch"] for r in metrics(workdir)] == [1, 2]
    (workdir / "metrics.jsonl").write_text('{"no": "step"}\n{"epoch": 3, "ste')
    for path in workdir.rglob("*"):
        os.utime(path, (4e9, 4e9))
    finish(program(*QUICK, f"--workdir={workdir}"))
    assert_same_run(workdir, reference)


@pytest.mark.slow
@pytest.mark.case(37)
def test_a_scheduler_s_variables_change_nothing(reference, program, tmp_path):
    """JAX would try to join a cluster of two if it were asked to initialise."""
    stray = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    stray["SLURM_STEP_NODELIST"] = "nowhere[1-2]"
    finish(program(*QUICK, f"--workdir={tmp_path}/run", variables=stray))
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.case(21)
def test_soak(cache, tmp_path):
    """Ten kills at random moments; scripts/soak.py has a hundred."""
    arguments = ["--kills=10", "--epochs=0", "--fork", f"--out={tmp_path}/soak.json"]
    found = soak.main(soak.parse(arguments), cache)
    assert found["survived"] == 10 and found["runs"] >= 1
