"""The bank of gates: log_alpha of every unit, its optimizer, and the step that moves it towards the target sparsity.

The bank lives beside the training engine, as fp32 tensors replicated on every rank: inside it bf16 would round them. A step is

    bank.sample(step)                        # one z per (sequence of the global batch, layer, unit)
    ... forward and backward of the model, whose layers ask `bank.select(layer, sequences)` ...
    metrics = bank.update(reduce)            # gradients of z -> log_alpha, the penalty, Adam, the multipliers

Where it must be known before whether the gradient is finite, `bank.gradient(reduce)` comes first; a step that is not to be applied ends
with `bank.discard()` instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megaconsa.consa import hard_concrete, philox
from megaconsa.consa.allocation import (
    Allocation,
    Granularity,
    Scope,
    as_rows,
    check_sparsity,
    cut_margin,
    threshold,
    top_k,
)
from megaconsa.consa.controller import DampedController, PaperController

GRADIENT_CLIPPING = 1.0
"""Largest norm of the loss's gradient in log_alpha; clipped apart from the model's."""
DECAY_SHARE = 0.2
"""Last part of the run over which the gates' learning rate falls to 0, so that the noise of the samples settles on the target."""
DECIDED = 0.9
"""A unit counts as decided when P(z = 0) or P(z = 1) exceeds this."""


@dataclass(frozen=True)
class GateSettings:
    num_layers: int
    num_kv_heads: int
    window: int
    sparsity: float
    granularity: Granularity = "kv_head"
    scope: Scope = "per_layer"
    learning_rate: float = 0.1
    initial: float = 2.5
    warmup_steps: int = 100
    controller: Literal["damped", "paper"] = "damped"
    seed: int = 0
    global_batch: int = 1
    steps: int = 1000
    """Optimizer steps of the whole run."""

    @property
    def units(self) -> int:
        """Gated units of a layer."""
        return self.num_kv_heads if self.granularity == "kv_head" else 1

    @property
    def per_layer(self) -> bool:
        return self.scope == "per_layer"

    def target(self, step: int) -> float:
        """Target sparsity of an optimizer step (from 0): rises linearly from 0 over warmup_steps."""
        return self.sparsity * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.sparsity

    @property
    def shortest_warmup(self) -> float:
        """Steps that log_alpha needs at its learning rate to come from `initial` to where P(z > 0) = 1 - sparsity."""
        if self.sparsity == 1:
            return math.inf
        goal = math.log((1 - self.sparsity) / max(self.sparsity, 1e-9)) + hard_concrete.BETA * math.log(
            -hard_concrete.GAMMA / hard_concrete.ZETA
        )
        return max(0.0, self.initial - goal) / self.learning_rate

    def rate(self, step: int) -> float:
        """Learning rate of log_alpha at an optimizer step (from 0)."""
        return self.learning_rate * min(1.0, (self.steps - step) / (DECAY_SHARE * self.steps))


