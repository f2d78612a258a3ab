"""The pure functions of the experiment: order, step, evaluation, devices."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import sharding
from cifar_jax.augment import make_augment
from cifar_jax.compilation import once_options
from cifar_jax.dataset import Dataset
from cifar_jax.experiment import make_experiment
from cifar_jax.metrics import Metrics
from cifar_jax.models import create_model
from cifar_jax.models.layers import in_pieces
from cifar_jax.optim import Schedules, constant, make_lookahead, make_optimizer
from cifar_jax.steps import (
    VIEWS,
    apply_in_parts,
    init_state,
    make_batches,
    make_evaluate,
    make_order,
    make_train_step,
    repeat,
    shuffled,
)
from cifar_jax.timing import random_splits

AUGMENT = make_augment(
    ops=("random_crop", "random_flip", "normalize"),
    random_crop={"padding": 4},
    normalize={"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
)
NORMALIZE = make_augment(
    ops=("normalize",), normalize={"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
)


@pytest.fixture
def dataset(rng):
    return Dataset(
        jnp.asarray(rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 10, 100), jnp.int32),
    )


def start(*args, **kwargs):
    """init_state in one program, as Experiment's: operation by operation it takes longer."""
    return jax.jit(lambda: init_state(*args, **kwargs), compiler_options=once_options())()


@functools.cache
def beginning(dtype):
    """Model, optimizer and initial state, compiled once."""
    model = create_model("resnet", num_classes=10, widths=(4, 8, 8, 8), dtype=dtype)
    tx = make_optimizer(name="adam", schedule=constant(1e-3))
    return model, tx, start(jax.random.key(3), model, tx)


def setup(batch_size=32, n=100, dtype="float32", **kwargs):
    model, tx, state = beginning(dtype)
    kwargs = {"augment": AUGMENT, **kwargs}
    step = make_train_step(model, tx, batch_size=batch_size, num_examples=n, **kwargs)
    return model, tx, step, jax.tree.map(jnp.copy, state)  # for some tests donate it


