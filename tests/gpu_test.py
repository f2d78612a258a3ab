"""What only a GPU can show; run with CIFAR_JAX_TEST_GPU=1 where there is one."""

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from cifar_jax import exchange, timing, train
from cifar_jax.experiment import make_experiment
from cifar_jax.models import MODELS, create_model
from cifar_jax.models.layers import convolve, max_pool
from cifar_jax.steps import apply_in_parts, init_state
from configs import quickstart

pytestmark = pytest.mark.gpu


def test_the_quickstart_learns_with_an_epoch_a_call(tmp_path):
    """The path of an accelerator: every epoch one scan, nothing fetched within it."""
    assert jax.default_backend() == "gpu"
    config, workdir = quickstart.get_config(), tmp_path / "run"
    result = train.train_and_evaluate(config, workdir)
    assert result["status"] == "done"
    assert result["test"]["accuracy"] >= 97.0
    forms = ["safetensors", *(["stablehlo"] if importlib.util.find_spec("flatbuffers") else [])]
    for form in forms:  # read back within 1e-4
        assert exchange.export_best(config, workdir, form).stat().st_size


@pytest.mark.parametrize("name", ["vgg", "convnet", "resnet", "mixture", "dilated", "speedrun"])
def test_pytorchs_side_trains_and_evaluates(name):
    """As the benchmark has it: channels_last, fused, by autocast in bfloat16."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.batch_size = 16
    splits = timing.random_splits({"train": 64, "test": 32})
    sides = timing.Sides(make_experiment(config, splits=splits), exchange.load_torch_twin())
    for dtype in ("float32", "bfloat16"):
        for task in ("train", "evaluate"):
            timing.make_form(sides, f"torch {dtype}", task=task, steps=2).run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_agree_with_the_cpu(rng, dtype):
    """Convolution and pooling on the GPU against float32 on the host's CPU."""
    x = rng.normal(size=(8, 16, 16, 8)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 8, 16)).astype(np.float32) / 8

    def network(x, kernel):
        return max_pool(convolve(x, kernel, 1), 2)

    with jax.default_device(jax.devices("cpu")[0]):
        reference = network(jnp.asarray(x), jnp.asarray(kernel))
    ours = jax.jit(network)(jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
    np.testing.assert_allclose(ours.astype(jnp.float32), reference, atol=5e-2)


def gradients(model, variables, images, labels):
    """(gradient of the mean cross-entropy in training mode as one vector, that loss)."""

    def loss(params):
        variables_now = {**variables, "params": params}
        logits, _ = apply_in_parts(model, variables_now, images, jax.random.key(2))
        own = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels, 1)
        return -own.mean()

    value, found = jax.jit(jax.value_and_grad(loss))(variables["params"])
    return np.asarray(ravel_pytree(found)[0]), float(value)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_agree_with_the_cpu(name, rng):
    """In float32 in full, and in bfloat16 as far as it goes, both against the CPU's float32."""
    images = rng.normal(size=(32, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 10, (32, 1))
    model = create_model(name, num_classes=10)
    init = functools.partial(init_state, model=model, tx=optax.identity())
    # of this key every block of mixture lets most images through
    state = jax.jit(init)(jax.random.key(3), images=whitened(model, images))
    variables = jax.device_get(state.variables)
    with jax.default_matmul_precision("highest"):
        with jax.default_device(jax.devices("cpu")[0]):
            expected, loss = gradients(model, variables, images, labels)
        # in float32 a ReLU or a maximum near its edge moves resnet's gradient by 1e-3 already
        for dtype, bound, of_loss in (("float32", 1e-2, 1e-4), ("bfloat16", 0.5, 0.05)):
            ours, value = gradients(model.clone(dtype=dtype), variables, images, labels)
            apart = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
            assert value == pytest.approx(loss, rel=of_loss)
            assert apart <= bound, dtype


def whitened(model, images):
    """The images where `model` measures them, else None."""
    return images if hasattr(model, "initialize_from_data") else None
