"""Many seeds at once: each replica is the run by itself, also where the whole was interrupted."""

import json
import signal

import jax
import numpy as np
import pytest
from running import QUICK, TIMES, finish, metrics, result, wait_for

from cifar_jax import InputError, seeds, workdir
from cifar_jax.experiment import make_experiment
from cifar_jax.metrics import Metrics
from cifar_jax.replicas import STRATEGIES, make_replicas
from cifar_jax.steps import repeat
from configs import convnet, quickstart


def config_of(module, **fields):
    config = module.get_config()
    config.update_from_flattened_dict(fields)
    return config


def records_of(folder, i):
    """What metrics.jsonl would say of replica i by itself."""
    named = ("replica", "seed", *TIMES)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in named} for r in lines if r["replica"] == i]


@pytest.mark.slow
def test_replicas_are_the_runs_by_themselves_bit_for_bit(reference, program, tmp_path):
    """Interrupted within an epoch and resumed, too. Two settings of two seeds; replica 0 is the
    recipe itself from seed 0, replica 3 has another seed, learning rate and weight decay."""
    many = (
        *(*QUICK, "--mode=seeds", "--config.seeds=2", f"--workdir={tmp_path / 'many'}"),
        *("--config.replicas.lr=(1e-2, 2e-2)", "--config.replicas.weight_decay=(1e-4, 1e-3)"),
    )
    process = program(*many)
    log = tmp_path / "many" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 4, process)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process, 75)
    assert out.endswith("the same command goes on from there\n")
    before = json.loads((tmp_path / "many" / "seeds.json").read_text())
    assert before["status"] == "interrupted" and 19 <= before["steps"] < 57
    out, _ = finish(program(*many))
    assert f"at epoch {before['steps'] / 19:g}\n" in out
    other = (
        "--config.seed=1",
        "--config.schedule.peak_lr=2e-2",
        "--config.optim.weight_decay=1e-3",
    )
    finish(program(*QUICK, *other, f"--workdir={tmp_path / 'single'}"))
    found = json.loads((tmp_path / "many" / "seeds.json").read_text())
    assert found["status"] == "done" and found["strategy"] == "sequence"
    for i, single in ((0, reference), (3, tmp_path / "single")):
        assert records_of(tmp_path / "many", i) == metrics(single)
        for key in ("seed", "status", "best", "last", "test", "per_class", "epochs"):
            assert found["replicas"][i][key] == result(single)[key], key
    accuracies = [replica["test"]["accuracy"] for replica in found["replicas"]]
    assert [s["test"]["mean"] for s in found["settings"]] == [
        np.mean(accuracies[:2]),
        np.mean(accuracies[2:]),
    ]
    assert found["settings"][1]["difference"]["n"] == 2
    out, _ = finish(program(*many))
    assert "finished" in out and "more than the first" in out
    with pytest.raises(InputError, match="of mode 'seeds', not 'train'"):
        workdir.check_config(tmp_path / "many", {}, ())


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=() if name == "map" else pytest.mark.long) for name in STRATEGIES],
)
def test_replicas_spread_over_devices_train_as_one_alone(strategy):
    """Four replicas on eight devices, two with another learning rate; the tolerance is that of
    other orders of summation over three steps."""
    config = config_of(quickstart, batch_size=8, epochs=1, seeds=2)
    config.model.widths = (4, 4, 4, 4)
    peak = config.schedule.peak_lr
    config.replicas.lr = (peak, 2 * peak)
    config.replicas.strategy = strategy
    exp = make_experiment(config, shard_batches=False)
    replicas = make_replicas(config)
    run = seeds.Replicas(exp, None, None, replicas, test=True)
    call = (1, 8, ())
    program = run.compile_call(call)
    for _ in range(3):
        run.state, run.metrics = program(run.state, run.metrics, exp.train)
    saved, beside = run.saved()
    assert int(saved.step) == run.step == 3
    for i, seed, rate in ((0, 0, peak), (3, 1, 2 * peak)):
        config.schedule.peak_lr = rate
        one = make_experiment(config, shard_batches=False)
        single = jax.jit(repeat(one.step, one.order, *call))
        state, sums = exp.init_state(seed), jax.device_put(Metrics.zeros(10), exp.placement)
        for _ in range(3):
            state, sums = single(state, sums, exp.train)
        ours = (saved.params, saved.batch_stats, beside["sums"].loss)
        ours = jax.tree.leaves(jax.tree.map(lambda x, i=i: x[i], ours))
        theirs = jax.tree.leaves((state.params, state.batch_stats, sums.loss))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    run.take(saved, beside)
    np.testing.assert_array_equal(run.join(run.state).step, [3, 3, 3, 3])
    whole = run.state
    run.state = jax.tree.map(lambda x: x * np.nan if x.dtype == np.float32 else x, whole)
    config.stop_after = 0.5  # looked at where the run stops, and not wherever it is interrupted
    assert not exp.ends_epoch(exp.end_step) and run.find_divergence(exp.end_step - 1) is None
    assert run.find_divergence(exp.end_step) == exp.end_step
    run.state, run.diverged = whole, 0 * run.diverged
    if strategy == "sequence":  # one that diverges is told; the others go on
        broken = run.state[0].replace(
            params=jax.tree.map(lambda x: x * np.nan, run.state[0].params)
        )
        run.diverged[0] = 2
        assert run.find_divergence(exp.total_steps) is None
        run.state = (broken,)
        assert run.find_divergence(exp.total_steps) == exp.total_steps
        assert [*run.diverged] == [2, *[exp.total_steps] * 3]


