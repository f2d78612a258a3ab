"""The six networks as torch.nn modules, by name."""

import inspect

import torch
from torch import nn
from torch.nn import functional as F

from cifar_jax import InputError


class VGG(nn.Module):
    """System 000: (Conv -> ReLU -> BatchNorm) x 2 -> max-pool -> dropout, four times; head."""

    def __init__(
        self,
        num_classes=10,
        image_size=32,
        widths=(32, 64, 128, 256),
        dropout=(0.2, 0.3, 0.4, 0.5),
        head_widths=(1024, 512, 256),
        head_dropout=0.3,
    ):
        super().__init__()
        self.dropout, self.head_dropout = dropout, head_dropout
        channels, i = 3, 0
        for width in widths:
            for _ in range(2):
                i += 1
                self.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, padding=1))
                self.add_module(f"bn{i}", nn.BatchNorm2d(width))
                channels = width
        features = channels * (image_size // 2 ** len(widths)) ** 2
        self.head = len(head_widths) + 1
        for i, width in enumerate((*head_widths, num_classes), 1):
            self.add_module(f"fc{i}", nn.Linear(features, width))
            features = width

    def forward(self, x):
        for i, rate in enumerate(self.dropout):
            for j in (2 * i + 1, 2 * i + 2):
                x = getattr(self, f"bn{j}")(F.relu(getattr(self, f"conv{j}")(x)))
            x = F.dropout(F.max_pool2d(x, 2), rate, self.training)
        x = x.flatten(1)
        for i in range(1, self.head):
            x = F.dropout(F.relu(getattr(self, f"fc{i}")(x)), self.head_dropout, self.training)
        return F.log_softmax(getattr(self, f"fc{self.head}")(x), 1)


class ConvNet(nn.Module):
    """System 001: five Conv -> ReLU; max-pool after 2 and 4, Dropout2d after 3 and 5; head."""

    def __init__(
        self,
        num_classes=10,
        image_size=32,
        widths=(8, 32, 64, 128, 256),
        head_widths=(256, 128, 64),
        dropout=0.5,
    ):
        super().__init__()
        self.dropout, self.convs, self.head = dropout, len(widths), len(head_widths) + 1
        channels = 3
        for i, width in enumerate(widths, 1):
            conv = nn.Conv2d(channels, width, 3, padding=int(i < len(widths)))
            self.add_module(f"conv{i}", conv)
            channels = width
        features = channels * (image_size // 4 - 2) ** 2
        for i, width in enumerate((*head_widths, num_classes), 1):
            self.add_module(f"fc{i}", nn.Linear(features, width))
            features = width

    def forward(self, x):
        for i in range(1, self.convs + 1):
            x = F.relu(getattr(self, f"conv{i}")(x))
            if i in (2, 4):
                x = F.max_pool2d(x, 2)
            if i in (3, 5):
                x = F.dropout2d(x, self.dropout, self.training)
        x = x.flatten(1)
        for i in range(1, self.head):
            x = F.relu(getattr(self, f"fc{i}")(x))
        return getattr(self, f"fc{self.head}")(x)


class Unit(nn.Module):
    """Conv -> (max-pool) -> BatchNorm -> ReLU."""

    def __init__(self, channels, width, pool=False, **conv):
        super().__init__()
        settings = {"kernel_size": 3, "padding": 1, "bias": False, **conv}
        self.conv = nn.Conv2d(channels, width, **settings)
        self.bn = nn.BatchNorm2d(width)
        self.pool = pool

    def forward(self, x):
        x = self.conv(x)
        if self.pool:
            x = F.max_pool2d(x, 2)
        return F.relu(self.bn(x))


class ResNet(nn.Module):
    """System 002: prep, layer1 + residual, layer2, layer3 + residual, k4 s2 p1 max-pool, linear."""

    def __init__(self, num_classes=10, image_size=32, widths=(64, 128, 256, 512)):
        super().__init__()
        prep, first, second, third = widths
        self.prep = Unit(3, prep)
        self.layer1 = Unit(prep, first, pool=True)
        self.res1a, self.res1b = Unit(first, first), Unit(first, first)
        self.layer2 = Unit(first, second, pool=True, padding=0)
        self.layer3 = Unit(second, third, pool=True)
        self.res3a, self.res3b = Unit(third, third), Unit(third, third)
        if ((image_size // 2 - 2) // 2) // 2 != 3:
            raise InputError("the twin of resnet takes images of 32 x 32")
        self.fc = nn.Linear(third, num_classes, bias=False)

    def forward(self, x):
        x = self.layer1(self.prep(x))
        x = x + self.res1b(self.res1a(x))
        x = self.layer3(self.layer2(x))
        x = x + self.res3b(self.res3a(x))
        return self.fc(F.max_pool2d(x, 4, stride=2, padding=1).flatten(1))


class Branch(nn.Module):
    """Conv with bias -> BatchNorm -> ReLU -> (max-pool)."""

    def __init__(self, channels, width, pool):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.pool = pool

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return F.max_pool2d(x, 2) if self.pool else x


class MixtureBlock(nn.Module):
    """Parallel branches, added with the image's own weights ReLU(Linear(global average))."""

    def __init__(self, channels, width, pool, branches):
        super().__init__()
        self.gate = nn.Linear(channels, branches)
        self.branches = nn.ModuleList(Branch(channels, width, pool) for _ in range(branches))

    def forward(self, x):
        weights = F.relu(self.gate(x.mean((2, 3))))
        outputs = (branch(x) for branch in self.branches)
        return sum(w[:, None, None, None] * y for w, y in zip(weights.T, outputs, strict=True))


class SequentialBlock(nn.Module):
    """The literal reading of system 003's README: the branches one after the other."""

    def __init__(self, channels, width, pool, branches):
        super().__init__()
        sizes = [channels, *[width] * branches]
        self.branches = nn.ModuleList(
            Branch(sizes[k], width, pool and k == branches - 1) for k in range(branches)
        )

    def forward(self, x):
        for branch in self.branches:
            x = branch(x)
        return x


class Mixture(nn.Module):
    """System 003: six dynamic-mixture blocks, global average, two linear layers."""

    def __init__(
        self,
        num_classes=10,
        image_size=32,
        widths=(20, 32, 64, 128, 256, 512),
        pooled=(False, False, True, True, True, True),
        branches=3,
        head_width=128,
        dropout=0.2,
        sequential=False,
    ):
        super().__init__()
        self.dropout, self.blocks = dropout, len(widths)
        block = SequentialBlock if sequential else MixtureBlock
        for i, (channels, width, pool) in enumerate(
            zip((3, *widths[:-1]), widths, pooled, strict=True), 1
        ):
            self.add_module(f"block{i}", block(channels, width, pool, branches))
        self.fc1, self.fc2 = nn.Linear(widths[-1], head_width), nn.Linear(head_width, num_classes)

    def forward(self, x):
        for i in range(1, self.blocks + 1):
            x = getattr(self, f"block{i}")(x)
        x = F.relu(self.fc1(x.mean((2, 3))))
        return self.fc2(F.dropout(x, self.dropout, self.training))


class Dilated(nn.Module):
    """System 004: grouped and dilated convolutions, 3x3 average pool, two linear layers."""

    def __init__(self, num_classes=10, image_size=32, head_width=100):
        super().__init__()
        self.c1a, self.c1b = Unit(3, 32), Unit(32, 30, padding=0)
        self.c2a = Unit(30, 30, groups=3, bias=True)
        self.c2b = Unit(30, 32, kernel_size=1, padding=0, bias=True)
        self.c3a, self.c3b = Unit(32, 64, dilation=2), Unit(64, 64, dilation=2)
        self.c3c = Unit(64, 64, dilation=2)
        self.c4a, self.c4b, self.c4c = Unit(64, 128), Unit(128, 128), Unit(128, 128)
        self.c4d, self.c4e, self.c4f = Unit(128, 128), Unit(128, 256), Unit(256, 128)
        self.fc1 = nn.Linear(128 * ((image_size - 8) // 3) ** 2, head_width)
        self.fc2 = nn.Linear(head_width, num_classes)

    def forward(self, x):
        x = self.c2b(self.c2a(self.c1b(self.c1a(x))))
        x = self.c3c(self.c3b(self.c3a(x)))
        x = self.c4f(self.c4e(self.c4d(self.c4c(self.c4b(self.c4a(x))))))
        x = F.avg_pool2d(x, 3).flatten(1)
        return F.log_softmax(self.fc2(self.fc1(x)), 1)


class Whitening(nn.Module):
    """2 x 2 convolution whose weight, measured on the data, is no parameter; its bias is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(24, 3, 2, 2))
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias)


class ShiftNorm(nn.BatchNorm2d):
    """BatchNorm with a bias and no weight; `keep` is the share of the old running value."""

    def __init__(self, width, keep):
        super().__init__(width, eps=1e-12, momentum=1 - keep)
        self.weight = None

    def forward(self, x):
        # by a weight of one, not none: CUDA's backward pass gives a bias alone no gradient
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            torch.ones_like(self.running_var),
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


class Group(nn.Module):
    """Conv -> max-pool -> norm -> GELU, then (conv -> norm -> GELU), the third with a residual."""

    def __init__(self, channels, width, depth, momentum):
        super().__init__()
        self.depth = depth
        for k in range(1, depth + 1):
            conv = nn.Conv2d(channels, width, 3, padding="same", bias=False)
            self.add_module(f"conv{k}", conv)
            self.add_module(f"norm{k}", ShiftNorm(width, momentum))
            channels = width

    def forward(self, x):
        first = x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        for k in range(2, self.depth):
            x = F.gelu(getattr(self, f"norm{k}")(getattr(self, f"conv{k}")(x)))
        x = getattr(self, f"norm{self.depth}")(getattr(self, f"conv{self.depth}")(x))
        return F.gelu(x + first if self.depth > 2 else x)


class AirBench(nn.Module):
    """The speedrun's net (airbench94; with depth 3 airbench96): whitening, three groups, head."""

    def __init__(
        self,
        num_classes=10,
        image_size=32,
        widths=(64, 256, 256),
        depth=2,
        momentum=0.6,
        logit_scale=1 / 9,
    ):
        super().__init__()
        self.groups, self.logit_scale = len(widths), logit_scale
        self.whiten = Whitening()
        channels, size = 24, image_size - 1
        for i, width in enumerate(widths, 1):
            self.add_module(f"group{i}", Group(channels, width, depth, momentum))
            channels, size = width, size // 2
        self.head = nn.Linear(channels * (size // 3) ** 2, num_classes, bias=False)

    def forward(self, x):
        x = F.gelu(self.whiten(x))
        for i in range(1, self.groups + 1):
            x = getattr(self, f"group{i}")(x)
        return self.head(F.max_pool2d(x, 3).flatten(1)) * self.logit_scale


TWINS = {
    "vgg": VGG,
    "convnet": ConvNet,
    "resnet": ResNet,
    "mixture": Mixture,
    "dilated": Dilated,
    "airbench": AirBench,
}


def create_twin(name, *, num_classes=10, image_size=32, dtype="float32", **kwargs):
    """The torch.nn module of family `name`; takes the fields of models.create_model.

    Maps images [B, 3, H, W] to logits or log-probabilities [B, num_classes]. `dtype` is not used
    but for float64: PyTorch computes bfloat16 under autocast. `unbiased_variance`, which
    PyTorch's BatchNorm always has, neither. Raises InputError for a field that PyTorch's layers do
    not have.
    """
    if name not in TWINS:
        raise InputError(f"model {name!r} has no PyTorch twin")
    kwargs.pop("unbiased_variance", None)  # only training asks
    known = inspect.signature(TWINS[name]).parameters
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise InputError(f"the PyTorch twin of {name!r} has no field {unknown[0]!r}")
    twin = TWINS[name](num_classes=num_classes, image_size=image_size, **kwargs)
    return twin.double() if dtype == "float64" else twin