class GateBank:
    """Gates of all layers. Attributes: `log_alpha` fp32 (layers, units); `controller` with the multipliers; `step` last sampled."""

    def __init__(self, settings: GateSettings, device: torch.device | str = "cpu") -> None:
        check_sparsity(settings.sparsity, settings.num_layers, settings.num_kv_heads, settings.granularity, settings.scope)
        self.settings = settings
        self.device = torch.device(device)
        shape = (settings.num_layers, settings.units)
        self.log_alpha = torch.full(shape, settings.initial, dtype=torch.float32, device=self.device, requires_grad=True)
        constraints = settings.num_layers if settings.per_layer else 1
        controller = PaperController if settings.controller == "paper" else DampedController
        self.controller = controller(self.log_alpha, constraints)
        self.step = 0
        self._sampled: Tensor | None = None
        self._leaves: list[Tensor] = []
        self._gradient: Tensor | None = None
        self._table: Allocation | None = None

    def sample(self, step: int) -> None:
        """Draws z for the whole global batch of an optimizer step: (global_batch, layers, units).

        Each layer's slice becomes a leaf, so that micro-batches in any order, pipelines and recomputation accumulate into its
        gradient, and log_alpha is reached once a step.
        """
        settings = self.settings
        self.step = step
        sequences = torch.arange(settings.global_batch, device=self.device)
        uniform = philox.uniform(settings.seed, step, sequences, settings.num_layers, settings.units)
        self._sampled = hard_concrete.sample(self.log_alpha, uniform)
        self._leaves = [self._sampled.detach()[:, layer].requires_grad_() for layer in range(settings.num_layers)]

    def select(self, layer: int, sequences: Tensor) -> tuple[int | tuple[int, ...], Tensor | None]:
        """Windows and gates of `layer` for a micro-batch.

        sequences: (B,) int64 indices within the step's global batch. Returns (window, z) with z fp32 (B, kv_heads); inside
        `binarized()` (windows per KV head, None).
        """
        if self._table is not None:
            return self._table.select(layer, sequences)
        gate = self._leaves[layer][sequences]
        return self.settings.window, gate.expand(-1, self.settings.num_kv_heads)

    @contextmanager
    def binarized(self) -> Iterator[Allocation]:
        """Within it, layers attend by the exact top-k table of the present log_alpha."""
        self._table = self.allocation()
        try:
            yield self._table
        finally:
            self._table = None

    def update(self, reduce: Callable[[Tensor], None] = lambda gradient: None) -> dict[str, Any]:
        """One optimizer step on log_alpha, one ascent step on the multipliers; returns the step's metrics.

        reduce: called with log_alpha's gradient of the loss (this rank's share); sums it over the ranks in place.
        """
        if self._sampled is None:
            raise RuntimeError("GateBank.update was called before GateBank.sample")
        target = self.settings.target(self.step)
        gradient = self._gradient if self._gradient is not None else self.gradient(reduce)
        norm = torch.linalg.vector_norm(gradient)
        gradient *= (GRADIENT_CLIPPING / norm).clamp(max=1)
        penalty = self.controller.penalty(self._expected() - target)
        (penalty_gradient,) = torch.autograd.grad(penalty, self.log_alpha)
        self.controller.descend(gradient, penalty_gradient, self.settings.rate(self.step))
        with torch.no_grad():
            expected = self._expected()
            # The error after the step: alternating, not simultaneous, which damps the pair's oscillation.
            self.controller.ascend(expected - target)
        metrics = self._metrics(target, expected, self._sampled.detach(), penalty.item(), norm.item())
        self.discard()
        return metrics

    def gradient(self, reduce: Callable[[Tensor], None] = lambda gradient: None) -> Tensor:
        """log_alpha's gradient of the loss, (layers, units), before clipping; `update` takes the same one. reduce: as there."""
        assert self._sampled is not None
        gradients = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in self._leaves]
        (self._gradient,) = torch.autograd.grad(self._sampled, self.log_alpha, torch.stack(gradients, dim=1))
        reduce(self._gradient)
        return self._gradient

    def discard(self) -> None:
        """Drops the step's samples and gradients."""
        self._sampled, self._leaves, self._gradient = None, [], None

    def full(self) -> Tensor:
        """The exact top-k table of the present log_alpha, (layers, kv_heads) booleans on the CPU."""
        s = self.settings
        return top_k(self._values(), s.sparsity, s.num_kv_heads, s.granularity, s.scope)

    def allocation(self) -> Allocation:
        s = self.settings
        return Allocation(s.window, as_rows(self.full()), s.granularity, s.scope, s.sparsity)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs; the values are the bank's own, not copies."""
        return {"log_alpha": self.log_alpha.detach()} | self.controller.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        own = self.state()
        if own.keys() != tensors.keys():
            raise ValueError(f"the gates' state differs in {sorted(own.keys() ^ tensors.keys())}")
        for name, value in own.items():
            value.copy_(tensors[name])

    def _values(self) -> Tensor:
        """log_alpha in the shape of its granularity: (layers, kv_heads) or (layers,)."""
        return self.log_alpha if self.settings.granularity == "kv_head" else self.log_alpha[:, 0]

    def _expected(self) -> Tensor:
        """Expected sparsity of each constraint: 1 - mean P(z > 0) over its units."""
        closed = 1 - hard_concrete.probability_nonzero(self.log_alpha)
        return closed.mean(dim=1) if self.settings.per_layer else closed.mean().reshape(1)

    @torch.no_grad()
    def _metrics(self, target: float, expected: Tensor, sampled: Tensor, penalty: float, norm: float) -> dict[str, Any]:
        s = self.settings
        values = self._values()
        log_alpha = self.log_alpha.detach().cpu()
        open_ = hard_concrete.probability_nonzero(log_alpha)
        decided = (1 - open_ > DECIDED) | (hard_concrete.probability_one(log_alpha) > DECIDED)
        margin = cut_margin(values, s.sparsity, s.num_kv_heads, s.granularity, s.scope)
        return {
            "target_sparsity": target,
            "expected_sparsity": float(expected.mean()),
            "layer_expected_sparsity": (1 - open_).mean(dim=1).tolist(),
            "sampled_sparsity": float((sampled == 0).float().mean()),
            "binarized_sparsity": 1 - float(self.full().float().mean()),
            "threshold_sparsity": 1 - float(threshold(values, s.num_kv_heads).float().mean()),
            "multipliers": {"lambda": self.controller.lambda_.tolist(), "phi": self.controller.phi.tolist()},
            "decided_share": float(decided.float().mean()),
            "cut_margin": margin if margin != float("inf") else None,
            "penalty": penalty,
            "gate_grad_norm": norm,
        }