# ------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 100, 1501, 4096, 50000])
def test_shuffled_is_a_permutation(n):
    order = shuffled(jax.random.key(n), jnp.arange(n), n)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_shuffled_is_uniform():
    """Over many keys every example stands at every place equally often, and neighbours are
    unrelated."""
    n, keys = 50, 20000
    orders = np.asarray(
        jax.vmap(lambda k: shuffled(k, jnp.arange(n), n))(jax.random.split(jax.random.key(0), keys))
    )
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    deviation = (counts - keys / n) / np.sqrt(keys / n * (1 - 1 / n))
    assert np.abs(deviation).max() < 5
    assert 0.9 < (deviation**2).mean() < 1.1
    pairs = np.bincount(orders[:, 0] * n + orders[:, 1], minlength=n * n)
    pairs = pairs[np.arange(n * n) // n != np.arange(n * n) % n]
    expected = keys / (n * (n - 1))
    chi2 = ((pairs - expected) ** 2 / expected).sum()
    assert abs(chi2 - len(pairs)) < 5 * np.sqrt(2 * len(pairs))


def test_a_large_order_has_no_pattern():
    order = np.asarray(shuffled(jax.random.key(1), jnp.arange(50000), 50000)).astype(float)
    for lag in (1, 2, 32, 128, 512):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 0.02
    halves = order[:25000].mean()
    assert abs(halves - 24999.5) < 5 * 50000 / np.sqrt(12 * 25000)


def test_an_epoch_sees_every_example_once(dataset):
    """Batches of 32, 32, 32 and 4 of 100; the next epoch has another order."""
    numbered = dataset.replace(labels=jnp.arange(100))  # a label is the example's own number
    batches = make_batches(batch_size=32, num_examples=100, augment=lambda key, images: images)
    batches = jax.jit(batches, static_argnums=3)
    sizes = (32, 32, 32, 4) * 2
    seen = [batches(jax.random.key(0), t, numbered, size)[1] for t, size in enumerate(sizes)]
    first, second = np.concatenate(seen[:4]), np.concatenate(seen[4:])
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    np.testing.assert_array_equal(np.sort(second), np.arange(100))
    assert (first != second).any()


def test_every_step_has_random_numbers_of_its_own(dataset):
    """For augmentation and for dropout, over two epochs; another run has others."""
    batches = make_batches(
        batch_size=25, num_examples=100, augment=lambda key, images: jax.random.key_data(key)
    )
    batches, seen = jax.jit(batches), []
    for run in (jax.random.key(0), jax.random.key(1)):
        for t in range(8):
            augment_key, _, dropout_key = batches(run, t, dataset)
            seen += [augment_key, jax.random.key_data(dropout_key)]
    assert len({np.asarray(key).tobytes() for key in seen}) == 32


def test_drop_last_leaves_out_the_smaller_batch(dataset):
    labelled = dataset.replace(labels=jnp.arange(100, dtype=jnp.int32))
    kwargs = {"batch_size": 32, "num_examples": 100, "augment": lambda key, images: images}
    batches, whole = make_batches(**kwargs, drop_last=True), make_batches(**kwargs)
    key = jax.random.key(4)
    epochs = [[batches(key, t, labelled)[1] for t in steps] for steps in ((0, 1, 2), (3, 4, 5))]
    orders = [np.concatenate(rows) for rows in epochs]
    assert all(len(set(order)) == 96 for order in orders)
    assert set(range(100)) - set(orders[0]) != set(range(100)) - set(orders[1])
    for t in range(3):  # the same order as with the last batch
        np.testing.assert_array_equal(epochs[0][t], whole(key, t, labelled)[1])
        np.testing.assert_array_equal(epochs[1][t], whole(key, 4 + t, labelled)[1])


def test_alternating_flip_mirrors_every_other_epoch(dataset):
    """Each image in exactly one of two consecutive epochs, the same again two epochs later."""
    labelled = dataset.replace(labels=jnp.arange(100, dtype=jnp.int32))
    kwargs = {"batch_size": 25, "num_examples": 100, "augment": lambda key, images: images}
    batches = jax.jit(make_batches(**kwargs, alternating_flip=True))
    originals = np.asarray(dataset.images)

    def mirrored(key):
        """Whether image i was mirrored in epoch e: [e, i]."""
        seen = np.full((4, 100), -1)
        for t in range(16):
            images, rows = map(np.asarray, batches(key, t, labelled)[:2])
            for image, row in zip(images, rows):
                flipped = (image == originals[row, :, ::-1]).all()
                assert flipped != (image == originals[row]).all()
                seen[t // 4, row] = flipped
        return seen

    seen, other = mirrored(jax.random.key(1)), mirrored(jax.random.key(2))
    np.testing.assert_array_equal(seen[0] + seen[1], 1)
    np.testing.assert_array_equal(seen[:2], seen[2:])
    assert 30 < seen[0].sum() < 70
    assert (seen[0] != other[0]).any()


# -------------------------------------------------------------------------------------------- step


def test_step_is_pure_and_counts(dataset):
    _, _, step, state = setup()
    step = jax.jit(step, static_argnames="size")
    one, metrics = step(state, dataset)
    again, _ = step(state, dataset)
    assert int(one.step) == 1 and float(metrics.count) == 32
    jax.tree.map(np.testing.assert_array_equal, one.params, again.params)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), one.batch_stats, state.batch_stats)
    assert all(jax.tree.leaves(moved))


