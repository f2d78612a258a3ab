"""A config made into the pieces of a run: data, model, schedules, optimizer, step, evaluation.

Every mode starts here; below this file nothing knows the ConfigDict.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cifar_jax import InputError, compilation, data, first_line, sharding
from cifar_jax import workdir as files
from cifar_jax.augment import make_augment
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.dataset import Dataset
from cifar_jax.flops import has_convolution
from cifar_jax.metrics import Metrics
from cifar_jax.models import create_model
from cifar_jax.models.layers import plain_convolutions, shares_of_devices
from cifar_jax.optim import Schedules, make_lookahead, make_optimizer, make_schedules
from cifar_jax.steps import (
    VIEWS,
    TrainState,
    count_steps,
    init_state,
    make_evaluate,
    make_order,
    make_train_step,
    repeat,
)

# Images in a training call on CPU. Its memory is allocated once a call, so that one step a call
# takes up to 1.3 times as long; but a signal waits for the call to end.
CALL_IMAGES = 512
LARGEST_SEED = 2**31 - 1  # of more JAX keeps only some bits
RATES = ("schedule.peak_lr", "schedule.weight_decay", "optim.weight_decay", "optim.eps")
RANGES = (  # what a field's numbers must be, where it is there and not None
    (
        "at least 1",
        lambda x: x >= 1,
        ("epochs", "batch_size", "ghost_batches", "save_every", "eval.batch_size"),
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        ("stop_after", "steps_per_call", "lookahead.every", "lookahead.power", *RATES),
    ),
    ("above 0", lambda x: x > 0, ("optim.clip_value", "optim.clip_norm")),
    (
        "at least 0 and below 1",
        lambda x: 0 <= x < 1,
        ("optim.momentum", "optim.b1", "optim.b2", "schedule.momentum", "loss.label_smoothing"),
    ),
    ("from 0 to 1", lambda x: 0 <= x <= 1, ("lookahead.decay",)),
    (f"from 0 to {LARGEST_SEED}", lambda x: 0 <= x <= LARGEST_SEED, ("seed", "data.split_seed")),
    ("whole and at least 1", lambda x: x >= 1 and x == int(x), ("schedule.epochs",)),
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is made of; `validation` is None unless one is held out."""

    config: ConfigDict
    placement: jax.sharding.Sharding  # a whole copy on every device
    class_names: tuple[str, ...]
    train: Dataset  # all three lie whole on every device
    validation: Dataset | None
    test: Dataset
    provenance: dict  # of the data: name, split sizes, sha256 of each split
    model: nn.Module
    schedules: Schedules
    tx: optax.GradientTransformation
    steps_per_epoch: int
    total_steps: int
    batching: dict  # what steps.make_batches takes
    order: Callable  # see steps.make_order
    lookahead: Callable | None  # see optim.make_lookahead
    augment: Callable  # (key, u8 images) -> float images, as in training
    normalize: Callable  # (key, u8 images) -> float images, as in evaluation
    by_shares: Callable  # the decorator of what traces the network in training; see layers
    make_step: Callable  # (optimizer, what of batching is otherwise) -> such a step
    step: Callable  # see steps.make_train_step
    make_evaluation: Callable  # (what is otherwise) -> such a steps.make_evaluate
    evaluate: Callable  # jitted (unless make_experiment says otherwise)
    evaluations: dict[str, Callable]  # the same averaged over views of each image, by steps.VIEWS
    evaluate_clean: Callable  # `evaluate` of images not augmented, whatever config.eval.augmented

    def init_state(self, seed=None):
        """The initial TrainState of `seed` (None: config.seed), whole on every device."""
        key = jax.random.key(self.config.seed if seed is None else seed)
        return self._jitted_init(key, self.train.images)

    def no_metrics(self):
        """The Metrics of no image, whole on every device."""
        return sharding.put(Metrics.zeros(len(self.class_names)), self.placement)

    def abstract_state(self):
        """Its shapes and dtypes, as jax.ShapeDtypeStructs."""
        return jax.eval_shape(self._init, jax.random.key(0), self.train.images)

    def count_params(self):
        """Trainable parameters of the network."""
        return sum(x.size for x in jax.tree.leaves(self.abstract_state().params))

    def _init(self, key, images):
        kwargs = {"image_shape": images.shape[1:], "lookahead": self.lookahead is not None}
        if hasattr(self.model, "initialize_from_data"):
            images = images[: self.model.whitening_images]
            kwargs["images"] = self.normalize(key, images)
        with plain_convolutions():  # nothing of what they give is used
            return init_state(key, self.model, self.tx, **kwargs)

    @functools.cached_property
    def _jitted_init(self):
        options = compilation.once_options()
        return jax.jit(self._init, out_shardings=self.placement, compiler_options=options)

    def compile_steps(self, call, state, metrics):
        """`call` = (number of steps, size, frozen layers) of steps.repeat, compiled for such a
        state and its sums; donates the state."""
        run = jax.jit(
            repeat(self.step, self.order, *call),
            donate_argnums=0,
            out_shardings=(self.placement, self.placement),
        )
        return run.lower(state, metrics, self.train).compile()

    @functools.cached_property
    def steps_per_call(self):
        """How many steps of a whole batch one call makes here, unless the config says."""
        if self.config.steps_per_call:
            return self.config.steps_per_call
        if jax.default_backend() != "cpu":
            return max(1, len(self.train) // self.config.batch_size)
        count = max(1, CALL_IMAGES // self.config.batch_size)
        slow = self.by_shares(has_convolution)
        if count > 1 and slow(self.model, self.train.images.shape[1:]):
            return 1  # XLA's own convolutions are slow in the loop
        return count

    def in_calls(self, steps):
        """The numbers of steps of the calls that make `steps` steps of a whole batch, as is fast
        here."""
        if jax.default_backend() != "cpu":
            return [steps]
        whole, rest = divmod(steps, self.steps_per_call)
        return [self.steps_per_call] * whole + [rest] * (rest > 0)

    def epochs_at(self, step):
        """Epochs trained after `step` steps; config.epochs at the end, be it within an epoch."""
        if step == self.total_steps:
            return self.config.epochs
        epochs, rest = divmod(step, self.steps_per_epoch)
        return step / self.steps_per_epoch if rest else epochs

    @property
    def end_step(self):
        """Where a run ends, or stops as config.stop_after says."""
        config = self.config
        if 0 < config.stop_after < config.epochs:
            return min(self.total_steps, max(1, round(config.stop_after * self.steps_per_epoch)))
        return self.total_steps

    def ends_epoch(self, step):
        """Whether `step` steps make whole epochs or the whole run."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    @property
    def about_data(self):
        """What a run keeps of its data, to name classes without them and to know them again."""
        return {
            "class_names": self.class_names,
            "image_shape": self.train.images.shape[1:],
            **{key: self.provenance[key] for key in ("sizes", "sha256")},
        }

    def images_at(self, step):
        """Images trained on in the first `step` steps, each as often as it came."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        n, batch_size = len(self.train.labels), self.config.batch_size
        return epochs * min(n, self.steps_per_epoch * batch_size) + rest * batch_size


def make_model(config, class_names, image_shape=(32, 32, 3)):
    """The config's flax module; InputError if its fields do not make a network for such images."""
    with _section("model"):
        if config.model.get("dtype") == "float64":  # JAX would compute in float32
            raise InputError("a run cannot compute in float64; choose another model.dtype")
        model = create_model(**config.model, num_classes=len(class_names))
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        with plain_convolutions():  # of the same shapes, and soon traced
            jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    return model


def make_augments(config, image_shape=(32, 32, 3)):
    """(augment, normalize): the training transform, and its normalisation alone."""
    with _section("augment"):
        augment = make_augment(**config.augment)
        if "normalize" not in config.augment.ops:
            raise InputError("config.augment.ops must hold 'normalize'")
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
        if jax.eval_shape(lambda x: augment(jax.random.key(0), x), image).shape != image.shape:
            raise InputError("config.augment changes the shape of the images")
    return augment, make_augment(**{**config.augment, "ops": ("normalize",)})


@contextlib.contextmanager
def _section(name):
    """Errors from building what a config section says, as one sentence that names the section."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"config.{name} lacks the field {error.args[0]!r}") from error
    except (TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise InputError(f"config.{name} cannot be used: {first_line(error)}") from error


def describe_data(config):
    """The data.Description of the config's data, none of which is loaded."""
    return data.describe(config.data.name, config.data.dir)


def load_data(config):
    """{'train', 'validation' if one is held out, 'test': Dataset} on the host."""
    train, test = (
        data.load(config.data.name, config.data.dir, split) for split in ("train", "test")
    )
    if not config.data.validation:
        return {"train": train, "test": test}
    seed = config.seed if config.data.split_seed is None else config.data.split_seed
    train, validation = data.hold_out(train, config.data.validation, seed)
    return {"train": train, "validation": validation, "test": test}


def make_experiment(config, total_steps=None, splits=None, class_names=None, shard_batches=True):
    """Load the data, put it on the devices and build everything a run needs.

    `total_steps` is what the schedule spans: config.epochs unless given. `splits` (as of load_data)
    and `class_names` take the place of the config's data. `shard_batches`: each batch is split over
    all devices; if not, step and evaluations say nothing of devices and are not jitted, for a
    caller to map. Raises InputError for a bad config.
    """
    _check(config)
    mesh = sharding.make_mesh()
    placement = sharding.replicated(mesh)
    if shard_batches:
        sharding.check_batch_size(config.batch_size, mesh.size, "devices")
    sharding.check_batch_size(config.batch_size, config.ghost_batches, "ghost batches")
    if not (splits and class_names):
        about = describe_data(config)
    class_names = class_names or about.class_names
    image_shape = splits["train"].images.shape[1:] if splits else about.image_shape
    model = make_model(config, class_names, image_shape)
    augment, normalize = make_augments(config, image_shape)
    splits = splits or load_data(config)
    n = len(splits["train"])
    if config.batch_size > n:
        raise InputError(
            f"config.batch_size {config.batch_size} is more than the {n} training images"
        )
    steps_per_epoch = count_steps(n, config.batch_size, config.drop_last)
    # the last epoch may be part of one; rounded first, for 2.3 * 10 is a little more than 23
    total_steps = total_steps or math.ceil(round(config.epochs * steps_per_epoch, 6))
    with _section("schedule"):
        schedules = make_schedules(
            **config.schedule, total_steps=total_steps, steps_per_epoch=steps_per_epoch
        )
        jax.eval_shape(schedules.learning_rate, 0)
    with _section("optim"):
        tx = make_optimizer(**config.optim, schedule=schedules)
    shard, whole, jit = (lambda same: same,) * 3
    if shard_batches:
        shard, whole = sharding.make_shard_batch(mesh), sharding.make_whole(mesh)
        jit = functools.partial(jax.jit, out_shardings=placement)
    spread = sharding.make_spread(mesh) if shard_batches else None
    # ghost batches, a device's own each, are no shares of one
    by_shares = shares_of_devices(spread if config.ghost_batches == 1 else None)
    ordering = {
        "batch_size": config.batch_size,
        "num_examples": n,
        "drop_last": config.drop_last,
        "whole": whole,
    }
    batching = {
        **ordering,
        "augment": augment,
        "alternating_flip": config.alternating_flip,
        "shard": shard,
    }
    lookahead = None
    if config.lookahead.every:
        lookahead = make_lookahead(**config.lookahead, total_steps=total_steps)

    def make_step(tx, **other):
        more = {"lookahead": lookahead, "ghost_batches": config.ghost_batches, **batching, **other}
        return by_shares(make_train_step(model, tx, **config.loss, **more))

    transform = augment if config.eval.augmented else normalize
    kwargs = {"batch_size": config.eval.batch_size, "transform": transform, "shard": shard}

    def make_evaluation(**other):
        return jit(shares_of_devices(spread)(make_evaluate(model, **{**kwargs, **other})))

    evaluations = {tta: make_evaluation(tta=tta) for tta in VIEWS}
    provenance = {
        "name": config.data.name,
        "sizes": {name: len(split) for name, split in splits.items()},
        "sha256": {name: data.fingerprint(split) for name, split in splits.items()},
    }
    on_device = {name: sharding.put(split, placement) for name, split in splits.items()}
    exp = Experiment(
        config=config,
        placement=placement,
        class_names=class_names,
        train=on_device["train"],
        validation=on_device.get("validation"),
        test=on_device["test"],
        provenance=provenance,
        model=model,
        schedules=schedules,
        tx=tx,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        batching=batching,
        order=make_order(**ordering),
        lookahead=lookahead,
        augment=augment,
        normalize=normalize,
        by_shares=by_shares,
        make_step=make_step,
        step=make_step(tx),
        make_evaluation=make_evaluation,
        evaluate=evaluations["none"],
        evaluations=evaluations,
        evaluate_clean=make_evaluation(transform=normalize),
    )
    if schedules.freeze:
        exp.abstract_state()  # refuses an unknown layer
    return exp


class Trained(NamedTuple):
    """The best checkpoint of a run, with all that it takes to use it."""

    path: pathlib.Path  # of the workdir
    model: nn.Module
    state: TrainState  # without optimizer
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]


def restore_best(config, workdir):
    """The Trained of the run in `workdir`.

    Needs no data: the run keeps what they were. Raises InputError if there is no such run or it has
    another config.
    """
    path = files.existing(workdir)
    files.check_config(path, config.to_dict(), files.LOOKING_FIELDS)
    class_names, image_shape = files.data_of(path) or describe_data(config)
    model = make_model(config, class_names, image_shape)
    key = jax.random.key(0)
    with plain_convolutions():  # only shapes are asked for
        state = jax.eval_shape(lambda: init_state(key, model, optax.identity(), image_shape))
    state = state.replace(key=key)
    whole = sharding.replicated(sharding.make_mesh())
    with Checkpoints(path / "checkpoints", whole, read_only=True) as checkpoints:
        return Trained(path, model, checkpoints.restore_best(state), class_names, image_shape)


def check_seeds(first, count):
    """InputError unless first, first + 1, ... are `count` seeds that there are."""
    if first + count - 1 > LARGEST_SEED:
        raise InputError(f"{count} seeds from {first} on go beyond the largest, {LARGEST_SEED}")


def _check(config):
    numbers = {}  # of a field one or several
    for field, value in files.flatten(config.to_dict()).items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        numbers[field] = [x for x in values if x is not None]
        for x in numbers[field]:
            if isinstance(x, float) and not math.isfinite(x):
                raise InputError(f"config.{field} must be finite, not {x}")
    for meaning, fits, fields in RANGES:
        for field in fields:
            for x in numbers.get(field, ()):
                if not fits(x):
                    raise InputError(f"config.{field} must be {meaning}, not {x}")
    if config.loss.reduction not in ("mean", "sum"):
        raise InputError(f"unknown loss.reduction {config.loss.reduction!r}; choose mean or sum")
    if config.on_nonfinite not in ("stop", "rollback"):
        raise InputError(f"unknown on_nonfinite {config.on_nonfinite!r}; choose stop or rollback")
    if config.eval.tta not in VIEWS:
        raise InputError(f"unknown eval.tta {config.eval.tta!r}; choose one of {', '.join(VIEWS)}")
    if config.save_every > 1 and config.schedule.get("from_best"):
        raise InputError(
            "config.save_every must be 1 for schedule.from_best, which goes back to any epoch"
        )
    phases = config.schedule.get("epochs")
    if phases and sum(phases) != config.epochs:
        raise InputError(
            f"config.epochs {config.epochs} is not the sum of the phases, config.schedule.epochs "
            f"{tuple(phases)}; to stop earlier set config.stop_after"
        )
