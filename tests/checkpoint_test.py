"""Checkpoints under faults: damaged ones are named and passed over, sound ones always found."""

import asyncio
import gc
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_jax import InputError, checkpoint, sharding
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.metrics import Metrics
from cifar_jax.steps import TrainState

PLACE = sharding.replicated(sharding.make_mesh())
TX = optax.adam(1e-3)


def state_at(step, value=None):
    """A small state whose arrays all follow from `step`; its weights have a file of their own."""
    rng = np.random.default_rng(step)
    params = {"fc": {"kernel": jnp.asarray(rng.normal(size=(400, 100)), jnp.float32)}}
    if value is not None:
        params = jax.tree.map(lambda x: jnp.full_like(x, value), params)
    statistics = {"bn": {"mean": jnp.asarray(rng.normal(size=10), jnp.float32)}}
    moments = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(size=x.shape) if x.ndim else step, x.dtype),
        TX.init(params),
    )
    step = jnp.asarray(step, jnp.int32)
    state = TrainState(step, params, statistics, moments, jax.random.key(3))
    return jax.device_put(state, PLACE)


def sums(step=0):
    """The sums of an epoch under way; all follow from `step`."""
    return jax.device_put(jax.tree.map(lambda x: x + step, Metrics.zeros(10)), PLACE)


def saved(folder, losses):
    """A directory with a checkpoint at each step of {step: eval loss}."""
    with Checkpoints(folder, PLACE) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(state_at(step), sums(step), {"train_seconds": 1.5}, loss)
            checkpoints.wait()
    return folder


