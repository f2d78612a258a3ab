"""Data parallelism: one mesh axis 'data' over all devices. The only file that says Mesh."""

import pathlib

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cifar_jax import InputError

NVIDIA_DRIVER = pathlib.Path("/proc/driver/nvidia/version")


def first_device():
    """The first device JAX uses.

    InputError if it finds none of the platform asked for (JAX_PLATFORMS), or would train on the CPU
    beside an NVIDIA GPU although nobody asked for that.
    """
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        raise InputError(f"JAX finds no device: {str(error).splitlines()[0]}") from error
    if device.platform == "cpu" and NVIDIA_DRIVER.exists() and not jax.config.jax_platforms:
        raise InputError(
            "there is an NVIDIA GPU, but this JAX cannot use it: install requirements.txt "
            "(scripts/train.sh does), or say JAX_PLATFORMS=cpu to train on the CPU"
        )
    return device


def make_mesh():
    """A one-dimensional mesh of all devices, axis 'data'."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh):
    """The sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def make_shard_batch(mesh):
    """shard(tree): constrain every array [B, ...] to be split over 'data', inside jit.

    A batch that does not divide (the last one of an epoch) stays whole on every device.
    """

    def shard(tree):
        def constrain(x):
            spec = PartitionSpec("data") if x.shape[0] % mesh.size == 0 else PartitionSpec()
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        return jax.tree.map(constrain, tree)

    return shard


def check_batch_size(batch_size, mesh):
    """InputError if the batch does not divide over the devices, with the nearest sizes that do."""
    n = mesh.size
    if batch_size % n:
        below, above = batch_size // n * n, (batch_size // n + 1) * n
        nearest = f"{below} and {above}" if below else f"{above}"
        raise InputError(
            f"batch_size {batch_size} does not divide over {n} devices; "
            f"the nearest sizes that do: {nearest}"
        )
