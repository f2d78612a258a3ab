"""The search: proposals that follow from the seed, ranked on held-out images, resumable."""

import json
import signal

import optuna
import pytest
from running import QUICK, finish, wait_for

from cifar_jax import InputError, search
from configs import quickstart

SMALL = (
    *(*QUICK, "--mode=search", "--config.search.trials=4", "--config.search.at_once=2"),
    *("--config.search.epochs=0.5", "--config.data.validation=200"),
    "--config.search.lr=(1e-3, 1e-1)",
)


def config_of(**fields):
    config = quickstart.get_config()
    config.data.validation = 200
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.long
def test_a_search_that_was_interrupted_goes_on(program, tmp_path):
    process = program(*SMALL, f"--workdir={tmp_path}")
    wait_for(lambda: (tmp_path / "round-0" / "checkpoints").exists(), process)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process, 75)
    assert out.endswith("the same command goes on from there\n")
    assert json.loads((tmp_path / "search.json").read_text())["status"] == "interrupted"
    out, _ = finish(program(*SMALL, f"--workdir={tmp_path}"))
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["status"] == "done" and (tmp_path / "search.png").exists()
    accuracies = [trial["accuracy"] for trial in found["trials"]]
    assert accuracies == sorted(accuracies, reverse=True) and len(accuracies) == 4
    assert f"{found['best']['lr']:.4g}" in out and f"{accuracies[0]:.2f} %" in out
    config = config_of(**{"search.at_once": 2, "search.lr": (1e-3, 1e-1)})
    ranges, by_number = (
        search.make_ranges(config),
        sorted(found["trials"], key=lambda t: t["number"]),
    )
    study = search.open_study(tmp_path / "search.db")
    for first in (0, 2):
        proposed = search.propose(study.trials[:first], ranges, config)
        assert proposed == [{n: t[n] for n in ranges} for t in by_number[first : first + 2]]
        replicas = json.loads((tmp_path / f"round-{first // 2}" / "seeds.json").read_text())
        for trial, replica in zip(by_number[first:], replicas["replicas"]):
            assert replica["lr"] == trial["lr"] and "test" not in replica
            assert trial["accuracy"] == replica["last"]["accuracy"]
    again, _ = finish(program(*SMALL, f"--workdir={tmp_path}"))
    assert again == out[-len(again) :]  # nothing but the table


def test_proposals_lie_in_their_ranges_and_learn_from_those_before():
    config = config_of(**{"search.sampler": "tpe", "search.at_once": 20})
    ranges = search.make_ranges(config)
    first = search.propose([], ranges, config)
    assert first == search.propose([], ranges, config)
    for proposal in first:
        assert 1e-5 <= proposal["lr"] <= 1e-3 and 1e-5 <= proposal["weight_decay"] <= 1e-4
    done = [
        optuna.trial.create_trial(params=p, distributions=ranges, value=-abs(p["lr"] - 1e-4))
        for p in first
    ]
    second = search.propose(done, ranges, config)
    assert second == search.propose(done, ranges, config) != first


def test_an_epoch_that_was_not_reached_counts_as_no_image_right():
    replicas = [
        {"eval_accuracy": [10.0, 30.0], "status": "done"},
        {"eval_accuracy": [20.0], "status": "diverged"},
    ]
    assert search.measure(replicas, seeds=2, epochs=2)[0] == {
        **{"accuracy": 15.0, "eval_accuracy": [[10.0, 30.0], [20.0]], "diverged": 1}
    }
    assert [m["accuracy"] for m in search.measure(replicas, seeds=1, epochs=2)] == [20.0, 10.0]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"data.validation": 0}, "held-out"),
        ({"search.sampler": "grid"}, "choose one of random, tpe"),
        ({"search.trials": 15}, "no multiple"),
        ({"search.lr": (1e-3, 1e-5)}, "lowest and the highest"),
        ({"search.lr": (0.0, 1e-5)}, "lowest and the highest"),
        ({"search.lr": (1e-3,)}, "lowest and the highest"),
        ({"search.lr": (), "search.weight_decay": ()}, "neither"),
        ({"search.epochs": 0.0}, "more than 0"),
        ({"replicas.lr": (1e-3,)}, "sets config.replicas.lr and weight_decay itself"),
        ({"seeds": 0}, "at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_searches_that_cannot_be_are_refused(fields, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        search.search(config_of(**fields), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_study_of_which_a_part_cannot_be_read(tmp_path):
    """Opening it reads only some of its pages."""
    config = config_of(**{"search.lr": (1e-3, 1e-1)})
    ranges = search.make_ranges(config)
    study = search.open_study(tmp_path / "whole.db")
    for lr in (1e-3, 1e-2):
        figures = {"accuracy": 50.0, "eval_accuracy": [[50.0]], "diverged": 0}
        proposal = {name: lr if name == "lr" else span.low for name, span in ranges.items()}
        search.add_trial(study, proposal, ranges, figures)
    whole = (tmp_path / "whole.db").read_bytes()
    refused = 0
    for page in range(1, len(whole) // 4096):
        path = tmp_path / f"{page}.db"
        path.write_bytes(whole[: page * 4096] + b"\xff" * 4096 + whole[(page + 1) * 4096 :])
        try:
            assert len(search.open_study(path).get_trials()) <= 2
        except InputError as error:
            assert f"{path} cannot be read" in str(error)
            refused += 1
    assert refused


def test_a_study_that_cannot_be_read(tmp_path):
    (tmp_path / "search.db").write_bytes(b"no database" * 99)
    with pytest.raises(InputError, match="search.db cannot be read"):
        search.open_study(tmp_path / "search.db")
