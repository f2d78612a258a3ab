"""The experiment as pure functions: TrainState, one training step, one evaluation; no I/O."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax, random

from cifar_jax.augment import flip
from cifar_jax.metrics import measure, per_example_loss
from cifar_jax.models.layers import in_pieces

# of a test image: itself; and its mirror image; and of both, two shifts by a pixel
VIEWS = ("none", "mirror", "multicrop")


class TrainState(struct.PyTreeNode):
    """All that changes during training: step (int32), params, batch_stats, opt_state, key (the
    run's, constant); with lookahead `slow`, its weights {params, batch_stats}."""

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    key: jax.Array
    slow: dict | None = None

    @property
    def variables(self):
        """{params, batch_stats}: what the model is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def with_variables(self, variables):
        """This with other `variables`, which lookahead's slow weights begin from, too."""
        slow = None if self.slow is None else jax.tree.map(jnp.copy, variables)
        return self.replace(**variables, slow=slow)


def init_state(key, model, tx, image_shape=(32, 32, 3), images=None, lookahead=False):
    """A fresh TrainState; `vmap` over keys gives many seeds.

    `images`: normalised training images [N, H, W, C] for a model that measures them; `lookahead`
    for a step that has one.
    """
    init_key, run_key = random.split(key)
    variables = model.init(init_key, jnp.zeros((1, *image_shape)), train=False)
    if images is not None:
        variables = model.initialize_from_data(variables, images)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    slow = {"params": params, "batch_stats": batch_stats} if lookahead else None
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, tx.init(params), run_key, slow)


