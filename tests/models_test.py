"""Every family: its parameter count, shapes, dtypes; the layers against torch.nn and lax.conv."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from cifar_jax import InputError, sharding, torch_twin, weights
from cifar_jax.compilation import once_options
from cifar_jax.models import MODELS, cpu_conv, create_model, winograd
from cifar_jax.models.airbench import whitening_kernel
from cifar_jax.models.layers import (
    BatchNorm,
    Conv,
    avg_pool,
    convolve,
    max_pool,
    plain_convolutions,
    shares_of_devices,
)
from cifar_jax.steps import init_state

PARAMETERS = {
    "vgg": 2_882_474,
    "convnet": 2_791_434,
    "resnet": 6_573_120,
    "mixture": 4_796_649,
    "dilated": 2_034_040,
    # the whitening's 24 biases; 3x3 kernels 24->64->64, 64->256->256, 256->256->256; BatchNorm's
    # biases; 256 x 10 of the head. The original counts 288 frozen weights and 1,152 scales more:
    # 1.973 M
    "airbench": 24
    + 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    + 2 * (64 + 256 + 256)
    + 256 * 10,
}
STATISTICS = {
    "vgg": 1_920,
    "convnet": 0,
    "resnet": 4_480,
    "mixture": 6_072,
    "dilated": 2_424,
    "airbench": 2 * 2 * 3 * 24 + 2 * 2 * (64 + 256 + 256),
}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def variables_of(model, batch=2):
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((batch, 32, 32, 3)), train=False)
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_statistics(name):
    variables = variables_of(create_model(name, num_classes=10))
    assert count(variables["params"]) == PARAMETERS[name]
    assert count(variables.get("batch_stats", {})) == STATISTICS[name]


def test_airbench96():
    """9.919 M in the original, of which 288 frozen weights and 3,072 scales are no parameters."""
    model = create_model("airbench", num_classes=10, widths=(128, 384, 512), depth=3)
    assert count(variables_of(model)["params"]) == 9_918_776 - 288 - 3 * 1024
    assert PARAMETERS["airbench"] + 288 + 1_152 == 1_972_792


def test_whitening_makes_the_patches_white(rng):
    """Responses of the first 12 filters to the measured images: covariance v / (v + epsilon)."""
    smooth = rng.normal(size=(40, 32, 32, 3)).cumsum(1).cumsum(2) / 3
    smooth += rng.normal(size=smooth.shape)  # no direction as small as epsilon
    with jax.enable_x64(True):
        kernel = whitening_kernel(jnp.asarray(smooth))
        assert kernel.shape == (2, 2, 3, 24)
        np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
        out = np.asarray(convolve(jnp.asarray(smooth), kernel[..., :12], 0)).reshape(-1, 12)
        before = np.concatenate(
            [smooth[:, i : i + 31, j : j + 31] for i in (0, 1) for j in (0, 1)], -1
        ).reshape(-1, 12)
        values = np.linalg.eigvalsh(before.T @ before / len(before))
        assert values.max() > 50 * values.min()  # far from white before
        covariance = out.T @ out / len(out)
        np.testing.assert_allclose(covariance, np.diag(values / (values + 5e-4)), atol=1e-9)
    small = np.asarray(whitening_kernel(jnp.zeros((2, 32, 32, 3))))
    np.testing.assert_allclose((small**2).sum((0, 1, 2)), 1 / 5e-4, rtol=1e-5)


def test_whitening_is_measured_and_no_parameter(rng):
    model = create_model("airbench", num_classes=10, widths=(4, 4, 4), whitening_images=3)
    images = jnp.asarray(rng.normal(size=(3, 32, 32, 3)), jnp.float32)
    state = init_state(jax.random.key(0), model, optax.identity(), images=images)
    np.testing.assert_array_equal(state.batch_stats["whiten"]["kernel"], whitening_kernel(images))
    assert set(state.params["whiten"]) == {"bias"}

    def input_gradient(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        return jax.jit(jax.grad(lambda x: model.apply(variables, x, train=False).sum()))(images)

    assert not input_gradient(state.params).any()


@pytest.mark.parametrize(("channels", "features"), [(4, 6), (6, 6), (6, 4)])
def test_identity_start_is_torchs_dirac(channels, features, rng):
    layer = Conv(features, use_bias=False, identity=True)
    x = jnp.asarray(rng.normal(size=(1, 5, 5, channels)), jnp.float32)
    kernel = jax.jit(layer.init)(jax.random.key(0), x)["params"]["kernel"]
    theirs = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1).contiguous()
    drawn = theirs.clone()
    torch.nn.init.dirac_(theirs[:channels])
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=0)
    shared = min(channels, features)
    np.testing.assert_array_equal(convolve(x, kernel, 1)[..., :shared], x[..., :shared])
    rest = np.asarray(kernel[..., shared:])
    assert rest.size == 0 or (np.abs(rest).max() <= (9 * channels) ** -0.5 and rest.all())


def test_batch_norm_without_a_scale_is_one_with_ones(rng):
    x = jnp.asarray(rng.normal(size=(3, 4, 4, 5)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=5), jnp.float32)
    variables = BatchNorm().init(jax.random.key(0), x, False)
    both = {
        use_scale: BatchNorm(use_scale=use_scale).apply(
            {
                **variables,
                "params": {"bias": bias, **({"scale": jnp.ones(5)} if use_scale else {})},
            },
            x,
            True,
            mutable=["batch_stats"],
        )[0]
        for use_scale in (True, False)
    }
    np.testing.assert_array_equal(both[True], both[False])


def test_sequential_mixture():
    assert (
        count(variables_of(create_model("mixture", num_classes=10, sequential=True))["params"])
        == 7_941_594
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_variables_and_output_shape(name, dtype):
    model = create_model(name, num_classes=7, dtype=dtype)
    variables = variables_of(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out, updated = jax.eval_shape(
        lambda v, x: model.apply(
            v, x, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
        ),
        variables,
        jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32),
    )
    assert out.shape == (4, 7)
    assert jax.tree.map(
        lambda a: (a.shape, a.dtype), updated.get("batch_stats", {})
    ) == jax.tree.map(lambda a: (a.shape, a.dtype), variables.get("batch_stats", {}))


@pytest.mark.parametrize("name", [name for name in torch_twin.TWINS if name != "airbench"])
def test_initial_values_are_pytorchs(name):
    """Of every tensor, as ours and as PyTorch's own fresh layers have it: uniform within
    1 / sqrt(fan-in); scales and variances one, shifts and means zero."""
    model, image = create_model(name, num_classes=10), jnp.zeros((1, 32, 32, 3))

    def init(image):
        with plain_convolutions():
            return model.init(jax.random.key(0), image, train=False)

    variables = jax.jit(init, compiler_options=once_options())(image)
    variables = {"batch_stats": {}, **jax.device_get(variables)}
    torch.manual_seed(0)
    theirs = torch_twin.weights_of(torch_twin.create_twin(name))
    for values in (weights.to_state_dict(name, model, variables), theirs):
        for tensor, value in values.items():
            layer = tensor.rpartition(".")[0]
            kernel = values[f"{layer}.weight"]
            if kernel.ndim == 1:
                ones = tensor.endswith((".weight", ".running_var"))
                np.testing.assert_array_equal(value, np.full_like(value, ones))
                continue
            bound = np.prod(kernel.shape[1:]) ** -0.5
            assert np.abs(value).max() <= bound * (1 + 1e-6), tensor
            spread = value.std() / (bound / 3**0.5)
            assert abs(spread - 1) < (0.02 if value.size > 5000 else 4 / value.size**0.5), tensor


@pytest.mark.parametrize("name", ["vgg", "convnet", "mixture"])
def test_dropout_is_pytorchs_call_by_call(name, rng, monkeypatch):
    """The share of what is dropped, whole channels or single values, the factor on the rest."""
    images = rng.normal(size=(16, 32, 32, 3)).astype(np.float32)
    traced, theirs = [], []

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout):
            traced.append((args[0], y))
        return y

    @functools.partial(jax.jit, compiler_options=once_options())
    def run(images):
        model = create_model(name, num_classes=10)
        variables = model.init(jax.random.key(0), images, train=False)
        with nn.intercept_methods(record):
            rngs = {"dropout": jax.random.key(1)}
            model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return traced

    ours = [tuple(np.moveaxis(x, -1, 1) for x in pair) for pair in jax.device_get(run(images))]

    def spy(kind, call, x, p, training):
        y = call(x, p, training)
        theirs.append((kind, p, x.numpy(force=True), y.numpy(force=True)))
        return y

    for kind in ("dropout", "dropout2d"):
        call = getattr(torch.nn.functional, kind)
        monkeypatch.setattr(torch.nn.functional, kind, functools.partial(spy, kind, call))
    torch.manual_seed(0)
    torch_twin.create_twin(name).train()(torch_twin.images_of(images))
    for mine, (kind, p, *yours) in zip(ours, theirs, strict=True):
        assert mine[0].shape == yours[0].shape and p > 0
        for x, y in (mine, yours):
            x, y = (v.reshape(*v.shape[:2], -1) for v in (x, y))
            there, kept = x != 0, y != 0
            if kind == "dropout2d":
                there, kept = there.any(-1, keepdims=True), kept.any(-1, keepdims=True)
            np.testing.assert_allclose(y, np.where(kept, x / (1 - p), 0), rtol=1e-6)
            n = there.sum()
            assert abs(1 - kept.sum() / n - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_bad_models_are_refused():
    with pytest.raises(InputError, match="unknown model 'resnet50'; choose one of vgg"):
        create_model("resnet50", num_classes=10)
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        create_model("vgg", num_classes=10, dtype="int8")
    with pytest.raises(InputError, match="unexpected keyword argument 'depth'"):
        create_model("vgg", num_classes=10, depth=3)


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("size", "height", "width"), [(2, 8, 8), (2, 7, 9), (3, 9, 9), (3, 3, 3), (2, 31, 31)]
)
def test_max_pool_and_its_gradient_are_torchs(rng, size, height, width):
    """Small whole numbers: windows full of ties, where the first maximum takes the gradient."""
    x = rng.integers(0, 3, (4, height, width, 5)).astype(np.float32)
    theirs_in = nchw(x).requires_grad_()
    theirs = torch.nn.functional.max_pool2d(theirs_in, size)
    ours, vjp = jax.vjp(lambda v: max_pool(v, size), x)
    np.testing.assert_array_equal(ours, nhwc(theirs))
    dy = rng.normal(size=ours.shape).astype(np.float32)
    theirs.backward(nchw(dy))
    np.testing.assert_array_equal(vjp(jnp.asarray(dy))[0], nhwc(theirs_in.grad))


def test_resnets_last_pool_covers_the_map(rng):
    x = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
    theirs = torch.nn.functional.max_pool2d(nchw(x), 4, stride=2, padding=1)
    np.testing.assert_array_equal(max_pool(x, 3), nhwc(theirs))


def test_avg_pool_is_torchs(rng):
    x = rng.normal(size=(2, 24, 24, 4)).astype(np.float32)
    np.testing.assert_allclose(
        avg_pool(x, 3), nhwc(torch.nn.functional.avg_pool2d(nchw(x), 3)), atol=1e-6
    )


CONVOLUTIONS = [  # batch, size, channels, features, kernel, padding, dilation, groups
    (6, 9, 3, 8, 3, 1, 1, 1),
    (4, 8, 5, 7, 3, 0, 1, 1),
    (3, 10, 4, 6, 3, 1, 2, 1),
    (5, 6, 8, 3, 1, 0, 1, 1),
    (5, 6, 8, 3, 1, 1, 1, 1),
    (3, 6, 6, 9, 3, 1, 1, 3),
    (2, 3, 16, 24, 3, 1, 1, 1),  # by shifts
    (2, 2, 16, 16, 3, 1, 1, 1),
    (2, 3, 16, 16, 3, 2, 1, 1),  # by Winograd from here on
    (4, 8, 16, 24, 3, 0, 1, 1),
    (6, 7, 24, 16, 3, 1, 1, 1),
    (3, 9, 16, 16, 3, 1, 2, 1),
    (2, 8, 18, 24, 3, 2, 3, 2),
]


def value_and_gradients(form, arguments, dy):
    """(form(*arguments), its gradients by each of them with `dy`), as one program."""

    @jax.jit
    def both(arguments, dy):
        value, vjp = jax.vjp(form, *arguments)
        return value, vjp(dy)

    return both(tuple(arguments), dy)


@pytest.mark.parametrize(
    ("shape", "with_bias"),
    [*((shape, True) for shape in CONVOLUTIONS), *((CONVOLUTIONS[i], False) for i in (0, 7))],
)
def test_cpu_convolution_is_lax_conv_in_value_and_gradient(rng, shape, with_bias, monkeypatch):
    batch, size, channels, features, k, padding, dilation, groups = shape
    monkeypatch.setattr(cpu_conv, "BUFFER_BYTES", 40_000)  # several pieces even at these sizes
    monkeypatch.setattr(winograd, "TILE_BYTES", 200_000)
    monkeypatch.setattr(winograd, "KERNEL_GRADIENT_BYTES", 0)
    with jax.enable_x64(True):
        arguments = (
            rng.normal(size=(batch, size, size, channels)),
            rng.normal(size=(k, k, channels // groups, features)),
            rng.normal(size=features),
        )[: 3 if with_bias else 2]

        def form(x, kernel, bias=None):
            return convolve(x, kernel, padding, dilation, groups, bias)

        with plain_convolutions():
            dy = rng.normal(size=jax.eval_shape(form, *arguments).shape)
            expected, gradients = value_and_gradients(form, arguments, dy)
        for devices in (1, 8)[: 1 + (dilation > 1)]:  # over several, dilation alone is ours
            monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
            found, ours = value_and_gradients(form, arguments, dy)
            np.testing.assert_allclose(found, expected, atol=1e-12)
            for a, b in zip(ours, gradients, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("batch", [16, 6])
def test_cpu_devices_convolve_their_shares_of_a_batch(rng, batch):
    """As one device would the whole; a batch that does not divide is everybody's."""
    spread = sharding.make_spread(sharding.make_mesh())
    arguments = (
        rng.normal(size=(batch, 8, 8, 16)).astype(np.float32),
        rng.normal(size=(3, 3, 16, 24)).astype(np.float32),
        rng.normal(size=24).astype(np.float32),
    )

    def form(x, kernel, bias):
        return convolve(x, kernel, 1, bias=bias)

    def shared(*arguments):
        with shares_of_devices(spread):
            return form(*arguments)

    dy = rng.normal(size=(batch, 8, 8, 24)).astype(np.float32)
    found, ours = value_and_gradients(shared, arguments, dy)
    expected, gradients = value_and_gradients(form, arguments, dy)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for a, b in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    shared, own = str(jax.make_jaxpr(shared)(*arguments)), str(jax.make_jaxpr(form)(*arguments))
    assert "conv_general_dilated" in own and "conv_general_dilated" not in shared
    assert ("shard_map" in shared) == (batch == 16)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((CONVOLUTIONS[i], jnp.bfloat16) for i in (0, 2, 6, 9)),  # unrolled, dilated, by shifts,
        (CONVOLUTIONS[9], jnp.float16),  # by Winograd
    ],
)
def test_cpu_convolution_in_half_precision(rng, shape, dtype, monkeypatch):
    """Against float32 of the same rounded numbers, within some roundings of the result."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    batch, size, channels, features, k, padding, dilation, groups = shape
    arguments = (
        jnp.asarray(rng.normal(size=(batch, size, size, channels)), dtype),
        jnp.asarray(rng.normal(size=(k, k, channels // groups, features)), dtype),
        jnp.asarray(rng.normal(size=features), dtype),
    )

    def form(x, kernel, bias):
        return convolve(x, kernel, padding, dilation, groups, bias)

    dy = jnp.asarray(rng.normal(size=jax.eval_shape(form, *arguments).shape), dtype)
    wide = [x.astype(jnp.float32) for x in arguments]
    expected, gradients = value_and_gradients(form, wide, dy.astype(jnp.float32))
    found, ours = value_and_gradients(form, arguments, dy)
    for a, b in zip((found, *ours), (expected, *gradients), strict=True):
        assert a.dtype == dtype
        scale = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=scale)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", ["vgg", "resnet", "mixture", "dilated"])
def test_the_config_says_which_running_variance(name, unbiased):
    """The field's way to every BatchNorm; what it does there is tested below."""
    found = set()

    def note(call, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            found.add(context.module.unbiased)
        return call(*args, **kwargs)

    model = create_model(name, num_classes=10, unbiased_variance=unbiased)
    with nn.intercept_methods(note):
        variables_of(model)
    assert found == {unbiased}


def test_no_gradient_of_a_dilated_convolution_has_a_stride():
    """XLA hands none such to cuDNN as a weight gradient; as it is in lax.conv it has one."""
    x, kernel = jnp.zeros((2, 10, 10, 4)), jnp.zeros((3, 3, 4, 4))

    def strides():
        grad = jax.grad(lambda x, w: convolve(x, w, 1, 2).sum(), (0, 1))
        equations = jax.make_jaxpr(grad)(x, kernel).eqns
        convolutions = [e for e in equations if e.primitive.name == "conv_general_dilated"]
        assert len(convolutions) >= 2
        return {e.params["window_strides"] for e in convolutions}

    assert strides() == {(1, 1)}
    with plain_convolutions():
        assert (2, 2) in strides()


def test_winograd_in_float32_is_as_exact_as_xla(rng):
    """Against float64, at the depth of resnet's layer2."""
    x = rng.normal(size=(16, 16, 16, 128))
    kernel, dy = rng.normal(size=(3, 3, 128, 64)), rng.normal(size=(16, 14, 14, 64))

    @functools.partial(jax.jit, static_argnums=0)
    def run(form, x, kernel, dy):
        out, vjp = jax.vjp(lambda x, w: form(x, w, 0), x, kernel)
        return out, *vjp(dy)

    def results(form, dtype):
        return [np.asarray(v) for v in run(form, *(v.astype(dtype) for v in (x, kernel, dy)))]

    with jax.enable_x64(True):
        exact = results(convolve, np.float64)

    def error(form):
        found = results(form, np.float32)
        return [abs(a - b).max() / abs(b).max() for a, b in zip(found, exact, strict=True)]

    def transformed(x, kernel, padding):
        return cpu_conv.conv(x, kernel, None, padding)

    for ours, xlas in zip(error(transformed), error(convolve)):
        assert ours < max(3 * xlas, 2e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_is_torchs(rng, groups):
    x, kernel = rng.normal(size=(2, 8, 8, 6)), rng.normal(size=(3, 3, 6 // groups, 9))
    theirs = torch.nn.functional.conv2d(
        nchw(x), torch.tensor(kernel).permute(3, 2, 0, 1), padding=1, dilation=2, groups=groups
    )
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            convolve(jnp.asarray(x), jnp.asarray(kernel), 1, 2, groups), nhwc(theirs), atol=1e-12
        )


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_torchs(rng, train):
    """Output, gradient and running statistics, PyTorch's unbiased running variance included."""
    x, dy = rng.normal(2.0, 3.0, (2, 4, 5, 5, 6))
    theirs = torch.nn.BatchNorm2d(6, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (theirs.weight, theirs.bias, theirs.running_mean):
            tensor.copy_(torch.tensor(rng.normal(size=6)))
        theirs.running_var.copy_(torch.tensor(rng.uniform(0.5, 2.0, 6)))
    variables = {
        "params": {
            "scale": theirs.weight.detach().numpy().copy(),
            "bias": theirs.bias.detach().numpy().copy(),
        },
        "batch_stats": {
            "mean": theirs.running_mean.numpy().copy(),
            "var": theirs.running_var.numpy().copy(),
        },
    }
    theirs.train(train)
    theirs_in = nchw(x).requires_grad_()
    out = theirs(theirs_in)
    out.backward(nchw(dy))
    with jax.enable_x64(True):
        norm = BatchNorm(dtype=jnp.float64)
        ours, vjp, updated = jax.vjp(
            lambda x: norm.apply(variables, x, train, mutable=["batch_stats"]),
            jnp.asarray(x),
            has_aux=True,
        )
        np.testing.assert_allclose(ours, nhwc(out), atol=1e-12)
        np.testing.assert_allclose(vjp(jnp.asarray(dy))[0], nhwc(theirs_in.grad), atol=1e-12)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], theirs.running_mean, atol=1e-12)
    np.testing.assert_allclose(updated["batch_stats"]["var"], theirs.running_var, atol=1e-12)


def test_flax_running_variance_is_an_option(rng):
    x = jnp.asarray(rng.normal(size=(2, 2, 2, 1)), jnp.float32)
    norm = BatchNorm(unbiased=False)
    variables = norm.init(jax.random.key(0), x, True)
    _, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * x.var(), rtol=1e-5)


def test_no_select_and_scatter_in_a_gradient():
    """max_pool's own gradient is used: XLA's is slow and, on GPU, not deterministic."""
    model = create_model("resnet", num_classes=10, widths=(4, 8, 8, 8))
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)

    def loss(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

    text = jax.jit(jax.grad(loss)).lower(variables, x).as_text()
    assert "select_and_scatter" not in text


@pytest.mark.parametrize("name", PARAMETERS)
def test_other_image_sizes(name):
    """What a network can take it takes, on one CPU device as on many; else it says so."""
    model = create_model(name, num_classes=7)

    def shape(height, width):
        images = jnp.zeros((2, height, width, 3))
        return jax.eval_shape(
            lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0], images
        ).shape

    smallest = {
        "dilated": 11,
        "convnet": 12,
        "resnet": 12,
        "vgg": 16,
        "mixture": 16,
        "airbench": 25,
    }
    for size in (smallest[name], 28, 33, 64, 96):
        assert shape(size, size) == (2, 7)
    for size in (1, 4, smallest[name] - 1):
        with pytest.raises(ValueError, match="the images are too small: a map of"):
            shape(size, size)
    if name == "resnet":
        assert shape(16, 16) == (2, 7)
        with pytest.raises(ValueError, match="needs a square map, not 7 x 3"):
            shape(64, 32)
    else:
        assert shape(32, 64) == (2, 7)
