"""How programs are compiled: kept on the disk, so that a second run begins in seconds.

JAX's own settings go before ours: JAX_COMPILATION_CACHE_DIR names another folder,
JAX_ENABLE_COMPILATION_CACHE=0 switches it off.
"""

import contextlib
import os
import pathlib
import stat
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache

MIN_SECONDS = 0.2  # of a compilation that is kept: a run has about ten that take longer


def once_options():
    """jit's compiler_options for a program that runs once: on CPU with fewer of LLVM's passes.

    The initial weights' program compiles 2 s sooner so, to equal values.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}


def enable_cache():
    """Let JAX keep its programs in ${XDG_CACHE_HOME:-~/.cache}/cifar_jax/xla, for this user alone.

    Whoever can write there can run code here, so the folder is made with mode 0700, and one that
    others own or can write to is not used: a line on stderr says so, and the run goes on without.
    Returns the folder, or None where it is not used.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not jax.config.jax_enable_compilation_cache:
        return None
    try:
        folder = private_folder()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return folder


@contextlib.contextmanager
def cache_in(folder):
    """While entered programs are kept in `folder` alone, however short they took to compile."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def private_folder():
    """The cache's folder, made if need be; OSError if it cannot be, or is not this user's alone."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification has a relative one ignored
        base = pathlib.Path.home() / ".cache"
    base.mkdir(parents=True, exist_ok=True)
    folder = base
    for name in ("cifar_jax", "xla"):
        folder = folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise OSError(f"{folder} is not a folder")
        if found.st_uid != os.geteuid():
            raise OSError(f"{folder} belongs to another user")
        if found.st_mode & 0o022:
            raise OSError(f"{folder} can be written by others (chmod 700 {folder} mends it)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} cannot be written")
    return folder
