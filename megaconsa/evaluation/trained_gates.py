"""Methods that train a scalar gate for each unit, without a target. Its value ranks the units."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaconsa.console import progress
from megaconsa.evaluation.native_model import NativeModel, Sample

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
GRADIENT_CLIPPING = 1.0
"""The three values above are the defaults of a run's configuration."""
WARMUP_SHARE = 0.1
"""Share of the steps in which the weights' learning rate rises. AdamW has no moments at first."""


@dataclass(frozen=True)
class GateTraining:
    initial: float
    """First value of every gate, in (0, 1)."""
    learning_rate: float
    """Adam's learning rate for the gates' logits."""
    weight_learning_rate: float | None
    """AdamW's learning rate for the model's weights. None leaves them frozen."""


def train_gates(model: NativeModel, sample: Sample, training: GateTraining) -> Tensor:
    """Trains the gates with one step on each batch of `sample`.

    A gate is the sigmoid of a logit that Adam trains. Clamped gates would meet at 1, where nothing
    ranks them. If `training` has a learning rate for weights, the weights of `model` change.

    Returns the values of the gates, (layers, units) fp64 on the CPU.
    """
    initial = torch.full((model.layers, model.units), training.initial, device=model.device)
    logits = initial.logit().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=training.learning_rate)
    weights = None
    if training.weight_learning_rate is not None:
        weights = _WeightTraining(model, training.weight_learning_rate, sample.batches)
    with progress("training gates", sample.batches, "steps") as task:
        for step, batch in enumerate(sample):
            model.use(logits.sigmoid())
            loss = model.mean_loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if weights is not None:
                weights.step(step)
            task.advance(note=f"loss {loss.item():.4f}")
    return logits.detach().double().sigmoid().cpu()


class _WeightTraining:
    """AdamW on fp32 copies of the weights. In bf16, most updates would round to nothing."""

    def __init__(self, model: NativeModel, learning_rate: float, steps: int) -> None:
        self.learning_rate = learning_rate
        self.warmup_steps = max(1, round(WARMUP_SHARE * steps))
        self.weights = list(model.model.requires_grad_(True).parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        matrices = [master for master in self.masters if master.dim() > 1]
        norms = [master for master in self.masters if master.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": norms, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS)

    def step(self, step: int) -> None:
        """Applies the gradients of the weights. step: counts from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (step + 1) / self.warmup_steps)
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, GRADIENT_CLIPPING)
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