def test_one_call_of_many_steps_is_many_calls(dataset):
    _, _, step, state = setup()
    zeros = Metrics.zeros(10)
    order = make_order(batch_size=32, num_examples=100)
    many, sums = jax.jit(repeat(step, order, 3, 32))(state, zeros, dataset)
    single = jax.jit(repeat(step, order, 1, 32))
    one, singles = state, zeros
    for _ in range(3):
        one, singles = single(one, singles, dataset)
    assert int(many.step) == int(one.step) == 3
    np.testing.assert_allclose(sums.loss, singles.loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_steps_in_a_call_are_what_is_fast_here(monkeypatch):
    """On CPU some; none together where XLA's own convolutions would run in the loop; elsewhere
    all."""
    config = importlib.import_module("configs.vgg").get_config()
    splits = random_splits({"train": 64, "test": 8})

    def make():
        return make_experiment(config, splits=splits, class_names=tuple("0123456789"))

    config.ghost_batches = 8
    exp = make()
    assert exp.config.batch_size == 32 and exp.in_calls(3) == [1, 1, 1]
    config.ghost_batches = 1
    exp = make()
    assert exp.in_calls(37) == [16, 16, 5] and exp.in_calls(16) == [16] and exp.in_calls(1) == [1]
    exp = dataclasses.replace(exp)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert exp.in_calls(37) == [16, 16, 5]
    exp = dataclasses.replace(exp)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert len(exp.train) == 64 and exp.steps_per_call == 2  # an epoch
    assert exp.in_calls(5) == [5]


def test_the_order_of_many_steps_is_that_of_each():
    """Over an epoch's end too."""
    order = make_order(batch_size=32, num_examples=100, drop_last=True)
    key, steps = jax.random.key(5), jnp.arange(1, 8)
    together = jax.jit(order)(key, steps)
    assert together.shape == (7, 32)
    for step, rows in zip(steps, together, strict=True):
        np.testing.assert_array_equal(rows, order(key, step))


def test_a_call_of_many_steps_draws_its_order_before_its_loop(dataset):
    """The walk has no known end: within the loop a GPU would wait for the host at every turn."""
    _, _, step, state = setup()
    order = make_order(batch_size=32, num_examples=100)
    run = repeat(step, order, 3, 32)
    jaxpr = jax.make_jaxpr(run)(state, Metrics.zeros(10), dataset)

    def inner(jaxpr, within=False):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "while":
                yield within
            for value in jax.tree.leaves([*eqn.params.values()]):
                closed = getattr(value, "jaxpr", value)
                if hasattr(closed, "eqns"):
                    yield from inner(closed, within or eqn.primitive.name == "scan")

    assert [*inner(jaxpr.jaxpr)] == [False]


def test_sum_reduction_is_batch_times_the_mean(dataset):
    """Through plain SGD one step shows the gradient itself."""
    model = create_model(
        "convnet", num_classes=10, widths=(2, 4, 4, 4, 4), head_widths=(8, 8, 8), dropout=0.0
    )
    deltas = {}
    for reduction in ("mean", "sum"):
        tx = make_optimizer(name="sgd", momentum=0.0, schedule=constant(1.0))
        step = make_train_step(
            model, tx, batch_size=32, num_examples=100, augment=AUGMENT, reduction=reduction
        )
        state = start(jax.random.key(0), model, tx)
        after, _ = jax.jit(step)(state, dataset)
        deltas[reduction] = jax.tree.map(jnp.subtract, after.params, state.params)
    for a, b in zip(*(jax.tree.leaves(deltas[r]) for r in ("sum", "mean"))):
        np.testing.assert_allclose(a, 32 * b, rtol=1e-3, atol=1e-5)


def test_golden_first_step():
    """Root mean squares after one step on fixed input, as this test gave them when the first
    version was complete (CPU, jax 0.10.2). They change only if initialisation, order, augmentation,
    model, loss or optimizer do: then say why in the commit that changes them."""
    rng = np.random.default_rng(7)
    images = jnp.asarray(rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, 100), jnp.int32)
    _, _, step, state = setup()
    after, metrics = jax.jit(step)(state, Dataset(images, labels))

    def rms(tree):
        leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(tree)]
        return float(np.sqrt(np.mean(np.concatenate(leaves) ** 2)))

    measured = {
        "params": rms(state.params),
        "delta": rms(jax.tree.map(jnp.subtract, after.params, state.params)),
        "batch_stats": rms(after.batch_stats),
        "loss": float(metrics.loss) / 32,
    }
    golden = {"params": 0.143275, "delta": 9.99993e-4, "batch_stats": 0.645949, "loss": 2.892384}
    assert measured == pytest.approx(golden, rel=1e-4)


