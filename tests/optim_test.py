"""Schedules and optimizers against torch.optim, on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from cifar_jax import InputError
from cifar_jax.optim import (
    Schedules,
    constant,
    exponential_ramp,
    linear_ramp,
    make_lookahead,
    make_optimizer,
    make_schedules,
    one_cycle,
    one_cycle_momentum,
    triangle,
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def torch_one_cycle(optimizer, total_steps, **kwargs):
    """[(lr, momentum or beta1)] of OneCycleLR at every step."""
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, total_steps=total_steps, **kwargs)
    values = []
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        values.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        optimizer.step()
        if step < total_steps - 1:
            scheduler.step()
    return np.array(values)


@pytest.mark.parametrize(
    ("total_steps", "peak", "shape"),
    [
        (
            2352,
            4.02e-2,
            {
                "pct_start": 5 / 24,
                "div_factor": 100.0,
                "final_div_factor": 100.0,
                "anneal": "linear",
            },
        ),
        (19550, 1e-3, {}),
        (97, 0.3, {"pct_start": 0.37, "anneal": "linear"}),
        (
            100,
            1.0,
            {"pct_start": 0.23, "div_factor": 5.0, "final_div_factor": 20.0, "anneal": "cosine"},
        ),
    ],
)
def test_one_cycle_is_torchs(total_steps, peak, shape):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    anneal = {"cosine": "cos", "linear": "linear"}[shape.get("anneal", "cosine")]
    rest = {k: v for k, v in shape.items() if k != "anneal"}
    theirs = torch_one_cycle(optimizer, total_steps, max_lr=peak, anneal_strategy=anneal, **rest)
    steps = np.arange(total_steps)
    ours = one_cycle(peak, total_steps, **shape)(steps)
    assert np.abs(ours - theirs[:, 0]).max() < 1e-7 * peak
    momentum_shape = {k: v for k, v in shape.items() if k in ("pct_start", "anneal")}
    beta = one_cycle_momentum(0.85, 0.95, total_steps, **momentum_shape)(steps)
    assert np.abs(beta - theirs[:, 1]).max() < 1e-7


def test_one_cycle_in_float64_is_torchs_to_1e_12(x64):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    theirs = torch_one_cycle(optimizer, 1000, max_lr=0.1)
    assert np.abs(one_cycle(0.1, 1000)(np.arange(1000)) - theirs[:, 0]).max() < 1e-13


def test_published_values_of_the_two_recipes():
    """systems.md: 002 goes 4.02e-4 -> 4.02e-2 at step 489 -> 4.02e-6 at 2351; 003 4e-5 -> 1e-3 at
    5864 -> 4e-9."""
    resnet = one_cycle(
        4.02e-2, 2352, pct_start=5 / 24, div_factor=100.0, final_div_factor=100.0, anneal="linear"
    )
    np.testing.assert_allclose(
        resnet(np.array([0, 489, 2351])), [4.02e-4, 4.02e-2, 4.02e-6], rtol=1e-3
    )
    mixture = one_cycle(1e-3, 19550)
    np.testing.assert_allclose(mixture(np.array([0, 5864, 19549])), [4e-5, 1e-3, 4e-9], rtol=1e-3)


def test_ramps():
    np.testing.assert_allclose(
        linear_ramp(1.0, 3.0, 5)(np.arange(5)), [1, 1.5, 2, 2.5, 3], rtol=1e-6
    )
    np.testing.assert_allclose(
        exponential_ramp(0.03, 10.0, 200)(np.array([0, 199])), [0.03, 10.0], rtol=1e-5
    )
    values = np.asarray(exponential_ramp(1e-3, 1.0, 4)(np.arange(4)))
    np.testing.assert_allclose(values[1:] / values[:-1], 10.0, rtol=1e-5)


def test_triangle_is_airbenchs(x64):
    """Section 3.1: linear 0.2 -> 1 over int(0.23 * 476) = 109 steps, then to 0.07 at step 476."""
    shape = {"pct_start": 0.23, "start_factor": 0.2, "end_factor": 0.07}
    steps = np.arange(476)
    ours = triangle(1.5e-3, 476, **shape)(steps)
    np.testing.assert_allclose(
        ours, 1.5e-3 * np.interp(steps, [0, 109, 476], [0.2, 1.0, 0.07]), rtol=1e-13
    )
    assert ours.argmax() == 109 and ours[0] == pytest.approx(3e-4)
    schedules = make_schedules(
        **{"name": "triangle", "peak_lr": 1.0, "freeze": {"whiten": 3}},
        **{"total_steps": 476, "steps_per_epoch": 48, **shape},
    )
    assert schedules.frozen(143) == () and schedules.frozen(144) == ("whiten",)
    with pytest.raises(InputError, match="no step before or after"):
        triangle(1.0, 4, **shape)


def test_lookahead_is_the_plain_loop(x64, rng):
    """Section 3.1, over a run of 23 steps that does not end on a multiple of 5."""
    total, decay, power = 23, 0.95, 3
    lookahead = jax.jit(make_lookahead(total_steps=total, every=5, decay=decay, power=power))
    slow = fast = {"w": jnp.asarray(rng.normal(size=4)), "mean": jnp.asarray(rng.normal(size=2))}
    plain_slow = plain = {key: np.asarray(value) for key, value in fast.items()}
    for step in range(1, total + 1):
        move = {key: rng.normal(size=value.shape) for key, value in plain.items()}
        fast = jax.tree.map(jnp.add, fast, move)
        slow, fast = lookahead(slow, fast, step)
        plain = {key: plain[key] + move[key] for key in plain}
        if step % 5 == 0:
            share = 0.95**5 * (step / 23) ** 3
            plain_slow = {key: share * plain_slow[key] + (1 - share) * plain[key] for key in plain}
            plain = plain_slow
        if step == 23:
            plain = plain_slow
        for key in plain:
            np.testing.assert_allclose(fast[key], plain[key], rtol=1e-12)
            np.testing.assert_allclose(slow[key], plain_slow[key], rtol=1e-12)


def test_groups_and_freezing_are_torchs_parameter_groups(x64, rng):
    """BatchNorm's biases at 64 times the rate with 1/64 of the decay; a layer that stops."""
    shapes = {"whiten": {"bias": 3}, "a_bn1": {"bias": 4}, "head": {"kernel": 6, "bias": 2}}

    def draw():
        return {k: {n: rng.normal(size=s) for n, s in v.items()} for k, v in shapes.items()}

    initial, gradients = draw(), [draw() for _ in range(40)]
    schedule = Schedules(constant(1e-3), freeze={"whiten": 25})
    settings = {"momentum": 0.85, "nesterov": True}
    tx = make_optimizer(
        **{"name": "sgd", "schedule": schedule, "weight_decay": 1.4, "norm_bias_factor": 64.0},
        **settings,
    )
    path = run_ours(tx, initial, gradients)
    tensors = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), initial)
    norm = tensors["a_bn1"]["bias"]
    rest = [tensors["whiten"]["bias"], *tensors["head"].values()]
    groups = [
        {"params": rest, "lr": 1e-3, "weight_decay": 1.4},
        {"params": [norm], "lr": 64e-3, "weight_decay": 1.4 / 64},
    ]
    optimizer = SGD(groups, lr=1e-3, **settings)
    for step, gradient in enumerate(gradients):
        for layer, leaves in tensors.items():
            for name, tensor in leaves.items():
                still = layer == "whiten" and step >= 25
                tensor.grad = None if still else torch.tensor(gradient[layer][name])
        optimizer.step()
        for layer, leaves in tensors.items():
            for name, tensor in leaves.items():
                np.testing.assert_allclose(
                    path[step][layer][name], tensor.detach().numpy(), rtol=1e-10
                )
    with pytest.raises(InputError, match="no layer 'whitening'"):
        make_optimizer(name="sgd", schedule=Schedules(constant(0.1), freeze={"whitening": 3})).init(
            initial
        )
    with pytest.raises(InputError, match="norm_bias_factor is for sgd"):
        make_optimizer(name="adam", schedule=constant(0.1), norm_bias_factor=2.0)


