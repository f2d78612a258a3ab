"""What a result depends on besides the config and the data."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess

import jax

from cifar_jax import sharding

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment():
    """{device, versions, commit}: the devices in words, of Python and PACKAGES, git's."""
    device = sharding.first_device()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    name = (
        device.device_kind
        if device.platform != "cpu"
        else f"cpu ({platform.processor() or platform.machine()})"
    )
    return {
        "device": f"{jax.device_count()} x {name}",
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
    }


def _commit():
    """The checkout's commit, with '-dirty' where files differ from it; outside git what
    CIFAR_JAX_COMMIT says, or None."""
    here = pathlib.Path(__file__)

    def git(*arguments):
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return found.stdout.strip() or None

    if not git("ls-files", here.name):  # installed, maybe within the checkout of something else
        return os.environ.get("CIFAR_JAX_COMMIT") or None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