def test_learning_reduces_the_loss(dataset):
    _, _, step, state = setup(augment=NORMALIZE)
    order = make_order(batch_size=32, num_examples=100)
    run = jax.jit(repeat(step, order, 1, 32), donate_argnums=0)
    losses = []
    for _ in range(60):
        state, metrics = run(state, Metrics.zeros(10), dataset)
        losses.append(metrics.summary()["loss"])
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def airbench(n=100, lookahead=None):
    model = create_model("airbench", num_classes=10, widths=(4, 8, 8))
    schedule = Schedules(constant(1e-4), freeze={"whiten": 2})
    tx = make_optimizer(name="sgd", nesterov=True, schedule=schedule, weight_decay=1.0)
    kwargs = {"batch_size": 32, "num_examples": n, "augment": NORMALIZE, "drop_last": True}
    step = make_train_step(model, tx, reduction="sum", lookahead=lookahead, **kwargs)
    images = NORMALIZE(
        jax.random.key(0), jnp.asarray(np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3)))
    )
    state = start(jax.random.key(3), model, tx, images=images, lookahead=lookahead is not None)
    return step, state


def test_a_frozen_layer_needs_no_gradient(dataset):
    """The step that leaves it out is the step that throws it away, and a cheaper one."""
    step, state = airbench()
    run = jax.jit(step, static_argnames="frozen")
    every, fewer = (run.lower(state, dataset, frozen=f).compile() for f in ((), ("whiten",)))
    for _ in range(2):
        state, _ = every(state, dataset)
    kept = state.params["whiten"]["bias"]
    assert kept.any()
    without, _ = fewer(state, dataset)
    thrown_away, _ = every(state, dataset)
    np.testing.assert_array_equal(without.params["whiten"]["bias"], kept)
    np.testing.assert_array_equal(thrown_away.params["whiten"]["bias"], kept)
    for a, b in zip(jax.tree.leaves(without.params), jax.tree.leaves(thrown_away.params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    flops, least = (program.cost_analysis()["flops"] for program in (every, fewer))
    assert least < 0.95 * flops


def test_lookahead_acts_on_weights_and_statistics(dataset):
    lookahead = make_lookahead(total_steps=3, every=2, decay=0.5, power=1)
    step, state = (f(x) for f, x in zip((jax.jit, lambda s: s), airbench(lookahead=lookahead)))
    plain, other = (f(x) for f, x in zip((jax.jit, lambda s: s), airbench()))
    start = {"params": state.params, "batch_stats": state.batch_stats}
    for _ in range(2):
        state, _ = step(state, dataset)
        other, _ = plain(other, dataset)
    share = 0.5**2 * 2 / 3
    fast = {"params": other.params, "batch_stats": other.batch_stats}
    blended = jax.tree.map(lambda s, f: share * s + (1 - share) * f, start, fast)
    for name, tree in blended.items():
        for mine in (getattr(state, name), state.slow[name]):
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(tree)):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    last, _ = step(state, dataset)  # the end: the slow weights are the result
    for name in blended:
        jax.tree.map(np.testing.assert_array_equal, getattr(last, name), state.slow[name])


# -------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def whole():
    """100 images, and what two batches of 50 of them give: (dataset, metrics, logits)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    dataset = Dataset(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, 100), jnp.int32))
    model, _, _, state = setup()
    evaluate = make_evaluate(model, batch_size=50, transform=NORMALIZE)
    return dataset, *evaluate(state, dataset)


@pytest.mark.case(23)
@pytest.mark.parametrize("batch_size", [1, 7, 32, 100, 512])
def test_every_image_counts_once_at_any_batch_size(whole, batch_size):
    dataset, expected, reference = whole
    model, _, _, state = setup()
    metrics, logits = make_evaluate(model, batch_size=batch_size, transform=NORMALIZE)(
        state, dataset
    )
    assert float(metrics.count) == 100 and float(metrics.confusion.sum()) == 100
    np.testing.assert_array_equal(metrics.confusion, expected.confusion)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(logits, reference, atol=1e-4)
    rows = np.bincount(dataset.labels, minlength=10)
    np.testing.assert_array_equal(metrics.confusion.sum(1), rows)


@pytest.mark.parametrize("batch_size, taken", [(64, 32), (100, 25), (37, 37)])
def test_one_cpu_evaluates_pieces_of_a_batch(whole, batch_size, taken, monkeypatch):
    """But whole where that would come to pieces of a few images."""
    dataset, expected, reference = whole
    model, _, _, state = setup()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    sizes = []
    in_pieces(lambda x: sizes.append(len(x)) or x[:, 0, 0], jnp.zeros((batch_size, 2, 2, 3)))
    assert sizes == [taken]  # traced once, for all of them
    evaluate = make_evaluate(model, batch_size=batch_size, transform=NORMALIZE)
    metrics, logits = evaluate(state, dataset)
    np.testing.assert_array_equal(metrics.confusion, expected.confusion)
    np.testing.assert_allclose(logits, reference, atol=1e-4)


@pytest.mark.parametrize("tta", VIEWS)
def test_views_are_averaged_as_by_hand(dataset, tta):
    """Section 3.1: mirrored pairs of the image and of two windows of the reflected image."""
    model, _, _, state = setup()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = np.asarray(NORMALIZE(jax.random.key(0), dataset.images))

    def net(x):
        return np.asarray(model.apply(variables, jnp.asarray(x), train=False))

    def mirror(x):
        return 0.5 * net(x) + 0.5 * net(x[:, :, ::-1])

    padded = np.stack([np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="reflect") for x in images])
    shifts = mirror(padded[:, :32, :32]), mirror(padded[:, 2:, 2:])
    by_hand = {
        "none": lambda: net(images),
        "mirror": lambda: mirror(images),
        "multicrop": lambda: 0.5 * mirror(images) + 0.5 * (shifts[0] + shifts[1]) / 2,
    }[tta]()
    _, logits = make_evaluate(model, batch_size=32, transform=NORMALIZE, tta=tta)(state, dataset)
    np.testing.assert_allclose(logits, by_hand, atol=2e-5)
    if tta != "none":
        assert np.abs(logits - net(images)).max() > 1e-2


def test_augmented_evaluation_follows_the_step(dataset):
    model, _, _, state = setup()
    evaluate = make_evaluate(model, batch_size=32, transform=AUGMENT)
    first = evaluate(state, dataset)[1]
    np.testing.assert_array_equal(first, evaluate(state, dataset)[1])
    assert (first != evaluate(state.replace(step=jnp.int32(9)), dataset)[1]).any()


# ----------------------------------------------------------------------------------------- devices


def losses(dataset, devices, sizes, float64=False):
    """The loss of each step on the first `devices` devices."""
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    _, tx, step, state = setup(
        shard=sharding.make_shard_batch(mesh), dtype="float64" if float64 else "float32"
    )
    if float64:
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (state.params, state.batch_stats))
        state = state.replace(params=wide[0], batch_stats=wide[1], opt_state=tx.init(wide[0]))
    whole = sharding.replicated(mesh)
    run = jax.jit(step, out_shardings=(whole, whole), static_argnames="size")
    state, data = jax.device_put((state, dataset), whole)
    out = []
    for size in sizes:
        state, metrics = run(state, data, size=size)
        out.append(float(metrics.loss) / float(metrics.count))
    return out


@pytest.mark.long  # main_test.py has it of the program
def test_devices_do_not_change_the_losses(dataset):
    """Same seed: the same order and augmentation on any number of devices; BatchNorm over the
    whole batch."""
    sizes = (32, 32, 32, 4) * 2
    one = losses(dataset, 1, sizes)
    for devices in (2, 8):
        np.testing.assert_allclose(losses(dataset, devices, sizes), one, rtol=1e-5)


@pytest.mark.long
def test_devices_do_not_change_the_losses_over_many_steps(dataset):
    """In float64, where no rounding can tip a near-tie of a max-pool (in float32 one does, sooner
    or later)."""
    with jax.enable_x64(True):
        sizes = (32, 32, 32, 4) * 3
        many, one = losses(dataset, 8, sizes, True), losses(dataset, 1, sizes, True)
        np.testing.assert_allclose(many, one, rtol=1e-9)


def test_the_batch_is_split_over_the_devices(dataset):
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    shard = sharding.make_shard_batch(mesh)
    out = jax.jit(lambda x: shard(x) * 1)(jnp.zeros((32, 4)))
    assert {s.data.shape for s in out.addressable_shards} == {(4, 4)}
    whole = jax.jit(lambda x: shard(x) * 1)(jnp.zeros((33, 4)))
    assert {s.data.shape for s in whole.addressable_shards} == {(33, 4)}


def test_ghost_batches_have_statistics_of_their_own(rng):
    """Logits and statistics are those of each part alone; a batch that does not divide is whole."""
    model, _, _, state = setup()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = jnp.asarray(rng.normal(size=(12, 32, 32, 3)), jnp.float32)
    key = jax.random.key(0)
    logits, stats = apply_in_parts(model, variables, images, key, parts=3)
    alone = [apply_in_parts(model, variables, images[i : i + 4], key) for i in (0, 4, 8)]
    np.testing.assert_allclose(logits, np.concatenate([a[0] for a in alone]), atol=1e-5)
    mean = jax.tree.map(lambda *x: np.mean(x, 0), *(a[1] for a in alone))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), stats, mean)
    whole, _ = apply_in_parts(model, variables, images, key)
    assert np.abs(whole - logits).max() > 1e-3
    undivided, _ = apply_in_parts(model, variables, images, key, parts=5)
    np.testing.assert_array_equal(undivided, whole)


@pytest.mark.case(23)
def test_undivided_batches_are_refused():
    sharding.check_batch_size(512, 8, "devices")
    with pytest.raises(
        ValueError, match="batch_size 100 does not divide over 8 devices; .*: 96 and 104"
    ):
        sharding.check_batch_size(100, 8, "devices")
    with pytest.raises(ValueError, match="sizes that do: 8$"):
        sharding.check_batch_size(3, 8, "devices")


def test_a_step_moves_nothing_between_host_and_device(dataset):
    _, _, step, state = setup()
    run = jax.jit(functools.partial(step, size=32))
    state, _ = run(state, dataset)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(run(state, dataset))


VARIANTS = [f"{name}:tuned" for name in ("vgg", "convnet", "resnet", "mixture", "dilated")]
VARIANTS += [f"{name}:short" for name in ("vgg", "convnet", "resnet")]
VARIANTS += ["mixture:sequential", "speedrun:96", "speedrun:muon"]


@functools.cache
def shapes_of(system, variant):
    """Those of the parameters before and after a step."""
    config = importlib.import_module(f"configs.{system}").get_config(variant)
    splits = random_splits({"train": 2 * config.batch_size, "test": 8})
    exp = make_experiment(config, splits=splits, class_names=tuple("0123456789"))
    state = exp.abstract_state()
    after, _ = jax.eval_shape(exp.step, state, exp.train)
    return [jax.tree.map(jnp.shape, tree.params) for tree in (state, after)]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_a_config_has_a_step_and_the_same_parameters(name):
    """Traced, not run: all its fields are known to those who read them. A recipe leaves the network
    as it is."""

    system, _, variant = name.partition(":")
    before, after = shapes_of(system, variant)
    assert before == after
    if variant in ("tuned", "short"):
        assert before == shapes_of(system, "")[0]
