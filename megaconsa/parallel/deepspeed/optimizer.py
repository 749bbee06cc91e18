"""AdamW that checks a step before it applies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megaconsa.config import TrainingSection
from megaconsa.parallel.step_result import NOT_FINITE, Fault

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's states of a parameter, by torch's names."""
EPSILON = 1e-8
"""Adam's term against division by zero."""


class CheckedAdamW(torch.optim.AdamW):
    """Leaves the weights as they are if the check finds a fault.

    DeepSpeed does not call `step` at all where the gradient norm is not finite. In fp32 it calls
    `step` once per parameter group. The check runs once per training step.
    """

    def begin(self, check: Callable[[], Fault | None]) -> None:
        """Starts a training step."""
        self._check = check
        self._checked = False
        # This holds unless DeepSpeed calls `step`.
        self.fault: Fault | None = NOT_FINITE

    def step(self, closure: Any = None) -> Any:
        if not self._checked:
            self._checked = True
            self.fault = self._check()
        if self.fault is not None:
            return None
        return super().step(closure)


def build_optimizer(module: nn.Module, training: TrainingSection, fused: bool) -> CheckedAdamW:
    """AdamW with weight decay on matrices only, not on norms."""
    return CheckedAdamW(
        parameter_groups(module, training),
        lr=training.learning_rate,
        betas=training.betas,
        eps=EPSILON,
        fused=fused,
    )


def parameter_groups(module: nn.Module, training: TrainingSection) -> list[dict[str, Any]]:
    """The matrices, which decay, and the norms, which do not."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in module.parameters() if parameter.dim() == 1]
    return [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]


def create_moments(zero_optimizer: Any) -> None:
    """Creates Adam's state now instead of in the first step, so that a checkpoint can be loaded.

    zero_optimizer: DeepSpeed's optimizer around a CheckedAdamW.
    """
    adamw = zero_optimizer.optimizer
    for group in adamw.param_groups:
        for flat in group["params"]:
            # Fused AdamW counts its steps on the device.
            counter = torch.zeros((), device=flat.device if group["fused"] else "cpu")
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            adamw.state[flat] = {"step": counter, **moments}
    zero_optimizer._lazy_init_hp_params_optimizer_state()