def parameters(rng):
    return {"kernel": rng.normal(size=(7, 5)), "bias": rng.normal(size=5)}


def run_torch(
    make, initial, gradients, *, clip_value=None, clip_norm=None, scheduler=None, restart_at=None
):
    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in initial.items()}
    optimizer = make(tensors.values())
    schedule = scheduler(optimizer) if scheduler else None
    path = []
    for step, gradient in enumerate(gradients):
        if restart_at and step == restart_at[0]:
            optimizer = restart_at[1](tensors.values())
        for k, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[k])
        if clip_value:
            torch.nn.utils.clip_grad_value_(tensors.values(), clip_value)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        optimizer.step()
        if schedule and step < len(gradients) - 1:
            schedule.step()
        path.append({k: v.detach().numpy().copy() for k, v in tensors.items()})
    return path


def run_ours(tx, initial, gradients):
    params = jax.tree.map(jnp.asarray, initial)
    state = tx.init(params)

    @jax.jit
    def update(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    path = []
    for gradient in gradients:
        params, state = update(gradient, state, params)
        path.append(jax.device_get(params))
    return path


def assert_same_path(ours, theirs, tolerance):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for key in b:
            np.testing.assert_allclose(
                a[key], b[key], rtol=tolerance, atol=tolerance, err_msg=f"{key}, step {step}"
            )


STEPS = 150
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
CASES = {
    "vgg: SGD momentum": (dict(name="sgd", momentum=0.9), lambda p: SGD(p, 0.01, momentum=0.9), {}),
    "SGD Nesterov, L2": (
        dict(name="sgd", momentum=0.85, nesterov=True, weight_decay=5e-3),
        lambda p: SGD(p, 0.01, momentum=0.85, nesterov=True, weight_decay=5e-3),
        {},
    ),
    "convnet: Adam, L2": (
        dict(name="adam", b2=0.995, weight_decay=1e-2),
        lambda p: ADAM(p, 0.01, betas=(0.9, 0.995), weight_decay=1e-2),
        {},
    ),
    "mixture: Adam, L2, clipped by value": (
        dict(name="adam", weight_decay=1e-2, clip_value=0.1),
        lambda p: ADAM(p, 0.01, weight_decay=1e-2),
        dict(clip_value=0.1),
    ),
    "AdamW": (dict(name="adamw", weight_decay=0.1), lambda p: ADAMW(p, 0.01, weight_decay=0.1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_optimizer_is_torchs(x64, rng, case):
    ours, theirs, clip = CASES[case]
    initial, gradients = parameters(rng), [parameters(rng) for _ in range(STEPS)]
    path = run_ours(make_optimizer(**ours, schedule=constant(0.01)), initial, gradients)
    assert_same_path(path, run_torch(theirs, initial, gradients, **clip), 1e-10)


def test_muon_makes_kernels_orthogonal_and_leaves_the_rest_to_adam(rng):
    """As optax.contrib.muon with its own rate and decay; a kernel's update, as the matrix from
    inputs to outputs, is orthogonal but for what five Newton-Schulz steps leave (0.5 to 1.5)."""
    shapes = {"conv": {"kernel": (3, 3, 4, 6)}, "bn": {"scale": (6,)}, "fc": {"kernel": (6, 10)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda: jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=is_shape)  # noqa: E731
    params, decay, rate = draw(), 0.3, 0.01
    matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
    whole = optax.contrib.muon(
        rate,
        beta=0.8,
        adam_b1=0.8,
        weight_decay=decay,
        adam_weight_decay=decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={
            "conv": {"kernel": matrix},
            "bn": {"scale": None},
            "fc": {"kernel": None},
        },
    )
    ours = make_optimizer(
        name="muon", schedule=constant(rate), weight_decay=decay, b1=0.8, nesterov=True
    )
    sides = [(tx, tx.init(params), params) for tx in (ours, whole)]
    for _ in range(4):
        gradients, after = draw(), []
        for tx, state, p in sides:
            updates, state = tx.update(gradients, state, p)
            after.append((tx, state, optax.apply_updates(p, updates)))
        kernel = sides[0][2]["conv"]["kernel"]
        step = (kernel * (1 - rate * decay) - after[0][2]["conv"]["kernel"]) / rate
        sides = after
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            *(s[2] for s in sides),
        )
        values = np.linalg.svd(np.reshape(step, (36, 6)), compute_uv=False) / (0.2 * 36**0.5)
        assert ((values > 0.5) & (values < 1.5)).all()


def test_clipping_by_global_norm_is_torchs(rng):
    """In float32 and to 1e-5: PyTorch adds 1e-6 to the norm."""
    initial, gradients = parameters(rng), [parameters(rng) for _ in range(STEPS)]
    path = run_ours(
        make_optimizer(name="sgd", clip_norm=1.0, schedule=constant(0.01)), initial, gradients
    )
    theirs = run_torch(lambda p: SGD(p, 0.01, momentum=0.9), initial, gradients, clip_norm=1.0)
    assert_same_path(path, theirs, 1e-5)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_one_cycle_with_cycled_momentum_is_torchs(x64, rng, name):
    initial, gradients = parameters(rng), [parameters(rng) for _ in range(STEPS)]
    schedule = make_schedules(
        name="one_cycle",
        total_steps=STEPS,
        steps_per_epoch=10,
        peak_lr=0.05,
        anneal="linear",
        momentum=(0.85, 0.95),
    )
    ours = run_ours(
        make_optimizer(name=name, weight_decay=1e-3, schedule=schedule), initial, gradients
    )
    make = {
        "adam": lambda p: ADAM(p, weight_decay=1e-3),
        "sgd": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    }

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.05, total_steps=STEPS, anneal_strategy="linear"
        )

    assert_same_path(ours, run_torch(make[name], initial, gradients, scheduler=scheduler), 1e-10)


def test_phases_change_rate_and_decay_and_start_fresh_moments(x64, rng):
    initial, gradients = parameters(rng), [parameters(rng) for _ in range(120)]
    schedule = make_schedules(
        name="phases",
        total_steps=120,
        steps_per_epoch=20,
        epochs=(4, 2),
        peak_lr=(0.02, 0.005),
        weight_decay=(0.1, 0.3),
    )
    assert schedule.restarts == (80,)
    ours = run_ours(make_optimizer(name="adam", schedule=schedule), initial, gradients)
    theirs = run_torch(
        lambda p: ADAM(p, 0.02, weight_decay=0.1),
        initial,
        gradients,
        restart_at=(80, lambda p: ADAM(p, 0.005, weight_decay=0.3)),
    )
    assert_same_path(ours, theirs, 1e-10)


def test_a_single_phase_has_a_value_for_every_step():
    one = {"epochs": (4,), "peak_lr": (0.02,), "weight_decay": (0.1,)}
    schedule = make_schedules(name="phases", total_steps=80, steps_per_epoch=20, **one)
    assert schedule.restarts == ()
    np.testing.assert_allclose(schedule.learning_rate(jnp.arange(80)), np.full(80, 0.02), rtol=1e-6)


def test_what_base_has_for_the_ramps_is_nothing_to_the_others():
    spans = {"total_steps": 80, "steps_per_epoch": 20, "peak_lr": 0.1}
    with_it, without = (
        make_schedules(name="one_cycle", **spans, **more).learning_rate(jnp.arange(80))
        for more in ({"start_lr": 1e-6}, {})
    )
    np.testing.assert_array_equal(with_it, without)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown optimizer 'lion'"):
        make_optimizer(name="lion", schedule=constant(0.1))
    with pytest.raises(InputError, match="unknown schedule 'step'"):
        make_schedules(name="step", total_steps=10, steps_per_epoch=1)
    with pytest.raises(InputError, match="unknown annealing"):
        one_cycle(0.1, 100, anneal="poly")
    with pytest.raises(InputError, match="as many"):
        make_schedules(
            name="phases",
            total_steps=10,
            steps_per_epoch=1,
            epochs=(1, 2),
            peak_lr=(0.1,),
            weight_decay=(0.0, 0.0),
        )
    assert Schedules(constant(0.1)).restarts == ()
