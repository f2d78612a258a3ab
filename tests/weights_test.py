"""The map between Flax variables and PyTorch state_dicts: lossless both ways, strict on names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import InputError, torch_twin, weights
from cifar_jax.models import create_model


def filled(name, rng, size=32, **fields):
    """(module for images of `size` pixels a side, variables of random numbers)."""
    model = create_model(name, num_classes=10, **fields)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False)
    )
    values = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), dict(shapes))
    return model, {"batch_stats": {}, **values}


@pytest.mark.parametrize("name", torch_twin.TWINS)
def test_there_and_back_unchanged(name, rng):
    model, variables = filled(name, rng)
    state_dict = weights.to_state_dict(name, model, variables)
    again = weights.from_state_dict(name, model, variables, state_dict)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_sequential_mixture_there_and_back(rng):
    model, variables = filled("mixture", rng, sequential=True, widths=(4,) * 6)
    state_dict = weights.to_state_dict("mixture", model, variables, step=7)
    again = weights.from_state_dict("mixture", model, variables, state_dict)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert state_dict["block2.branches.1.bn.num_batches_tracked"] == 7


def test_layouts(rng):
    """conv OIHW, linear [out, in], the flattened one in PyTorch's channel-first order."""
    model, variables = filled("convnet", rng)
    state_dict = weights.to_state_dict("convnet", model, variables)
    kernel = variables["params"]["conv2"]["kernel"]
    assert state_dict["conv2.weight"][5, 3, 1, 2] == kernel[1, 2, 3, 5]
    dense = variables["params"]["fc1"]["kernel"].reshape(6, 6, 256, 256)
    first = state_dict["fc1.weight"].reshape(256, 256, 6, 6)
    assert first[9, 200, 4, 1] == dense[4, 1, 200, 9]
    assert all(value.flags["C_CONTIGUOUS"] for value in state_dict.values())


def test_the_speedruns_head_on_a_map_of_several_pixels(rng):
    """From 49 pixels on a side its last map is larger than one pixel."""
    model, variables = filled("airbench", rng, 64, widths=(4, 4, 8))
    variables = jax.tree.map(np.abs, variables)  # as variances must be
    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    twin = torch_twin.create_twin("airbench", image_size=64, widths=(4, 4, 8))
    torch_twin.load_weights(twin, weights.to_state_dict("airbench", model, variables))
    ours = jax.jit(lambda x: model.apply(variables, x, train=False))(images)
    np.testing.assert_allclose(ours, torch_twin.predict(twin, images), rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("layer2.bn.running_var"), "layer2.bn.running_var missing"),
        (lambda d: d.update(extra=np.zeros(3)), "extra not known to the model"),
        (
            lambda d: d.update({"fc.weight": np.zeros((100, 512), np.float32)}),
            r"fc.weight \[100, 512\] instead of \[10, 512\] of another shape",
        ),
        (lambda d: d["fc.weight"].fill(np.nan), "fc.weight not finite"),
        (
            lambda d: d.update({"fc.weight": np.full((10, 512), 1e39)}),  # in float32 infinite
            "fc.weight not finite",
        ),
        (
            lambda d: d.update({"fc.weight": np.zeros((10, 512), np.int64)}),
            "fc.weight not of floating point",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message, rng):
    model, variables = filled("resnet", rng)
    state_dict = weights.to_state_dict("resnet", model, variables)
    change(state_dict)
    with pytest.raises(InputError, match=message):
        weights.from_state_dict("resnet", model, variables, state_dict)


def test_a_family_without_names_is_refused(rng):
    model, variables = filled("resnet", rng)
    with pytest.raises(InputError, match="model 'allconv' have no names in PyTorch"):
        weights.to_state_dict("allconv", model, variables)


def test_bfloat16_is_taken(rng):
    model, variables = filled("resnet", rng)
    state_dict = weights.to_state_dict("resnet", model, variables)
    half = {key: value.astype(jnp.bfloat16) for key, value in state_dict.items()}
    found = weights.from_state_dict("resnet", model, variables, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    half["fc.weight"][0, 0] = np.inf
    with pytest.raises(InputError, match="fc.weight not finite"):
        weights.from_state_dict("resnet", model, variables, half)


def test_counters_are_optional(rng):
    model, variables = filled("resnet", rng)
    state_dict = weights.to_state_dict("resnet", model, variables)
    bare = {k: v for k, v in state_dict.items() if not k.endswith(weights.COUNTER)}
    assert len(bare) < len(state_dict)
    again = weights.from_state_dict("resnet", model, variables, bare)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_many_faults_are_cut_short(rng):
    model, variables = filled("resnet", rng)
    with pytest.raises(InputError, match="and 35 more missing"):
        weights.from_state_dict("resnet", model, variables, {})
