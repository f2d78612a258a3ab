"""Data parallelism: one mesh axis 'data' over all devices, and many processes acting as one.

The only file that says Mesh, and the only one that knows of other processes.
"""

import contextlib
import errno
import functools
import hashlib
import os
import pathlib
import re
import socket
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cifar_jax import InputError, first_line

JOIN_SECONDS = 60  # for all processes of a job to find one another
HEARTBEAT_SECONDS = 30  # without a sign of life a process is taken for dead
SHUTDOWN_SECONDS = 10  # between the first process that ends and the last
TEXT_BYTES = 1024  # of what processes tell one another
MOST_CORES = 8  # that are devices of their own: each holds the data and the weights
LEAST_IMAGES = 16  # of a batch on each: its work must outweigh an optimizer's step
DISK = tuple(  # what a full, broken or read-only disk says
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE")
)
NVIDIA_DRIVER = pathlib.Path("/proc/driver/nvidia/version")


def first_device():
    """The first device JAX uses.

    InputError if it finds none of the platform asked for (JAX_PLATFORMS), or would train on the CPU
    beside an NVIDIA GPU although nobody asked for that.
    """
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # the latter where it has no such plugin
        asked = f"JAX finds no device (JAX_PLATFORMS is {jax.config.jax_platforms!r})"
        raise InputError(f"{asked}: {error}".rstrip(": ")) from error
    if device.platform == "cpu" and NVIDIA_DRIVER.exists() and not jax.config.jax_platforms:
        raise InputError(
            "there is an NVIDIA GPU, but this JAX cannot use it: install requirements.txt "
            "(scripts/train.sh does), or say JAX_PLATFORMS=cpu to train on the CPU"
        )
    return device


def cores():
    """How many of the CPU's cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def cores_for(batch_size):
    """As how many devices a CPU trains on such batches fastest; None where the caller's settings
    say (JAX_NUM_CPU_DEVICES, XLA_FLAGS), or this process is part of a job.

    A device a core: XLA runs each operation of one device on all cores, between which the maps go
    to and fro, and waits for the last; cores that are devices keep their images to themselves.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or jax.config.jax_num_cpu_devices > 0 or not is_alone():
        return None
    most = min(cores(), MOST_CORES, batch_size // LEAST_IMAGES)
    return next((n for n in range(most, 1, -1) if batch_size % n == 0), 1)


def use_cores(batch_size):
    """Make the CPU cores_for(batch_size) devices, unless JAX has made its devices before."""
    count = cores_for(batch_size)
    if count:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def make_mesh():
    """A one-dimensional mesh of all devices, axis 'data'; InputError as first_device."""
    first_device()
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh):
    """The sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree, placement):
    """Arrays that this process holds whole, `placement` being replicated: on every device."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(placement, x), tree)


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


def split(mesh):
    """The sharding that splits axis 0 of every array over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def spread(function, mesh):
    """`function(split, whole) -> split`, run by each device by itself on its share of axis 0 of
    every array in the tree `split` and on all of `whole`."""
    mine, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        function, mesh=mesh, in_specs=(mine, whole), out_specs=mine, check_vma=False
    )


def make_spread(mesh):
    """run(function, x, *whole): function(x, *whole) by each device on its share of x [B, ...], as
    make_shard_batch splits it, inside jit; None on a single device, which has the whole."""
    if mesh.size == 1:
        return None

    def run(function, x, *whole):
        if x.shape[0] % mesh.size:
            return function(x, *whole)
        return spread(lambda x, whole: function(x, *whole), mesh)(x, whole)

    return run


def make_whole(mesh):
    """whole(tree): constrain every array to be whole on every device, inside jit."""
    return lambda tree: jax.lax.with_sharding_constraint(tree, replicated(mesh))


def check_batch_size(batch_size, n, parts):
    """InputError if the batch does not divide over n `parts` (what they are), with the nearest
    sizes that do."""
    if batch_size % n:
        below, above = batch_size // n * n, (batch_size // n + 1) * n
        nearest = f"{below} and {above}" if below else f"{above}"
        raise InputError(
            f"batch_size {batch_size} does not divide over {n} {parts}; "
            f"the nearest sizes that do: {nearest}"
        )


@contextlib.contextmanager
def job(where):
    """This process as one of many: `where` is HOST:PORT,PROCESSES,INDEX or auto; '' is none.

    All run the same command; process 0, the coordinator at HOST:PORT, alone writes and prints. If
    another process dies, this one ends with code 1 and one line on stderr, at once where the
    connection breaks; where the coordinator dies or another only falls silent, JAX aborts it (134).
    """
    if not where:
        with _limits_told():
            yield
        return
    _join(where)
    if not is_writer():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # the coordinator goes last: without it the others could not say why they leave
    linger = 1 if is_writer() else 0
    try:
        with _limits_told():
            yield
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error)
        _leave(
            f"the job cannot go on, it seems that another of its processes has ended ({reason}); "
            "the same command goes on from the last checkpoint",
            1,
            linger,
        )
    except InputError as error:
        _leave(error, 2, linger)
    except Exception:
        traceback.print_exc()
        _leave("the other processes of the job end too", 1, linger)


@contextlib.contextmanager
def _limits_told():
    """A device without enough memory or a disk that fails becomes an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f" at {error.filename}" if error.filename else ""
        raise InputError(
            f"the disk failed{where} ({error.strerror}); the checkpoints written before are whole: "
            "mend that and run the same command"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the device has not enough memory ({first_line(error)}); lower "
            "config.batch_size or config.eval.batch_size, or take a smaller model"
        ) from error


