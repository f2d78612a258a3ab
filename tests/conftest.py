"""Every test runs with 8 virtual CPU devices (unless it is a gpu test), strict rank promotion,
warnings as errors."""

import os
import pathlib

GPU = os.environ.get("CIFAR_JAX_TEST_GPU") == "1"
if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU: set CIFAR_JAX_TEST_GPU=1 where there is one")
            )
        if item.get_closest_marker("cifar10") and not os.environ.get("CIFAR10_DIR"):
            item.add_marker(
                pytest.mark.skip(
                    reason="needs CIFAR-10: set CIFAR10_DIR to the folder that holds it"
                )
            )


@pytest.fixture(scope="session")
def cifar10_dir():
    return pathlib.Path(os.environ["CIFAR10_DIR"])


@pytest.fixture
def rng():
    return np.random.default_rng(0)
