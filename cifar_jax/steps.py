"""The experiment as pure functions: TrainState, one training step, one evaluation. No I/O, no
config object."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax, random

from cifar_jax.metrics import measure, per_example_loss


class TrainState(struct.PyTreeNode):
    """All that changes during training: step (int32), params, batch_stats, opt_state, key (the
    run's, constant)."""

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    key: jax.Array


def init_state(key, model, tx, image_shape=(32, 32, 3)):
    """A fresh TrainState; `vmap` over keys gives many seeds."""
    init_key, run_key = random.split(key)
    variables = model.init(init_key, jnp.zeros((1, *image_shape)), train=False)
    params = variables["params"]
    return TrainState(
        jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), tx.init(params), run_key
    )


def shuffled(key, positions, n):
    """Which example stands at each of `positions` (int32, modulo n) of a random order of n
    examples.

    A Feistel network of four rounds on the next even power of two, walked until the result is
    below n: a
    pseudo-random permutation that costs the batch's size, not n, so that a step needs no stored
    order.
    """
    bits = max(1, -(-(n - 1).bit_length() // 2))  # of each half
    mask = jnp.uint32((1 << bits) - 1)
    round_keys = random.bits(key, (4,), jnp.uint32)

    def encrypt(value):
        left, right = value >> bits, value & mask
        for i in range(4):
            mixed = (
                right * jnp.uint32(0x9E3779B1) + round_keys[i]
            )  # a 32-bit finaliser (murmur3) as round function
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


def make_batches(*, batch_size, num_examples, augment, shard=lambda batch: batch):
    """batches(key, step, dataset, size=batch_size) -> (augmented images, labels, dropout key).

    Step t takes examples [i * batch_size, i * batch_size + size) of epoch t // steps_per_epoch's
    random order, i = t modulo steps_per_epoch = ceil(num_examples / batch_size); the last batch of
    an epoch is smaller and needs its own static `size`. All follows from (key, step) alone.
    `augment(key, u8 images)` includes the normalisation; `shard` constrains the batch's sharding.
    """
    steps_per_epoch = -(-num_examples // batch_size)

    def batches(key, step, dataset, size=batch_size):
        epoch, i = step // steps_per_epoch, step % steps_per_epoch
        order_key = random.fold_in(random.fold_in(key, 0), epoch)
        augment_key, dropout_key = random.split(random.fold_in(random.fold_in(key, 1), step))
        rows = shuffled(order_key, i * batch_size + jnp.arange(size), num_examples)
        batch = shard(take(dataset, rows))
        return augment(augment_key, batch.images), batch.labels, dropout_key

    return batches


def make_train_step(
    model,
    tx,
    *,
    batch_size,
    num_examples,
    augment,
    reduction="mean",
    label_smoothing=0.0,
    shard=lambda batch: batch,
):
    """One optimizer step as a pure function: step(state, dataset, size=batch_size) -> (state,
    Metrics).

    It trains on make_batches' batch of its step; dropout follows from (state.key, step) too.
    `reduction` of the loss is 'mean' or 'sum' over the batch. Metrics are of the training-mode
    forward pass.
    """
    batches = make_batches(
        batch_size=batch_size, num_examples=num_examples, augment=augment, shard=shard
    )
    scale = {"mean": lambda size: 1.0 / size, "sum": lambda size: 1.0}[reduction]

    def step(state, dataset, size=batch_size):
        images, labels, dropout_key = batches(state.key, state.step, dataset, size)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = model.apply(
                variables,
                images,
                train=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            losses = per_example_loss(logits, labels, label_smoothing)
            metrics = measure(logits, labels, losses)
            return losses.sum() * scale(size), (metrics, updated.get("batch_stats", {}))

        grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(
            step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
        )
        return state, metrics

    return step


def repeat(step, num_steps, size):
    """`num_steps` consecutive steps of `size` examples as one call: run(state, metrics, dataset)
    -> (state, metrics).

    Adds to `metrics`. More than one step becomes a scan: fast on accelerators; on CPU XLA's
    convolution gradients are
    about 25 times slower inside a loop (measured), so run one step a call there.
    """

    def body(carry, dataset):
        state, metrics = carry
        state, more = step(state, dataset, size)
        return state, metrics + more

    def run(state, metrics, dataset):
        if num_steps == 1:
            return body((state, metrics), dataset)
        carry, _ = lax.scan(
            lambda c, _: (body(c, dataset), None), (state, metrics), length=num_steps
        )
        return carry

    return run


def make_predict(model, *, transform):
    """predict(state, key, u8 images [B, H, W, 3]) -> logits float32 [B, num_classes], in
    evaluation mode."""

    def predict(state, key, images):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = model.apply(variables, transform(key, images), train=False)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    return predict


def make_evaluate(model, *, batch_size, transform, shard=lambda batch: batch):
    """evaluate(state, dataset) -> (Metrics, logits [N, num_classes]); every image counts once at
    any batch size.

    The last batch is filled up and its surplus masked out. `transform(key, u8 images)` normalises;
    where it is random
    (an augmented test, as system 004's) it follows from (state.key, step).
    """
    predict = make_predict(model, transform=transform)

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