def latest(folder):
    """The step that a run would go on from; its state is checked against what was saved."""
    with Checkpoints(folder, PLACE) as checkpoints:
        found = checkpoints.restore_latest(state_at(0), sums())
    if found is None:
        return None
    state, metrics, meta = found
    assert meta["train_seconds"] == 1.5
    step = int(state.step)
    want = jax.tree.leaves((state_at(step), sums(step)))
    for ours, theirs in zip(jax.tree.leaves((state, metrics)), want, strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = map(jax.random.key_data, (ours, theirs))
        np.testing.assert_array_equal(ours, theirs)
    return step


def best(folder):
    with Checkpoints(folder, PLACE, read_only=True) as checkpoints:
        return int(checkpoints.restore_best(state_at(0)).step)


def array_files(folder, step, item="model"):
    """The files that hold the weights of `step`, or its moments ("training"), largest first."""
    paths = [p for p in (folder / str(step) / item).rglob("d/*") if p.stat().st_size > 10_000]
    assert paths
    return sorted(paths, key=lambda p: -p.stat().st_size)


def test_nothing_saved_is_nothing_found(tmp_path):
    assert latest(tmp_path / "c") is None
    with pytest.raises(InputError, match="holds no evaluated checkpoint"):
        best(tmp_path / "c")


@pytest.mark.parametrize("losses, then", [({4: 0.1}, 4), ({4: 0.5, 5: 0.1, 6: 0.3}, 5)])
def test_the_best_of_a_run_that_is_alive(losses, then, tmp_path, capsys):
    """It deletes what was the best between the reader's look and its reading."""
    folder = saved(tmp_path / "c", {1: 0.9, 2: 0.2, 3: 0.5})
    with Checkpoints(folder, PLACE, read_only=True) as reader:
        saved(folder, losses)
        assert not (folder / "2").exists()
        assert int(reader.restore_best(state_at(0)).step) == then
    assert capsys.readouterr().err == ""


@pytest.mark.case(15)
def test_latest_and_best_are_both_kept(tmp_path):
    """The newest is not the best: neither is lost, and no more than three are kept."""
    folder = saved(tmp_path / "c", {1: 0.9, 2: 0.2, 3: 0.5, 4: 0.7, 5: 0.6})
    assert (latest(folder), best(folder)) == (5, 2)
    assert {int(p.name) for p in folder.iterdir() if p.name.isdigit()} == {2, 4, 5}


@pytest.mark.case(16)
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_loss_that_is_no_number_is_never_best(tmp_path, bad):
    folder = saved(tmp_path / "c", {1: 0.9, 2: bad, 3: 1.5})
    assert (latest(folder), best(folder)) == (3, 1)


@pytest.mark.case(7)
@pytest.mark.parametrize("item", ["model", "training"])
def test_every_flipped_bit_is_noticed(item, tmp_path, rng):
    """Orbax alone restores flipped array bytes without a word."""
    whole = saved(tmp_path / "whole", {1: 0.5, 2: 0.4})
    noticed = 0
    for i in range(6):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        path = array_files(folder, 2, item)[0]
        content = bytearray(path.read_bytes())
        place = int(rng.integers(len(content)))
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        found = latest(folder)  # what it restores is compared with what was saved
        if found == 1:
            noticed += 1
            assert [p for p in folder.iterdir() if p.name.startswith("damaged-2-")]
            assert best(folder) == 1
    assert noticed  # a flip in what nobody reads does no harm


def test_orbax_alone_does_not_notice(tmp_path, monkeypatch, rng):
    """Without our checksums a flipped weight comes back: they are what the test above tests."""
    monkeypatch.setattr(checkpoint.zlib, "crc32", lambda content: 0)
    folder = saved(tmp_path / "c", {1: 0.5})
    path = array_files(folder, 1)[0]
    whole = path.read_bytes()
    outcomes = []
    for place in rng.integers(len(whole) // 4, len(whole), 4):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            outcomes.append(latest(folder))
        except (AssertionError, InputError) as error:
            outcomes.append(type(error).__name__)
    assert "AssertionError" in outcomes, outcomes


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.case(8, 9)
@pytest.mark.parametrize(
    "harm",
    [
        lambda step: truncate(array_files(step.parent, step.name)[0]),
        lambda step: array_files(step.parent, step.name)[0].write_bytes(b""),
        lambda step: array_files(step.parent, step.name)[0].unlink(),
        lambda step: shutil.rmtree(step / "training"),
        lambda step: truncate(next((step / "meta").glob("metadata"))),
        lambda step: next((step / "meta").glob("metadata")).write_text('{"version": 3}'),
        lambda step: truncate(step / "model" / "_METADATA"),
        lambda step: truncate(step / "metrics" / "metrics"),
        lambda step: (step / "_CHECKPOINT_METADATA").write_text("{"),
        lambda step: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in step.iterdir()],
    ],
    ids=[
        *("truncated arrays", "empty arrays", "deleted arrays", "deleted item"),
        *("truncated meta", "changed meta", "truncated _METADATA", "truncated metrics"),
        *("truncated root metadata", "empty folder"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm, capsys, request):
    folder = saved(tmp_path / "c", {1: 0.5, 2: 0.4})
    harm(folder / "2")
    step = latest(folder)
    if request.node.callspec.id not in ("truncated metrics", "truncated root metadata"):
        assert step == 1  # Orbax does not need those
    if step == 1:
        said = capsys.readouterr().err
        assert str(folder / "2") in said and "set aside" in said
        with Checkpoints(folder, PLACE) as checkpoints:  # and step 2 can be saved again
            checkpoints.save(state_at(2), sums(2), {"train_seconds": 1.5}, 0.4)
        assert latest(folder) == 2
    assert best(folder) in (1, 2)


def test_reads_that_fail_together_are_told_once(tmp_path, monkeypatch, caplog):
    """Orbax gives up at the first: what the others met is nobody's, and Python logs tracebacks."""
    folder = saved(tmp_path / "c", {1: 0.5})

    async def read():
        raise ValueError("a rotten array")

    async def read_two():
        tasks = [asyncio.create_task(read()) for _ in range(2)]
        await asyncio.sleep(0.01)
        await tasks[0]

    def restore(*args, **kwargs):
        asyncio.run(read_two())

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", restore)
    with pytest.raises(InputError, match="cannot be read: a rotten array"):
        latest(folder)
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.case(14)
def test_all_damaged_refuses_to_start_over(tmp_path):
    folder = saved(tmp_path / "c", {1: 0.5, 2: 0.4})
    for step in (1, 2):
        truncate(array_files(folder, step)[0])
    for _ in range(2):  # nothing is set aside: it says so again
        with pytest.raises(InputError, match="no older checkpoint is sound; to start over, delete"):
            latest(folder)


def test_what_was_set_aside_still_refuses_to_start_over(tmp_path):
    """A loss that cannot be read: set aside before Orbax looks; there is no older one."""
    folder = saved(tmp_path / "c", {1: 0.5})
    truncate(folder / "1" / "metrics" / "metrics")
    for _ in range(2):
        with pytest.raises(InputError, match="no older checkpoint is sound; to start over, delete"):
            latest(folder)


def test_a_save_killed_at_the_loss_is_no_damage(tmp_path):
    folder = saved(tmp_path / "c", {1: 0.5})
    (folder / "1").rename(folder / "1.orbax-checkpoint-tmp")
    truncate(folder / "1.orbax-checkpoint-tmp" / "metrics" / "metrics")
    assert latest(folder) is None


@pytest.mark.case(10)
def test_an_empty_folder_with_a_number_is_no_checkpoint(tmp_path):
    folder = saved(tmp_path / "c", {1: 0.5})
    (folder / "7").mkdir()
    assert latest(folder) == 1
    assert best(folder) == 1


@pytest.mark.case(11)
def test_foreign_files_are_left_alone(tmp_path):
    folder = saved(tmp_path / "c", {1: 0.5})
    (folder / "notes.txt").write_text("mine")
    (folder / "backup" / "metrics").mkdir(parents=True)
    (folder / "backup" / "metrics" / "metrics").write_text("mine")
    before = sorted(folder.rglob("*"))
    assert (latest(folder), best(folder)) == (1, 1)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.case(1)
def test_what_a_killed_save_left_is_cleaned(tmp_path):
    folder = saved(tmp_path / "c", {1: 0.5})
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    assert latest(folder) == 1
    assert not (folder / "2.orbax-checkpoint-tmp").exists()


def test_looking_touches_nothing(tmp_path):
    folder = saved(tmp_path / "c", {1: 0.5, 2: 0.4})
    truncate(array_files(folder, 2)[0])
    before = sorted(folder.rglob("*"))
    assert best(folder) == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.case(26)
def test_another_format_is_refused_not_passed_over(tmp_path, monkeypatch):
    folder = saved(tmp_path / "c", {1: 0.5})
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    with pytest.raises(InputError, match="has format 3, not 99"):
        latest(folder)
    assert (folder / "1").is_dir()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(
            lambda params: {"head": params["fc"]},
            r"model\['params'\]\['fc'\]\['kernel'\] is float32\[400, 100\] there, missing here",
            marks=pytest.mark.case(26),
        ),
        pytest.param(
            lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
            r"is float32\[400, 100\] there, bfloat16\[400, 100\] here",
            marks=pytest.mark.case(25),
        ),
        pytest.param(
            lambda params: jax.tree.map(lambda x: x[:300], params),
            r"is float32\[400, 100\] there, float32\[300, 100\] here",
            marks=pytest.mark.case(26),
        ),
    ],
    ids=["renamed", "another dtype", "another shape"],
)
def test_another_network_is_refused_by_name(change, says, tmp_path):
    """Orbax would cast the dtype without a word."""
    folder = saved(tmp_path / "c", {1: 0.5})
    state = state_at(0)
    with (
        Checkpoints(folder, PLACE) as checkpoints,
        pytest.raises(InputError, match="does not fit this run: .*" + says),
    ):
        checkpoints.restore_latest(state.replace(params=change(state.params)), sums())
    assert latest(folder) == 1


@pytest.mark.case(39)
def test_a_save_waits_for_the_one_before(tmp_path):
    """Six in a row: none is lost but those that the rule lets go."""
    folder = tmp_path / "c"
    with Checkpoints(folder, PLACE) as checkpoints:
        for step in range(1, 7):
            loss = 0.1 if step == 2 else 0.5
            checkpoints.save(state_at(step), sums(step), {"train_seconds": 1.5}, loss)
    assert sorted(int(p.name) for p in folder.iterdir()) == [2, 5, 6]
    assert latest(folder) == 6 and best(folder) == 2


def test_saves_leave_nothing_in_memory(tmp_path):
    """As TensorStore's metrics did, which Orbax asks for at every save (see checkpoint.py)."""
    objects = {}
    with Checkpoints(tmp_path / "c", PLACE) as checkpoints:
        for step in range(1, 41):
            checkpoints.save(state_at(step), sums(step), {"train_seconds": 1.5}, 1 / step)
            if step in (20, 40):
                checkpoints.wait()
                gc.collect()
                objects[step] = len(gc.get_objects())
    assert objects[40] - objects[20] < 20 * 10


@pytest.mark.case(12)
def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    folder = saved(tmp_path / "c", {1: 0.5})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with (
        Checkpoints(folder, PLACE) as checkpoints,
        pytest.raises(InputError, match=r"could not be written \(0 MiB are free.*make room"),
    ):
        checkpoints.save(state_at(2), sums(2), {"train_seconds": 1.5}, 0.4)
    monkeypatch.undo()
    assert latest(folder) == 1


@pytest.mark.case(12)
def test_a_save_that_fails_underway_is_told(tmp_path, monkeypatch):
    """What Orbax reports only when waited for."""
    folder = saved(tmp_path / "c", {1: 0.5})
    with Checkpoints(folder, PLACE) as checkpoints:

        def fail():
            raise ValueError("No space left on device")

        monkeypatch.setattr(checkpoints.manager, "wait_until_finished", fail)
        with pytest.raises(InputError, match="could not be written .No space left on device"):
            checkpoints.wait()
        monkeypatch.undo()
    assert latest(folder) == 1


@pytest.mark.case(8)
def test_a_damaged_best_gives_way_to_the_next(tmp_path, capsys):
    folder = saved(tmp_path / "c", {1: 0.2, 2: 0.5, 3: 0.4})
    truncate(array_files(folder, 1)[0])
    assert best(folder) == 3
    assert "passed over" in capsys.readouterr().err


def test_meta_holds_a_checksum_of_itself(tmp_path):
    folder = saved(tmp_path / "c", {1: 0.5, 2: 0.4})
    path = next((folder / "2" / "meta").glob("metadata"))
    meta = json.loads(path.read_text())
    meta["train_seconds"] = 99.0
    path.write_text(json.dumps(meta))
    assert latest(folder) == 1
