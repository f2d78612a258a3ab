"""What a result depends on besides the config and the data."""

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

import jax

from cifar_jax import sharding

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment():
    """{device, versions, commit}: the devices in words, of Python and PACKAGES, git's."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    name, count = device_name(), jax.device_count()
    if sharding.first_device().platform == "cpu":
        # devices made by this setting are cores of one
        name, count = f"cpu ({name})", 1 if jax.config.jax_num_cpu_devices > 0 else count
    return {
        "device": f"{count} x {name}",
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
    }


def device_name():
    """The GPU's name, or the CPU's model and how many of its cores this process may use."""
    device = sharding.first_device()
    if device.platform != "cpu":
        return device.device_kind
    try:
        found = re.search("model name.*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{model}, {sharding.cores()} cores"


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
