"""Exact counts of a network's arithmetic, and what of the image each layer sees."""

import collections
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from cifar_jax.models.layers import plain_convolutions

TRAINING = 3  # passes' worth: forward, and backward with a product for inputs and one for weights


class Field(NamedTuple):
    """Of a map: pixels of the image that one place sees along an axis (inf: all of it), and the
    pixels between one place and the next."""

    size: float
    step: int


def forward_macs(model, image_shape=(32, 32, 3)):
    """Multiply-adds of the convolutions and matrix products of one image's forward pass.

    A MAC is two FLOPs; training takes TRAINING times as many. Counted in the jaxpr, nothing is
    computed. A convolution counts as such, also where Winograd's form of it takes fewer. Zeros that
    pad an image count, everything elementwise (BatchNorm, pooling, activations) does not.
    """
    return macs(_forward(model, image_shape))


def has_convolution(model, image_shape=(32, 32, 3)):
    """Whether XLA's own convolution runs in the network here; see layers.convolve."""
    return any(
        equation.primitive.name == "conv_general_dilated"
        for equation in _equations(_trace_forward(model, image_shape))
    )


def by_layer(model, image_shape=(32, 32, 3)):
    """({layer: multiply-adds of an image}, {layer: Field of its output}), as forward_macs counts;
    a layer is a module by its own name."""
    products, fields = collections.Counter(), {}
    jaxpr = _forward(model, image_shape)
    inputs = [None] * (len(jaxpr.jaxpr.invars) - 1) + [Field(1, 1)]
    _trace(jaxpr.jaxpr, inputs, (), products, fields)
    return products, fields


def _forward(model, image_shape):
    """The jaxpr of one image's forward pass in evaluation mode; the image is its last input."""
    with plain_convolutions():
        return _trace_forward(model, image_shape)


def _trace_forward(model, image_shape):
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    return jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)


def _equations(jaxpr):
    """All equations of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for body in _bodies(equation):
            yield from _equations(body)


def _trace(jaxpr, inputs, scope, products, fields):
    """The Fields of a jaxpr's outputs (None: not of the image), given those of its inputs; fills
    `products` and `fields` by the innermost module's name."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        names = (*scope, *str(equation.source_info.name_stack).split("/"))
        seen = [None if isinstance(v, Literal) else known.get(v) for v in equation.invars]
        bodies = [getattr(body, "jaxpr", body) for body in _bodies(equation)]
        reduces = equation.primitive.name.startswith("reduce")  # its body is of two numbers
        if bodies and not reduces and len(bodies[0].invars) == len(seen):
            out = _trace(bodies[0], seen, names, products, fields)
        else:
            out = [_field(equation, seen)] * len(equation.outvars)
            products[names[-1]] += _own_macs(equation)
        known.update(zip(equation.outvars, out, strict=True))
        if out and out[0]:
            fields[names[-1]] = out[0]
    return [None if isinstance(v, Literal) else known.get(v) for v in jaxpr.outvars]


def _field(equation, seen):
    """The Field of an equation's output: wider by windows, whole once the map is flattened or
    averaged, else the widest of what it is made from."""
    found = [field for field in seen if field]
    if not found:
        return None
    widest = Field(max(f.size for f in found), max(f.step for f in found))
    name, shape = equation.primitive.name, equation.invars[0].aval.shape
    if name == "conv_general_dilated":
        axis = equation.params["dimension_numbers"].rhs_spec[2]
        reach = equation.params["rhs_dilation"][0] * (equation.invars[1].aval.shape[axis] - 1)
        return _seen_by(widest, reach, equation.params["window_strides"][0])
    if name.startswith("reduce_window"):
        return _seen_by(
            widest,
            equation.params["window_dimensions"][1] - 1,
            equation.params["window_strides"][1],
        )
    if len(shape) != 4 or shape[1] * shape[2] == 1:
        return widest
    out = equation.outvars[0].aval.shape
    if name == "reshape" and len(out) == 6:  # an average pool's windows
        return _seen_by(widest, out[2] - 1, out[2])
    flattened = name == "reshape" and out[1:3] != shape[1:3]
    if flattened or (name.startswith("reduce_") and 1 in equation.params["axes"]):
        return widest._replace(size=math.inf)
    return widest


def _seen_by(field, reach, stride):
    """The Field after windows that reach so many places beyond the first, `stride` apart."""
    return Field(field.size + reach * field.step, field.step * stride)


def macs(jaxpr):
    """Multiply-adds of all dot_general and conv_general_dilated in a jaxpr, those of a scan's body
    times its length. Raises ValueError for some inside a loop of unknown length."""
    total = 0
    for equation in jaxpr.eqns:
        total += _own_macs(equation)
        inner = sum(macs(body) for body in _bodies(equation))
        if equation.primitive.name == "while" and inner:
            raise ValueError("a while loop with products in it: its length is not known")
        total += inner * equation.params.get("length", 1)
    return total


def _own_macs(equation):
    """Those of one equation, its bodies left out."""
    out = equation.outvars[0].aval if equation.outvars else None
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return out.size * math.prod(left[i] for i in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return out.size * kernel.size // features
    return 0


def _bodies(equation):
    """The jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
