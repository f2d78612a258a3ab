"""A recipe's training step with torch.optim."""

import contextlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cifar_jax import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


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
            cycle = {} if low is None else {"base_momentum": low, "max_momentum": high}
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                [group["lr"] for group in self.optimizer.param_groups],
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
        if not self.twin.training:  # else it costs a walk over all modules
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