PHASES = """
from configs import quickstart

def get_config():
    c = quickstart.get_config()
    c.schedule = {
        **{"name": "phases", "epochs": (1, 1, 1), "from_best": True},
        **{"peak_lr": (1e-2, 0.3, 0.0), "weight_decay": (0.0, 0.0, 0.0)},
    }
    c.lookahead.every = 5
    return c
"""


@pytest.mark.parametrize("mode", ["train", pytest.param("seeds", marks=pytest.mark.long)])
def test_a_phase_goes_on_from_the_best_weights(mode, program, tmp_path):
    """The slow ones, too: the second phase ruins what the first learned, the third only measures
    the statistics more exactly."""
    (tmp_path / "phases.py").write_text(PHASES)
    config = f"--config={tmp_path}/phases.py"
    finish(program(config, *QUICK[1:], f"--mode={mode}", f"--workdir={tmp_path / 'run'}"))
    first, ruined, last = (record["eval_loss"] for record in metrics(tmp_path / "run"))
    assert last < first < ruined / 2


def test_settings_times_seeds():
    config = config_of(convnet, seed=5, seeds=2)
    config.data.validation = 100
    config.replicas.lr, config.replicas.weight_decay = (1e-3, 1e-2), (0.0,)
    found = make_replicas(config)
    assert [(r.seed, r.lr, r.weight_decay) for r in found] == [
        *((5, 1e-3, 0.0), (6, 1e-3, 0.0), (5, 1e-2, 0.0), (6, 1e-2, 0.0))
    ]
    peak, decay = (found[0].fields[f"schedule.{n}"] for n in ("peak_lr", "weight_decay"))
    before = config.schedule.peak_lr
    assert peak[0] == 1e-3 and peak[1] / peak[0] == pytest.approx(before[1] / before[0])
    assert decay == (0.0, 0.0) and found[1].fields["data.split_seed"] == 5


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seeds": 0}, "at least 1"),
        ({"replicas.strategy": "pmap"}, "choose one of auto, sequence, map, vmap"),
        ({"replicas.lr": (0.1, -1.0)}, "lr cannot be -1.0"),
        ({"replicas.lr": ("a",)}, "lr cannot be 'a'"),
        ({"replicas.lr": (0.1, 0.2), "replicas.weight_decay": (0.0,) * 3}, "2 values, the other 3"),
        ({"replicas.lr": (0.1, 0.1)}, "twice"),
        ({"on_nonfinite": "rollback"}, "for one run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_replicas_that_cannot_be_are_refused(fields, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        seeds.train_seeds(config_of(quickstart, **fields), tmp_path / "new")
    assert not (tmp_path / "new").exists()
