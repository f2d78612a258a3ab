"""How training and evaluation are timed in JAX and PyTorch: --mode=compare, benchmark.py."""

import contextlib
import dataclasses
import gc
import pathlib
import resource
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from cifar_jax import InputError, first_line, sharding, weights
from cifar_jax.dataset import Dataset
from cifar_jax.exchange import load_torch_twin, make_twin
from cifar_jax.experiment import CALL_IMAGES, load_data, make_experiment
from cifar_jax.own_process import OwnProcess
from cifar_jax.steps import make_batches, make_order, take

REST = 0.3  # seconds between forms on a CPU: the other's threads spin on for a while
LEAST = 0.3  # seconds that a form is timed for on a GPU, which is not at its pace from the start


class Sides:
    """A recipe on both sides: data, batches and initial weights that JAX and PyTorch share.

    `exp` is the Experiment, `twin` the package torch_twin or None for JAX alone.
    """

    def __init__(self, exp, twin):
        config = exp.config
        self.exp, self.twin = exp, twin
        self.experiments = {config.model.dtype: exp}
        self.name = config.model.name
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.batches = jax.jit(make_batches(**exp.batching), static_argnums=3)
        self.no_metrics = exp.no_metrics()
        if twin:
            twin.set_float32(fast=True)

    def size(self, step):
        """Examples of batch `step`; without drop_last that of an epoch's last may be smaller."""
        return self.exp.images_at(step + 1) - self.exp.images_at(step)

    def experiment(self, dtype):
        """The same recipe on the same data, computing in `dtype`."""
        if dtype not in self.experiments:
            config = self.exp.config.copy_and_resolve_references()
            with config.unlocked():
                config.model.dtype = dtype
            splits = {"train": self.exp.train, "test": self.exp.test}
            self.experiments[dtype] = make_experiment(
                config, splits=splits, class_names=self.exp.class_names
            )
        return self.experiments[dtype]

    def make_recipe(self, state=None, dtype="float32", compiled=False):
        """The PyTorch side, with the weights of `state`, on the device, channels_last; without
        `state` only to see whether PyTorch has the recipe: InputError if not."""
        config = self.exp.config
        if not config.model.get("unbiased_variance", True):
            raise InputError(
                "PyTorch's BatchNorm keeps the unbiased running variance; "
                "set config.model.unbiased_variance to True"
            )
        twin = make_twin(config, self.exp.class_names, self.exp.test.images.shape[1:])
        if state is not None:
            self.twin.load_weights(twin, self.state_dict(state))
            self.twin.move(twin, self.device)
        return self.twin.Recipe(
            twin,
            optim=config.optim.to_dict(),
            schedule=config.schedule.to_dict(),
            loss=config.loss.to_dict(),
            lookahead=config.lookahead.to_dict(),
            total_steps=self.exp.total_steps,
            steps_per_epoch=self.exp.steps_per_epoch,
            autocast=None if dtype == "float32" else dtype,
            compiled=compiled,
            fused=state is not None,
        )

    def state_dict(self, state):
        """{PyTorch's name: numpy array} of the weights and statistics of `state`."""
        variables = jax.device_get(state.variables)
        return weights.to_state_dict(self.name, self.exp.model, variables)

    def torch_batch(self, state, step):
        """Batch `step` of this state's order and augmentation as tensors on the device."""
        images, labels, _ = self.batches(state.key, step, self.exp.train, self.size(step))
        return self.twin.images_of(images, self.device), self.twin.labels_of(labels, self.device)


@dataclasses.dataclass
class Form:
    """One way to train or to evaluate, ready to be timed: run() returns when its work is done."""

    run: Callable[[], None]
    images: int  # that one run() takes
    setup_seconds: float  # to make it: network, weights, optimizer, and for JAX compile_seconds
    compile_seconds: float | None  # of tracing and compiling; None: within the first run()


def form_names(dtypes, compiled=True, torch=True, given=False):
    """'jax float32', 'torch float32', 'torch.compile float32', 'jax bfloat16', ...; with `given`
    'jax.given float32', ... as well."""
    kinds = [
        "jax",
        *(["jax.given"] if given else []),
        *(["torch"] if torch else []),
        *(["torch.compile"] if torch and compiled else []),
    ]
    return [f"{kind} {dtype}" for dtype in dtypes for kind in kinds]