def shuffled(key, positions, n):
    """Which example stands at each of `positions` (int32, modulo n) of a random order of n.

    A Feistel network of four rounds on the next even power of two, walked until the result is below
    n: a pseudo-random permutation that costs the batch's size, not n, so that a step needs no
    stored order.
    """
    bits = max(1, -(-(n - 1).bit_length() // 2))  # of each half
    mask = jnp.uint32((1 << bits) - 1)
    round_keys = random.bits(key, (4,), jnp.uint32)

    def encrypt(value):
        left, right = value >> bits, value & mask
        for i in range(4):
            # a 32-bit finaliser (murmur3) as round function
            mixed = right * jnp.uint32(0x9E3779B1) + round_keys[i]
            mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
            mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
            left, right = right, left ^ ((mixed ^ (mixed >> 16)) & mask)
        return left << bits | right

    def walk(value):
        return jnp.where(value >= n, encrypt(value), value)

    start = encrypt(positions.astype(jnp.uint32) % n)  # a start beyond n might walk for ever
    return lax.while_loop(lambda v: (v >= n).any(), walk, start).astype(jnp.int32)


def take(dataset, rows):
    """The examples at `rows` (int [B], in range)."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), dataset)


def count_steps(num_examples, batch_size, drop_last=False):
    """Training steps an epoch: with the smaller last batch, or without it."""
    return num_examples // batch_size if drop_last else -(-num_examples // batch_size)


def make_order(*, batch_size, num_examples, drop_last=False, whole=lambda rows: rows):
    """order(key, steps, size=batch_size) -> the examples int32 [*steps.shape, size] of each step.

    Step t takes examples [i * batch_size, i * batch_size + size) of epoch t // steps_per_epoch's
    random order, i = t modulo steps_per_epoch = ceil(num_examples / batch_size); the last batch of
    an epoch is smaller and needs its own static `size`, unless `drop_last` leaves it out. All
    follows from (key, step) alone. `whole` constrains the rows' sharding: split over the devices,
    these would ask one another at every turn whether the walk is over.
    """
    steps_per_epoch = count_steps(num_examples, batch_size, drop_last)

    def order(key, steps, size=batch_size):
        def one(step):
            epoch, i = step // steps_per_epoch, step % steps_per_epoch
            epoch_key = random.fold_in(random.fold_in(key, 0), epoch)
            return shuffled(epoch_key, i * batch_size + jnp.arange(size), num_examples)

        return whole(jax.vmap(one)(steps) if jnp.ndim(steps) else one(steps))

    return order


def make_batches(
    *,
    augment,
    alternating_flip=False,
    shard=lambda batch: batch,
    **ordering,
):
    """batches(key, step, dataset, size=batch_size, rows=None) -> (augmented images, labels, dropout
    key).

    `rows`: the step's examples, unless given those of make_order(**ordering). All follows from
    (key, step) alone. `augment(key, u8 images)` includes the normalisation; `alternating_flip`
    mirrors each image in every other epoch, from the first or the second on by a coin of its own
    (cifar10-airbench); `shard` constrains the batch's sharding.
    """
    order = make_order(**ordering)
    sizes = {name: value for name, value in ordering.items() if name != "whole"}
    steps_per_epoch = count_steps(**sizes)

    def batches(key, step, dataset, size=ordering["batch_size"], rows=None):
        augment_key, dropout_key = random.split(random.fold_in(random.fold_in(key, 1), step))
        rows = order(key, step, size) if rows is None else rows
        batch = shard(take(dataset, rows))
        images = augment(augment_key, batch.images)
        if alternating_flip:
            coin_key = random.fold_in(key, 3)
            coins = jax.vmap(lambda row: random.bernoulli(random.fold_in(coin_key, row)))(rows)
            images = flip(images, coins ^ (step // steps_per_epoch % 2 == 1))
        return images, batch.labels, dropout_key

    return batches


def make_train_step(
    model,
    tx,
    *,
    reduction="mean",
    label_smoothing=0.0,
    lookahead=None,
    ghost_batches=1,
    **batching,
):
    """One optimizer step, pure: step(state, dataset, size=..., frozen=(), rows=None) -> (state,
    Metrics).

    It trains on the batch of its step of make_batches(**batching); dropout follows from (state.key,
    step) too. `reduction` of the loss is 'mean' or 'sum' over the batch. `lookahead`: see
    optim.make_lookahead; it acts on params and batch_stats. The layers named in `frozen` are those
    that `tx` does not update in this step: their gradients are not computed. Metrics are of the
    training-mode forward pass. `ghost_batches`: see apply_in_parts.
    """
    batches = make_batches(**batching)
    scale = {"mean": lambda size: 1.0 / size, "sum": lambda size: 1.0}[reduction]

    def step(state, dataset, size=batching["batch_size"], frozen=(), rows=None):
        images, labels, dropout_key = batches(state.key, state.step, dataset, size, rows)

        def loss_fn(params):
            params = {**params, **{name: lax.stop_gradient(params[name]) for name in frozen}}
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, stats = apply_in_parts(model, variables, images, dropout_key, ghost_batches)
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            losses = per_example_loss(logits, labels, label_smoothing)
            metrics = measure(logits, labels, losses)
            return losses.sum() * scale(size), (metrics, stats)

        grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        fast = {"params": optax.apply_updates(state.params, updates), "batch_stats": batch_stats}
        slow, count = state.slow, state.step + 1
        if lookahead:
            slow, fast = lookahead(slow, fast, count)
        return state.replace(step=count, **fast, opt_state=opt_state, slow=slow), metrics

    return step


def apply_in_parts(model, variables, images, dropout_key, parts=1):
    """(logits [B, num_classes], new batch_stats) of images [B, H, W, C] in training mode.

    With more `parts` than one BatchNorm normalises each of as many equal parts of the batch by its
    own statistics, and its running ones move by the parts' mean ("ghost batches", Hoffer et al.,
    2017): with as many as there are devices each keeps to its own, as under PyTorch's
    DistributedDataParallel, and nothing is sent between them in the forward pass. A batch that does
    not divide into them, the last of an epoch, is one part.
    """

    def apply(images, dropout_key):
        logits, updated = model.apply(
            variables, images, train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
        )
        return logits, updated.get("batch_stats", {})

    if parts == 1 or images.shape[0] % parts:
        return apply(images, dropout_key)
    images = images.reshape(parts, -1, *images.shape[1:])
    logits, stats = jax.vmap(apply)(images, random.split(dropout_key, parts))
    # by the mean of their changes: what does not change, airbench's whitening, is not rounded
    old = variables["batch_stats"]
    stats = jax.tree.map(lambda old, new: old + (new - old[None]).mean(0), old, stats)
    return logits.reshape(-1, logits.shape[-1]), stats


def repeat(step, order, num_steps, size, frozen=()):
    """`num_steps` steps as one call: run(state, metrics, dataset) -> (state, metrics).

    Each is of `size` examples; their Metrics are added to `metrics`. More than one step becomes a
    scan. `order` (make_order's) is drawn for all of them before it: its walk, a loop without a
    known end, would have a GPU wait for the host in every step. On CPU the gradients of XLA's own
    convolutions are about 25 times slower inside a scan (measured).
    """

    def body(carry, dataset, rows):
        state, metrics = carry
        state, more = step(state, dataset, size, frozen, rows)
        return state, metrics + more

    def run(state, metrics, dataset):
        if num_steps == 1:
            return body((state, metrics), dataset, order(state.key, state.step, size))
        rows = order(state.key, state.step + jnp.arange(num_steps), size)
        carry, _ = lax.scan(lambda c, r: (body(c, dataset, r), None), (state, metrics), rows)
        return carry

    return run


def make_predict(model, *, transform, tta="none"):
    """predict(state, key, u8 images [B, H, W, 3]) -> logits float32 [B, num_classes], in
    evaluation mode, averaged over the views `tta` (average_views)."""

    def predict(state, key, images):
        def apply(images):
            return model.apply(state.variables, images, train=False)

        images = transform(key, images)
        return average_views(lambda views: in_pieces(apply, views), images, tta)

    return predict


def average_views(predict, images, tta):
    """Logits [B, C], at least float32, of predict(images [B, H, W, C]) averaged over views of each
    image.

    `tta` is 'none', 'mirror' (the image and its mirror image) or 'multicrop' (half the weight on
    these two, half on those of two diagonal shifts by one pixel, edges reflected): level 0, 1 and 2
    of cifar10-airbench.
    """

    def wide(images):
        logits = predict(images)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    if tta == "none":
        return wide(images)
    views, weights = [images], [0.5]
    if tta == "multicrop":
        height, width = images.shape[1:3]
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        views += [padded[:, i : i + height, i : i + width] for i in (0, 2)]
        weights = [0.25, 0.125, 0.125]
    views = jnp.stack([*views, *(view[:, :, ::-1] for view in views)])
    logits = lax.map(wide, views)  # [views, B, C]
    weights = jnp.array([*weights, *weights], logits.dtype)
    return (weights[:, None, None] * logits).sum(0)


def make_evaluate(model, *, batch_size, transform, tta="none", shard=lambda batch: batch):
    """evaluate(state, dataset) -> (Metrics, logits [N, num_classes]); each image counts once.

    The last batch is filled up and its surplus masked out. `transform(key, u8 images)` normalises;
    where it is random (an augmented test, as system 004's) it follows from (state.key, step).
    `tta`: the views of an image, see average_views.
    """
    predict = make_predict(model, transform=transform, tta=tta)

    def evaluate(state, dataset):
        n = dataset.images.shape[0]
        batches = -(-n // batch_size)
        key = random.fold_in(random.fold_in(state.key, 2), state.step)

        def one(i):
            rows = i * batch_size + jnp.arange(batch_size)
            batch = shard(take(dataset, rows))
            logits = predict(state, random.fold_in(key, i), batch.images)
            losses = per_example_loss(logits, batch.labels)
            return measure(logits, batch.labels, losses, weight=rows < n), logits

        metrics, logits = lax.map(one, jnp.arange(batches))
        metrics = jax.tree.map(lambda x: x.sum(0), metrics)
        return metrics, logits.reshape(-1, logits.shape[-1])[:n]

    return evaluate
