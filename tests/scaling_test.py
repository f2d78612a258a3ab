"""What a step on eight devices sends, read in the compiled program."""

import pathlib
import sys

import jax
import pytest

from cifar_jax import sharding, timing
from cifar_jax.experiment import make_experiment
from cifar_jax.models.layers import convolve, plain_convolutions
from configs import resnet

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "scripts"))

import scaling  # noqa: E402


def test_collectives_are_read_from_a_program_s_text():
    text = """
  %a = (f32[3,2]{1,0}, /*index=1*/bf16[4]{0}) all-reduce(%x, %y), channel_id=1
  ROOT %b = pred[] all-reduce(%z), channel_id=2
  %c = u8[8,2]{1,0:T(8,128)} all-gather-start(%w), dimensions={0}
  %d = f32[4]{0} fusion(%a), metadata={op_name="all-reduce(no)"}
"""
    found = [("all-reduce", [24, 8]), ("all-reduce", [1]), ("all-gather", [16])]
    assert scaling.collectives(text) == found


@pytest.mark.parametrize("parts", [1, 8])
def test_a_step_sends_gradients_sums_and_nothing_else(parts):
    """All-reduces only, as many bytes as gradients, metrics and BatchNorm's sums have; with a
    part for each device they are all joined."""
    config = resnet.get_config("")
    config.model.widths, config.batch_size = (4, 8, 8, 8), 32
    config.ghost_batches = parts
    sizes = {"train": 64, "test": 64}
    exp = make_experiment(config, splits=timing.random_splits(sizes))
    found = scaling.step_collectives(exp)
    assert {kind for kind, _ in found} == {"all-reduce"}
    state = exp.abstract_state()
    gradients = sum(4 * x.size for x in jax.tree.leaves(state.params))
    statistics = sum(4 * x.size for x in jax.tree.leaves(state.batch_stats))
    metrics = 4 * (1 + 1 + 3 + 10 * 10 + 1)  # loss, finite, hits, confusion, count
    sent = sum(sum(sizes) for _, sizes in found)
    layers = len(state.batch_stats)
    if parts == 1:  # each layer's two sums forward and two backward: the gradients of its scale
        # and bias among them
        assert len(found) <= 2 * layers + 4
        assert gradients + statistics <= sent <= gradients + 2 * statistics + metrics
    else:
        assert len(found) <= 2
        assert gradients + statistics <= sent <= gradients + statistics + metrics


def test_a_grouped_convolution_gathers_no_images(rng):
    """As XLA does for the gradient of a grouped kernel."""
    x, kernel = rng.normal(size=(16, 6, 6, 6)), rng.normal(size=(3, 3, 2, 9))
    shard = sharding.make_shard_batch(sharding.make_mesh())

    def text(convolve):
        def gradient(x, kernel):
            return jax.grad(lambda k: (convolve(shard(x), k) ** 2).sum())(kernel)

        return jax.jit(gradient).lower(x, kernel).compile().as_text()

    def plain(x, kernel):
        with plain_convolutions():
            return convolve(x, kernel, 1, groups=3)

    ours = scaling.collectives(text(lambda x, kernel: convolve(x, kernel, 1, groups=3)))
    assert {kind for kind, _ in ours} == {"all-reduce"}
    assert "all-gather" in {kind for kind, _ in scaling.collectives(text(plain))}


def test_a_dataset_in_shares_would_be_sent(monkeypatch):
    """What the counting must notice."""
    monkeypatch.setattr(scaling, "SIZES", {"train": 512, "test": 64})
    monkeypatch.setattr(scaling, "ROUNDS", 1)
    monkeypatch.setattr(scaling, "STEPS", 1)
    found = scaling.compare_placements()
    assert found["whole"]["collectives"] == 0
    batch = resnet.get_config("").batch_size * 32 * 32 * 3
    assert found["split"]["bytes"] >= batch
    assert found["split"]["bytes_held"] * 8 == found["whole"]["bytes_held"]
