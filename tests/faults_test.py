"""Faults injected for real while the program runs; bad input is in main_test.py."""

import os
import shutil
import signal

import pytest
from running import QUICK, assert_same_run, finish, metrics, result, wait_for


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
def test_a_run_with_a_rotten_checkpoint_ends_as_if_nothing_had_been(reference, program, tmp_path):
    """It goes back one checkpoint, says so, and still equals the uninterrupted run bit for bit."""
    workdir = tmp_path / "run"
    stop_after(program, workdir, 2)
    bad = newest(workdir)
    for path in array_files(bad):
        flip(path)
    out, err = finish(program(*QUICK, f"--workdir={workdir}"))
    assert str(bad) in err and "going on from step 24" in err
    assert "resuming" in out and "Traceback" not in err
    assert_same_run(workdir, reference)


@pytest.mark.slow
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
def test_a_second_trainer_is_refused_and_the_first_goes_on(reference, program, tmp_path):
    workdir = tmp_path / "run"
    first = program(*QUICK, f"--workdir={workdir}")
    wait_for(lambda: (workdir / "config.json").exists(), first)
    _, err = finish(program(*QUICK, f"--workdir={workdir}"), code=2)
    assert err.count("\n") == 1 and f"is being trained by process {first.pid} on" in err
    finish(first)
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_signals_in_a_row_and_while_compiling(reference, program, tmp_path):
    """The first, while it loads and compiles, only sets a flag; those after it change nothing."""
    workdir = tmp_path / "run"
    first = program(*QUICK, f"--workdir={workdir}")
    wait_for(lambda: (workdir / "config.json").exists(), first)
    for _ in range(3):
        first.send_signal(signal.SIGINT)
    finish(first, code=75)
    assert result(workdir)["status"] == "interrupted"
    finish(program(*QUICK, f"--workdir={workdir}"))
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_signals_while_saving(reference, program, tmp_path):
    workdir = tmp_path / "run"
    first = program(*QUICK, f"--workdir={workdir}")
    wait_for(lambda: any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")), first)
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGINT)
    finish(first, code=75)
    finish(program(*QUICK, f"--workdir={workdir}"))
    assert_same_run(workdir, reference)


@pytest.mark.slow
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
def test_a_scheduler_s_variables_change_nothing(reference, program, tmp_path):
    """JAX would try to join a cluster of two if it were asked to initialise."""
    stray = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    stray["SLURM_STEP_NODELIST"] = "nowhere[1-2]"
    finish(program(*QUICK, f"--workdir={tmp_path}/run", variables=stray))
    assert_same_run(tmp_path / "run", reference)