def _join(where):
    settings = {} if where == "auto" else _settings(where)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours, see train.py
    # JAX itself would abort with a stack trace, and does so a little later
    late = f"the processes of --distributed={where} did not meet within {JOIN_SECONDS} s"
    timer = threading.Timer(JOIN_SECONDS, _leave, (late, 2))
    timer.start()
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=JOIN_SECONDS + 30,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        known = "SLURM, MPI and others"
        raise InputError(f"--distributed=auto finds no cluster here ({known})") from error
    finally:
        timer.cancel()


def _settings(where):
    """What HOST:PORT,PROCESSES,INDEX is for jax.distributed.initialize."""
    found = re.fullmatch(r"(\S+:(\d+)),(\d+),(\d+)", where)
    if not found or int(found[4]) >= int(found[3]):
        usage = "auto or HOST:PORT,PROCESSES,INDEX with INDEX < PROCESSES"
        raise InputError(f"--distributed takes {usage}, not {where!r}")
    address, port, count, index = found[1], *map(int, found.groups()[1:])
    if index == 0:
        try:  # JAX would crash
            socket.create_server(("", port)).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} cannot be used: {error}") from error
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _leave(text, code, linger=0):
    """Say why and end this process, without waiting for the others as JAX and Orbax would."""
    print(f"{pathlib.Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
    time.sleep(linger)
    os._exit(code)


def is_alone():
    """Whether this process is no part of a job (asked without waking the devices)."""
    return not jax.distributed.is_initialized()


def is_writer():
    """Whether this process writes the run's files and prints: the first, or the only one."""
    return is_alone() or jax.process_index() == 0


def by_writer(function):
    """`function`, doing nothing in any other process."""

    @functools.wraps(function)
    def guarded(*arguments, **keywords):
        return function(*arguments, **keywords) if is_writer() else None

    return guarded


def gather(text):
    """[the text of each process], cut to TEXT_BYTES; all must call it at the same point."""
    if is_alone():
        return [text]
    row = np.zeros(TEXT_BYTES, np.uint8)
    content = text.encode()[:TEXT_BYTES]
    row[: len(content)] = np.frombuffer(content, np.uint8)
    with jax.transfer_guard("allow"):
        rows = multihost_utils.process_allgather(row)
    return [bytes(r).rstrip(b"\0").decode(errors="ignore") for r in rows]


@contextlib.contextmanager
def together(kind=InputError):
    """An error of this kind in one process becomes one in all of them."""
    problem = None
    try:
        yield
    except kind as error:
        problem = error
    told = [text for text in gather(str(problem or "")) if text]
    if problem or told:
        raise problem or kind(told[0])


@contextlib.contextmanager
def in_turn():
    """As together, but the writer goes first and the others find what it left."""
    if not is_writer():
        with together():
            pass
    with together():
        yield
    if is_writer():
        with together():
            pass


def check_same(text, name):
    """InputError unless all processes say the same."""
    if len({*gather(hashlib.sha256(text.encode()).hexdigest())}) > 1:
        raise InputError(f"the processes of the job do not have the same {name}")
