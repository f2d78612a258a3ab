"""The systems in PyTorch: plain torch.nn modules beside the Flax ones, recipes with torch.optim.

The only file that imports torch. The modules follow the same description layer by layer, keep
PyTorch's order [B, C, H, W] and are not derived from the Flax ones, so that each side checks the
other; weights.py knows which tensor is which.
"""

import contextlib
import inspect
import warnings
import zipfile

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cifar_jax import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


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
    """BatchNorm with a bias and no weight; keeps the biased running variance.

    `keep` is the share of the old running value.
    """

    def __init__(self, width, keep):
        super().__init__(width, eps=1e-12, momentum=1 - keep)
        self.weight = None

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            self.num_batches_tracked += 1
        return F.batch_norm(x, None, None, None, self.bias, True, 0.0, self.eps)


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
    but for float64: PyTorch computes bfloat16 under autocast. Raises InputError for a field that
    PyTorch's layers do not have.
    """
    if name not in TWINS:
        raise InputError(f"model {name!r} has no PyTorch twin")
    if not kwargs.pop("unbiased_variance", True):
        raise InputError(
            "PyTorch's BatchNorm keeps the unbiased running variance; "
            "set config.model.unbiased_variance to True"
        )
    known = inspect.signature(TWINS[name]).parameters
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise InputError(f"the PyTorch twin of {name!r} has no field {unknown[0]!r}")
    twin = TWINS[name](num_classes=num_classes, image_size=image_size, **kwargs)
    return twin.double() if dtype == "float64" else twin


def _tensors(state_dict):
    """{name: numpy array} as tensors, copies."""
    return {key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}


def load_weights(twin, state_dict):
    """Copy {name: numpy array} into `twin`; every tensor must be there."""
    twin.load_state_dict(_tensors(state_dict), strict=True)


def weights_of(twin):
    """{name: numpy array}, copies, of the twin's state_dict."""
    return {key: value.cpu().numpy().copy() for key, value in twin.state_dict().items()}


def save_file(path, state_dict):
    """Write {name: numpy array} as a .pt file that torch.load(weights_only=True) reads."""
    torch.save(_tensors(state_dict), path)


def load_file(path):
    """{name: numpy array} of a .pt file, a state_dict or {'state_dict': ...}; runs no code in it.

    Raises InputError if the file holds anything but tensors by name.
    """
    size = path.stat().st_size
    try:
        _check_uncompressed(path, size)
        with warnings.catch_warnings(action="ignore"):  # of kinds of tensors refused below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many kinds
        raise InputError(
            f"{path} is not a PyTorch file of tensors alone: {type(error).__name__}"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()
    ):
        raise InputError(f"{path} is not a state_dict: it does not map names to tensors")
    # views of one element may have any shape
    if sum(v.numel() for v in found.values()) > size:
        raise InputError(f"{path} is not a state_dict: its tensors are larger than the file")
    try:
        return {
            key.removeprefix("module."): (v.float() if v.is_floating_point() else v)
            .detach()
            .numpy()
            for key, v in found.items()
        }
    except Exception as error:  # sparse, quantized, without storage, ...
        raise InputError(f"{path} is not a state_dict of dense tensors") from error


