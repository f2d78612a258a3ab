"""The comparison's arithmetic; the whole mode runs in main_test.py."""

import jax
import numpy as np
import pytest
from scipy import stats

from cifar_jax import InputError
from cifar_jax.compare import Pairs, accuracies, agreement, compare, speeds, summarize
from cifar_jax.exchange import load_torch_twin
from cifar_jax.experiment import make_experiment
from cifar_jax.timing import Sides
from configs import quickstart, speedrun


def pairs(ours, theirs):
    return [{"jax": {"accuracy": a}, "torch": {"accuracy": b}} for a, b in zip(ours, theirs)]


def test_difference_is_the_paired_t_test(rng):
    ours, theirs = rng.normal(60, 1, (2, 6))
    summary = summarize(pairs(ours, theirs))
    reference = stats.ttest_rel(ours, theirs)
    assert summary["difference"]["p_value"] == pytest.approx(reference.pvalue)
    low, high = reference.confidence_interval()
    assert summary["difference"]["interval"] == pytest.approx([low, high])
    mean = stats.t.interval(0.95, 5, ours.mean(), stats.sem(ours))
    assert summary["jax"]["interval"] == pytest.approx(mean)


def test_one_pair_has_no_interval():
    summary = summarize(pairs([60.0], [61.0]))
    assert summary["difference"] == {
        **{"n": 1, "mean": -1.0, "sd": None, "interval": None, "p_value": None}
    }


def test_agreement_counts_predictions_and_ties():
    theirs = np.array([[0.0, 1.0, 10.0], [5.0, 5.0001, 0.0], [3.0, 0.0, 0.0]])
    ours = np.array([[0.0, 1.0, 10.0], [5.0002, 5.0001, 0.0], [0.0, 3.0, 0.0]])
    assert agreement(ours, theirs) == {
        **{"images": 3, "largest_difference": 0.3, "predictions_differ": 2, "ties": 1}
    }


def test_the_tables_have_a_row_a_form_and_survives_gaps():
    run = {**pairs([60.0], [61.0])[0], "seed": 0, "same_weights": agreement(np.eye(3), np.eye(3))}
    comparison = {
        "model": "vgg",
        "batch_size": 32,
        "settings": {"steps_trained": 10, "dtypes": ["float32"], "compiled": True},
        "runs": [run],
        "accuracy": summarize([run]),
        "timing": {
            "jax float32": {"images_per_second": 300.0, "first_steps": 9.0, "peak_memory": 2**21},
            "torch float32": {"images_per_second": 200.0, "first_steps": 1.0, "peak_memory": 2**20},
            "torch.compile float32": {"error": "no compiler"},
        },
    }
    assert "| vgg | 10 of 32 | 1 | 3 | 60.00 | 61.00 | -1.00 " in accuracies([comparison])
    row = "| vgg, 32 | float32 | 300 | 200 | - | 1.50 | 9.0, 1.0, - | 2, 1, - |"
    assert row in speeds(comparison)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("compare.epochs", -3.0, "compare.epochs must be more than 0"),
        ("compare.epochs", float("nan"), "compare.epochs must be more than 0"),
        ("compare.seeds", 0, "compare.seeds must be at least 1"),
        ("compare.test_images", -5, "compare.test_images must be at least 0"),
        ("compare.dtypes", ("float16",), "must be of float32, bfloat16"),
        ("compare.dtypes", (), "must be of float32, bfloat16"),
        ("optim.name", "muon", "optimizer 'muon' has no counterpart"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_begins(
    field, value, told, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = quickstart.get_config()
    config.model.widths = (4, 8, 8, 8)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=told):
        compare(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def speedrun_sides():
    """Both sides of the speedrun's recipe, narrow, on the digits: two epochs of two steps each."""
    config = speedrun.get_config()
    config.data.name = "digits"
    config.model.widths = (8, 8, 8)
    config.batch_size = 512
    config.epochs, config.compare.epochs, config.compare.test_images = 2, 2.0, 200
    config.schedule.pct_start, config.schedule.freeze.whiten = 0.5, 1
    config.lookahead.every = 2
    return Sides(make_experiment(config), load_torch_twin())


def test_batches_are_the_recipes_own():
    """The rest of an epoch is left out or makes a smaller batch, as its config says."""
    sides = speedrun_sides()
    assert [sides.size(t) for t in range(4)] == [512] * 4
    images, labels = sides.torch_batch(sides.exp.init_state(), 2)
    assert images.shape == (512, 3, 32, 32) and labels.shape == (512,)
    config = sides.exp.config.copy_and_resolve_references()
    config.drop_last = False
    kept = Sides(make_experiment(config), None)
    rest = len(kept.exp.train) - 2 * 512
    assert [kept.size(t) for t in range(4)] == [512, 512, rest, 512]


@pytest.mark.long  # torch_twin_test.py climbs its ladder
def test_the_speedrun_is_the_same_on_both_sides():
    """To 1e-3 only: the digits are grey, and whitening enlarges what rounding leaves of colour."""
    sides = speedrun_sides()
    recipe = sides.make_recipe(sides.exp.init_state())
    assert recipe.lookahead["every"] == 2 and recipe.freeze == {"whiten": 2}
    pair = Pairs(sides).train_pair(0)
    ours, theirs = (np.array(pair[side]["losses"]) for side in ("jax", "torch"))
    assert len(ours) == 4
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    np.testing.assert_allclose(ours, theirs, rtol=5e-3)
    assert pair["same_weights"]["largest_difference"] < 1e-4
