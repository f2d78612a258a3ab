"""What only a GPU can show; run with CIFAR_JAX_TEST_GPU=1 where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import train
from cifar_jax.models.layers import convolve, max_pool
from configs import quickstart

pytestmark = pytest.mark.gpu


def test_the_quickstart_learns_with_an_epoch_a_call(tmp_path):
    """The path of an accelerator: every epoch one scan, nothing fetched within it."""
    assert jax.default_backend() == "gpu"
    result = train.train_and_evaluate(quickstart.get_config(), tmp_path / "run")
    assert result["status"] == "done"
    assert result["test"]["accuracy"] >= 97.0


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