def _check_uncompressed(path, size):
    """Raise ValueError for a zip whose members are larger than the file: PyTorch packs nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            if sum(member.file_size for member in members.infolist()) > size:
                raise ValueError("compressed")


def images_of(images, device="cpu", dtype=torch.float32):
    """Numpy [B, H, W, C] as a channels_last tensor [B, C, H, W]."""
    tensor = torch.from_numpy(np.array(images)).to(device, dtype)
    return tensor.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def labels_of(labels, device="cpu"):
    """Numpy int labels [B] as a tensor."""
    return torch.from_numpy(np.asarray(labels).astype(np.int64)).to(device)


class Recipe:
    """A config's loss, clipping, optimizer and schedule in torch: `step` is one optimizer step.

    `optim`, `schedule` and `loss` are those sections of the config as keyword dicts; a schedule
    spans `total_steps`. `lookahead`: every, decay, power of optim.make_lookahead. `autocast` names
    the dtype of the forward pass ('bfloat16'), `compiled` runs it through torch.compile, `fused`
    takes the optimizer's fused kernel. Raises InputError for an optimizer or a schedule that
    torch.optim does not have.
    """

    def __init__(
        self,
        twin,
        *,
        optim,
        schedule,
        loss,
        total_steps,
        steps_per_epoch,
        lookahead=None,
        autocast=None,
        compiled=False,
        fused=False,
    ):
        if optim["name"] not in ("sgd", "adam", "adamw"):
            raise InputError(f"optimizer {optim['name']!r} has no counterpart here in PyTorch")
        self.twin, self.optim, self.schedule, self.loss = twin, dict(optim), dict(schedule), loss
        self.total_steps, self.steps_per_epoch, self.fused = total_steps, steps_per_epoch, fused
        self.autocast = DTYPES[autocast] if autocast else None
        self.forward = torch.compile(twin) if compiled else twin
        self.count, self.restarts, self.freeze = 0, {}, {}
        self.lookahead = lookahead if lookahead and lookahead["every"] else None
        self.slow = [tensor.clone() for tensor in self.fast()] if self.lookahead else []
        if self.schedule["name"] == "phases":
            starts = np.cumsum([0, *self.schedule["epochs"][:-1]]) * steps_per_epoch
            self.restarts = {int(start): i for i, start in enumerate(starts)}
        else:
            self.begin(self.schedule["peak_lr"], self.optim["weight_decay"])

    def begin(self, lr, weight_decay):
        """A fresh optimizer and its scheduler."""
        o, schedule = self.optim, self.schedule
        shared = {"lr": lr, "weight_decay": weight_decay, "fused": self.fused}
        parameters = self.twin.parameters()
        factor = o.get("norm_bias_factor", 1.0)
        if factor != 1.0:
            norms = [m for m in self.twin.modules() if isinstance(m, nn.BatchNorm2d)]
            biases = {id(norm.bias): norm.bias for norm in norms}
            parameters = [
                {"params": [p for p in parameters if id(p) not in biases]},
                {
                    "params": [*biases.values()],
                    "lr": factor * lr,
                    "weight_decay": weight_decay / factor,
                },
            ]
        if o["name"] == "sgd":
            self.optimizer = torch.optim.SGD(
                parameters, momentum=o["momentum"], nesterov=o["nesterov"], **shared
            )
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o["name"]]
            self.optimizer = kind(parameters, betas=(o["b1"], o["b2"]), eps=o["eps"], **shared)
        self.scheduler = None
        if schedule["name"] == "one_cycle":
            low, high = schedule.get("momentum") or (None, None)
            cycle = {"base_momentum": low, "max_momentum": high} if low else {}
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                schedule["peak_lr"],
                total_steps=self.total_steps,
                pct_start=schedule.get("pct_start", 0.3),
                anneal_strategy={"cosine": "cos"}.get(a := schedule.get("anneal", "cosine"), a),
                cycle_momentum=low is not None,
                div_factor=schedule.get("div_factor", 25.0),
                final_div_factor=schedule.get("final_div_factor", 1e4),
                **cycle,
            )
        elif schedule["name"] == "triangle":
            turn = int(schedule["pct_start"] * self.total_steps)
            points = [0, turn, self.total_steps]
            factors = [schedule["start_factor"], 1.0, schedule["end_factor"]]
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: np.interp(step, points, factors)
            )
            self.freeze = {
                name: round(epochs * self.steps_per_epoch)
                for name, epochs in schedule.get("freeze", {}).items()
            }
        elif schedule["name"] not in ("constant", "phases"):
            raise InputError(f"schedule {schedule['name']!r} has no counterpart in torch.optim")

    def fast(self):
        """The tensors that lookahead acts on: parameters and statistics."""
        return [x for x in self.twin.state_dict().values() if x.is_floating_point()]

    def look_ahead(self):
        """Pull the slow tensors after the twin's and set the twin's to them."""
        every, decay, power = (self.lookahead[key] for key in ("every", "decay", "power"))
        if self.count % every and self.count != self.total_steps:
            return
        share = decay**every * (self.count / self.total_steps) ** power
        for slow, fast in zip(self.slow, self.fast(), strict=True):
            if self.count % every == 0:
                slow.lerp_(fast, 1 - share)
            fast.copy_(slow)

    def gradients(self, images, labels):
        """Forward and backward on one batch; leaves the gradients, returns the mean loss."""
        self.twin.train()
        self.optimizer.zero_grad(set_to_none=True)
        device = images.device.type
        with torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext():
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels, **self.loss)
        loss.backward()
        return loss.detach() / (len(labels) if self.loss["reduction"] == "sum" else 1)

    def step(self, images, labels):
        """One optimizer step; returns the mean loss over the batch (tensor, nats an image)."""
        if self.count in self.restarts:
            i = self.restarts[self.count]
            self.begin(self.schedule["peak_lr"][i], self.schedule["weight_decay"][i])
        for name, first in self.freeze.items():
            getattr(self.twin, name).requires_grad_(self.count < first)
        loss = self.gradients(images, labels)
        if self.optim["clip_value"]:
            nn.utils.clip_grad_value_(self.twin.parameters(), self.optim["clip_value"])
        if self.optim["clip_norm"]:
            nn.utils.clip_grad_norm_(self.twin.parameters(), self.optim["clip_norm"])
        self.optimizer.step()
        self.count += 1
        if self.scheduler is not None and self.count < self.total_steps:
            self.scheduler.step()
        if self.lookahead:
            self.look_ahead()
        return loss


def predict(twin, images):
    """Logits [B, num_classes] of images [B, H, W, C], numpy on both ends, in evaluation mode."""
    twin.eval()
    first = next(twin.parameters())
    with torch.inference_mode():
        return twin(images_of(images, first.device, first.dtype)).cpu().numpy()


def set_float32(fast):
    """On a GPU: float32 products as TF32, JAX's default there, or in full if not `fast`; cuDNN
    times its algorithms, as XLA does. On a CPU nothing changes."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast
        torch.backends.cudnn.benchmark = True


def move(twin, device):
    """Put the twin on 'cpu' or 'cuda' in channels_last, PyTorch's fast layout on both."""
    twin.to(device, memory_format=torch.channels_last)


def seed(value):
    """Seed dropout."""
    torch.manual_seed(value)


def synchronize(device):
    """Wait until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory():
    """Bytes PyTorch had allocated on the GPU at its peak."""
    return torch.cuda.max_memory_allocated()