def usual_steps(batch_size):
    """So many that a timed run takes about as many images as a call of training does on a CPU, and
    16,384 elsewhere."""
    return max(1, (CALL_IMAGES if jax.default_backend() == "cpu" else 16_384) // batch_size)


def make_form(sides, name, *, task="train", steps):
    """The Form called `name` of `task`, 'train' or 'evaluate'; a run() is `steps` batches.

    JAX's augments (or normalises) within the step; PyTorch's, and 'jax.given' in training, get
    finished batches on the device.
    """
    kind, dtype = name.split(" ")
    if kind == "jax.given":
        return _jax_training(sides, dtype, steps, given=True)
    if kind == "jax":
        return {"train": _jax_training, "evaluate": _jax_evaluation}[task](sides, dtype, steps)
    return _torch_form(sides, dtype, task, steps, compiled=kind == "torch.compile")


def _jax_training(sides, dtype, steps, given=False):
    exp, size = sides.experiment(dtype), sides.size(0)
    counts = exp.in_calls(steps)
    made = time.perf_counter()
    start = exp.init_state()
    if given:
        exp = with_given_batch(sides, exp, start)
    began = time.perf_counter()
    programs = {n: exp.compile_steps((n, size, ()), start, sides.no_metrics) for n in {*counts}}
    end = time.perf_counter()
    carry = [start]

    def run():
        for n in counts:
            carry[0], _ = programs[n](carry[0], sides.no_metrics, exp.train)
        jax.block_until_ready(carry[0])

    return Form(run, steps * size, end - made, end - began)


def with_given_batch(sides, exp, state):
    """`exp` with the finished first batch of `state` as its data, on all of which each step trains
    as it is."""
    size = sides.size(0)
    images, labels, _ = sides.batches(state.key, 0, exp.train, size)
    images, labels = jax.device_put((images, labels), exp.placement)
    as_is = {"augment": lambda key, images: images, "alternating_flip": False}
    step = exp.make_step(exp.tx, num_examples=size, **as_is)
    same = make_order(batch_size=size, num_examples=size, whole=exp.batching["whole"])
    return dataclasses.replace(exp, step=step, order=same, train=Dataset(images, labels))


def _jax_evaluation(sides, dtype, steps):
    exp, size = sides.experiment(dtype), sides.size(0)
    images = jax.jit(take)(exp.test, np.arange(steps * size) % len(exp.test))
    made = time.perf_counter()
    state = exp.init_state()
    began = time.perf_counter()
    evaluate = exp.make_evaluation(batch_size=size, transform=exp.normalize)
    program = evaluate.lower(state, images).compile()
    end = time.perf_counter()

    def run():
        jax.block_until_ready(program(state, images))

    return Form(run, steps * size, end - made, end - began)


def _torch_form(sides, dtype, task, steps, compiled):
    start = sides.exp.init_state()
    batches = [sides.torch_batch(start, t) for t in range(2)]
    torch = sides.twin.torch
    made = time.perf_counter()
    recipe = sides.make_recipe(start, dtype, compiled)
    recipe.freeze = {}  # nothing freezes in JAX's timed steps either, however many there are
    setup = time.perf_counter() - made

    def train():
        for i in range(steps):
            recipe.step(*batches[i % 2])
        sides.twin.synchronize(sides.device)

    def evaluate():
        recipe.twin.eval()
        low = recipe.autocast
        with torch.inference_mode(), torch.autocast(sides.device, low, enabled=low is not None):
            for i in range(steps):
                recipe.forward(batches[i % 2][0])
        sides.twin.synchronize(sides.device)

    run = {"train": train, "evaluate": evaluate}[task]
    return Form(run, steps * sides.size(0), setup, None)


def time_forms(
    processes, config, names, *, task="train", steps, rounds, least_seconds=0.0, sizes=None
):
    """{form name: timing} of the forms `names` of `task`: all are made and warmed up, each in that
    of `processes` ({framework: OwnProcess}) which is its framework's, then measured in turn in each
    of `rounds` rounds, in every other one in reverse, for the machine may be getting slower or
    faster. There are more rounds until `least_seconds` have passed: else a neighbour that is busy
    for half a minute would have all rounds of a short task.

    `config` is a nested dict; with `sizes` the data are random_splits(sizes), else the config's
    own. images_per_second (median of the rounds), `spread` (smallest, largest), their number n and
    `rounds`, all of them in turn; first_steps: seconds from data at hand and nothing compiled to
    the first run() done, imports aside; compile: of these, JAX's tracing and compilation. A form of
    PyTorch's that fails has its `error` instead.
    """
    processes["jax"].see(on_cores(config["batch_size"]))
    home = {name: processes[framework(name)] for name in names}
    timing = {}
    for process in dict.fromkeys(home.values()):
        theirs = [name for name in names if home[name] is process]
        timing |= process(_make_forms, config, sizes, theirs, task, steps)
    rates = {name: [] for name in names if "error" not in timing[name]}
    began, i, on_cpu = time.perf_counter(), 0, jax.default_backend() == "cpu"
    while i < rounds or time.perf_counter() - began < least_seconds:
        for name in [*rates][:: -1 if i % 2 else 1]:
            if on_cpu:
                time.sleep(REST)
            rates[name].append(home[name](_time_form, name))
        i += 1
    for name, values in rates.items():
        timing[name] |= {**summarize(values, "images_per_second"), "rounds": values}
    return timing


_forms = {}  # {name: Form} that this process has made to be timed


def _make_forms(config, sizes, names, task, steps):
    """What time_forms says of the forms before they are measured; they are left in _forms."""
    _forms.clear()
    config, twin = ConfigDict(config), None
    if "torch" in map(framework, names):
        twin = load_torch_twin()
        twin.torch.compiler.reset()  # else it gives up after eight compilations
    sides = Sides(make_experiment(config, splits=splits_of(config, sizes)), twin)
    found = {}
    for name in names:
        try:
            form = make_form(sides, name, task=task, steps=steps)
            first = form.setup_seconds + seconds(form.run)
        except Exception as error:
            if framework(name) != "torch":
                raise
            found[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
            continue
        found[name] = {"first_steps": first, "compile": form.compile_seconds}
        form.run()
        _forms[name] = form
        print(f"{name}: ready after {first:.1f} s", flush=True)
    return found


def _time_form(name):
    """Images per second of one run, or of LEAST seconds on a GPU, of a form that _make_forms has
    made in this process."""
    form, least = _forms[name], 0.0 if jax.default_backend() == "cpu" else LEAST
    began, images, passed = time.perf_counter(), 0, 0.0
    while not images or passed < least:
        form.run()
        images, passed = images + form.images, time.perf_counter() - began
    return images / passed


def seconds(run):
    """Seconds that run() takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def summarize(values, name):
    """{name: median, 'spread': [smallest, largest], 'n': their number}."""
    return {name: float(np.median(values)), "spread": [min(values), max(values)], "n": len(values)}


@contextlib.contextmanager
def frameworks(torch=True):
    """{'jax': OwnProcess, 'torch' unless not `torch`: OwnProcess}, so that neither's threads and
    memory are in the other's way."""
    with OwnProcess() as ours, OwnProcess() as theirs:
        yield {"jax": ours, "torch": theirs} if torch else {"jax": ours}


def on_cores(batch_size):
    """The variables by which a process of JAX's has as many devices as a run of such batches; none
    on a GPU."""
    count = sharding.cores_for(batch_size) if jax.default_backend() == "cpu" else None
    return {"JAX_NUM_CPU_DEVICES": str(count)} if count else {}


def framework(name):
    """Which of frameworks() the form `name` runs in."""
    return name.split(" ")[0].split(".")[0]


def random_splits(sizes, classes=10, seed=0):
    """{split: Dataset} of `sizes` ({split: images}) in random pixels, which take as long."""
    rng = np.random.default_rng(seed)
    return {
        name: Dataset(
            np.frombuffer(rng.bytes(n * 32 * 32 * 3), np.uint8).reshape(n, 32, 32, 3),
            rng.integers(0, classes, n, dtype=np.int32),
        )
        for name, n in sizes.items()
    }


def splits_of(config, sizes):
    """random_splits of `sizes`, or the config's data without them."""
    return random_splits(sizes) if sizes else load_data(config)


def fresh_start(config, name, sizes=None):
    """What the form `name` costs in a fresh process: call it in an OwnProcess.

    first_step: seconds from the data in memory to the first training step done, imports aside:
    network, weights, tracing, compilation and the step. peak_memory: see there. `config` is a
    nested dict; with `sizes` the data are random_splits(sizes), else the config's own.
    """
    config = ConfigDict(config)
    splits = splits_of(config, sizes)
    twin = load_torch_twin() if framework(name) == "torch" else None
    gc.freeze()  # as main.py does
    jax.block_until_ready(jax.device_put(0))  # the device starts, as it has for PyTorch's clock
    made = time.perf_counter()
    sides = Sides(make_experiment(config, splits=splits), twin)
    made = time.perf_counter() - made if twin is None else 0.0  # PyTorch needs nothing of it
    jax.block_until_ready((sides.exp.train, sides.exp.test))
    before = _resident("VmRSS")
    form = make_form(sides, name, steps=1)
    first = made + form.setup_seconds + seconds(form.run)
    return {"first_step": first, "peak_memory": peak_memory(sides, name, form, before)}


def peak_memory(sides, name, form, before):
    """Bytes that `form`, which has run once, takes at its peak, beyond data and libraries.

    On a GPU, as its allocator counts them, the data included for JAX; on CPU, resident memory above
    `before`, that before the model was made.
    """
    if sides.device == "cuda":
        if name.startswith("jax"):
            return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        return sides.twin.peak_memory(form.run)
    reset = pathlib.Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak counts from here
    form.run()
    return max(0, _resident("VmHWM") - before)


def _resident(field):
    """A line of /proc/self/status in bytes; the largest so far where there is no such file."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split(f"{field}:")[1].split()[0]) * 1024
