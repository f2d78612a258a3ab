"""Exact counts of a network's arithmetic."""

import math

import jax
import jax.numpy as jnp

from cifar_jax.models.layers import plain_convolutions

TRAINING = 3  # passes' worth: forward, and backward with a product for inputs and one for weights


def forward_macs(model, image_shape=(32, 32, 3)):
    """Multiply-adds of the convolutions and matrix products of one image's forward pass.

    A MAC is two FLOPs; training takes TRAINING times as many. Counted in the jaxpr, nothing is
    computed. A convolution counts as such, also where Winograd's form of it takes fewer. Zeros that
    pad an image count, everything elementwise (BatchNorm, pooling, activations) does not.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    with plain_convolutions():
        jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    return macs(jaxpr)


def macs(jaxpr):
    """Multiply-adds of all dot_general and conv_general_dilated in a jaxpr, those of a scan's body
    times its length. Raises ValueError for some inside a loop of unknown length."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * kernel.size // features
        inner = sum(macs(body) for body in _bodies(equation))
        if name == "while" and inner:
            raise ValueError("a while loop with products in it: its length is not known")
        total += inner * equation.params.get("length", 1)
    return total


def _bodies(equation):
    """The jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
