"""The bank of gates: hands a step's gates to the layers, collects their gradients, and moves them towards the target sparsity.

The bank lives beside the training engine, replicated on every rank: inside it bf16 would round the gates. A step is

    bank.sample(step)                        # one z per (sequence of the global batch, layer, unit)
    ... forward and backward of the model, whose layers ask `bank.select(layer, sequences)` ...
    metrics = bank.update(reduce)            # the gradients of z become evidence, and the gates take a step

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

from megaconsa.consa import hard_concrete
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.consa.evidence import Evidence, EvidenceSummary
from megaconsa.consa.evidence_gates import CLOSING_SHARE, EvidenceGates
from megaconsa.consa.sampled_gates import DECAY_SHARE, SampledGates
from megaconsa.errors import InputError

DECIDED = 0.9
"""A unit counts as decided when P(z = 0) or P(z = 1) exceeds this."""
MEMORY_SHARE = 1.0
"""The evidence's memory as a share of the run. Shorter memories follow moving weights, longer ones average more noise away:
at 1.0 the first step still counts a third of the last, and the standard errors are 4 % above those of a plain mean."""

ControllerName = Literal["evidence", "paper"]


@dataclass(frozen=True)
class GateSettings:
    constraint: Constraint
    window: int
    controller: ControllerName = "evidence"
    warmup_steps: int = 100
    learning_rate: float = 0.1
    initial: float = 2.5
    seed: int = 0
    global_batch: int = 1
    steps: int = 1000
    """Optimizer steps of the whole run."""

    def __post_init__(self) -> None:
        longest = (
            math.floor((1 - CLOSING_SHARE) * self.steps)
            if self.controller == "evidence"
            else self.steps - 1
        )
        if self.warmup_steps > longest:
            reason = (
                "the last quarter decides on units"
                if self.controller == "evidence"
                else "the target would not be reached"
            )
            raise InputError(
                f"gates.warmup_steps={self.warmup_steps} must be at most {longest} of training.steps={self.steps}: {reason}"
            )
        if self.controller != "evidence":
            self._check_reach()

    def _check_reach(self) -> None:
        """Refuses a learning rate at which log_alpha cannot come from `initial` to where P(z > 0) = 1 - sparsity."""
        sparsity = self.constraint.sparsity
        if sparsity in (0, 1):
            return
        goal = math.log((1 - sparsity) / sparsity) + hard_concrete.BETA * math.log(
            -hard_concrete.GAMMA / hard_concrete.ZETA
        )
        # Adam moves log_alpha by its learning rate at most, which falls to 0 over the last part of the run.
        needed = abs(self.initial - goal) / self.learning_rate
        if needed > (1 - DECAY_SHARE / 2) * self.steps:
            raise InputError(
                f"gates.learning_rate={self.learning_rate:g} cannot bring the gates from gates.initial={self.initial:g} to "
                f"allocation.sparsity={sparsity:g} in training.steps={self.steps}: it takes {needed:.0f} steps; raise either"
            )

    def target(self, step: int) -> float:
        """Target sparsity of an optimizer step (from 0): rises linearly from 0 over warmup_steps."""
        sparsity = self.constraint.sparsity
        if self.warmup_steps == 0:
            return sparsity
        return sparsity * min(1.0, (step + 1) / self.warmup_steps)


class GateBank:
    """Gates of all layers. Attributes: `gates`, the way they learn; `evidence` of each unit; `step` last sampled."""

    def __init__(self, settings: GateSettings, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        self.constraint = settings.constraint
        self.device = torch.device(device)
        self.evidence = Evidence(self.constraint, settings.steps, MEMORY_SHARE)
        self.gates = self._build_gates()
        self.step = 0
        self._leaves: list[Tensor] = []
        self._gradient: Tensor | None = None
        self._table: Allocation | None = None

    def sample(self, step: int) -> None:
        """Sets z for the whole global batch of an optimizer step: (global_batch, layers, units).

        Each layer's slice becomes a leaf, so that micro-batches in any order, pipelines and recomputation accumulate into its
        gradient.
        """
        self.step = step
        z = self.gates.draw(step, self.settings.target(step), self.settings.global_batch).to(
            self.device
        )
        self._leaves = [layer.contiguous().requires_grad_() for layer in z.unbind(dim=1)]

    def select(self, layer: int, sequences: Tensor) -> tuple[int | tuple[int, ...], Tensor | None]:
        """Windows and gates of `layer` for a micro-batch.

        sequences: (B,) int64 indices within the step's global batch. Returns (window, z) with z fp32 (B, kv_heads); inside
        `binarized()` (windows per KV head, None).
        """
        if self._table is not None:
            return self._table.select(layer, sequences)
        gate = self._leaves[layer][sequences]
        return self.settings.window, gate.expand(-1, self.constraint.num_kv_heads)

    @contextmanager
    def binarized(self) -> Iterator[Allocation]:
        """Within it, layers attend by the exact top-k table of the present scores."""
        self._table = self.allocation()
        try:
            yield self._table
        finally:
            self._table = None

    def update(self, reduce: Callable[[Tensor], None] = lambda gradient: None) -> dict[str, Any]:
        """Adds the step's gradients to the evidence and moves the gates; returns the step's metrics.

        reduce: as in `gradient`.
        """
        if not self._leaves:
            raise RuntimeError("GateBank.update was called before GateBank.sample")
        gradient = self._gradient if self._gradient is not None else self.gradient(reduce)
        z = torch.stack([leaf.detach() for leaf in self._leaves], dim=1).cpu()
        self._add_evidence(gradient, z)
        target = self.settings.target(self.step)
        own = self.gates.update(gradient, self.step, target)
        metrics = self._metrics(target, z) | own
        self.discard()
        return metrics

    def gradient(self, reduce: Callable[[Tensor], None] = lambda gradient: None) -> Tensor:
        """The loss's gradient in every sequence's z, (global_batch, layers, units); `update` takes the same one.

        reduce: called with this rank's part, zeros elsewhere; sums it over the ranks in place.
        """
        if not self._leaves:
            raise RuntimeError("GateBank.gradient was called before GateBank.sample")
        gradients = [
            leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in self._leaves
        ]
        self._gradient = torch.stack(gradients, dim=1)
        reduce(self._gradient)
        return self._gradient

    def discard(self) -> None:
        """Drops the step's gates and gradients."""
        self._leaves = []
        self._gradient = None

    def full(self) -> Tensor:
        """The exact top-k table of the present scores, (layers, kv_heads) booleans on the CPU."""
        return self.constraint.heads(self.constraint.top_k(self.gates.scores))

    def allocation(self) -> Allocation:
        return Allocation.from_scores(self.gates.scores, self.constraint, self.settings.window)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs; the values are the bank's own, not copies."""
        return self.gates.state() | self.evidence.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        own = self.state()
        if self.settings.controller != "evidence":
            # Gates of 0.1.0 were saved without evidence: it begins anew, and log_alpha does not depend on it.
            own = {
                name: value
                for name, value in own.items()
                if name in tensors or name not in self.evidence.state()
            }
        if own.keys() != tensors.keys():
            raise ValueError(f"the gates' state differs in {sorted(own.keys() ^ tensors.keys())}")
        for name, value in own.items():
            value.copy_(tensors[name])

    def summary(self) -> EvidenceSummary:
        """Whether the evidence supports the present table."""
        return self.evidence.summary(self.constraint.top_k(self.gates.scores))

    def describe(self) -> dict[str, Any]:
        """The gates for people and plots, as gates.json holds them: per unit (layers x units), and over the run."""
        errors = self.evidence.standard_errors
        summary = self.summary()
        return {
            "controller": self.settings.controller,
            "scores": self.gates.scores.tolist(),
            "probability_full": self.gates.open_probability.tolist(),
            "mean_gradient": self.evidence.scores.tolist(),
            "standard_error": [[_number(value) for value in row] for row in errors.tolist()],
            "z_score": [
                [_number(value) for value in row] for row in self.evidence.z_scores.tolist()
            ],
            "split_agreement": summary.split_agreement,
            "time_agreement": summary.time_agreement,
            "separated_share": summary.separated_share,
        }

    def _build_gates(self) -> EvidenceGates | SampledGates:
        settings = self.settings
        if settings.controller == "evidence":
            return EvidenceGates(self.constraint, self.evidence, settings.steps)
        return SampledGates(
            self.constraint,
            initial=settings.initial,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            steps=settings.steps,
            device=self.device,
        )

    def _add_evidence(self, gradient: Tensor, z: Tensor) -> None:
        # The loss is a mean over the batch: a sequence's own loss has so many times its gradient.
        falls = -gradient.detach().cpu().double() * self.settings.global_batch
        probed = (z > 0) & (z < 1)
        self.evidence.add(falls, probed, self.step, split=not self.gates.is_deciding(self.step))

    def _metrics(self, target: float, z: Tensor) -> dict[str, Any]:
        open_probability = self.gates.open_probability.cpu()
        margin = self.constraint.margin(self.gates.scores)
        summary = self.summary()
        decided = self.gates.decided_probability > DECIDED
        return {
            "target_sparsity": target,
            "expected_sparsity": 1 - float(open_probability.mean()),
            "layer_expected_sparsity": (1 - open_probability).mean(dim=1).tolist(),
            "sampled_sparsity": float((z == 0).float().mean()),
            "binarized_sparsity": 1 - float(self.full().float().mean()),
            "decided_share": float(decided.float().mean()),
            "split_agreement": summary.split_agreement,
            "time_agreement": summary.time_agreement,
            "separated_share": summary.separated_share,
            "cut_margin": _number(margin),
        }


def _number(value: float) -> float | None:
    """As JSON can hold it: it has no infinity."""
    return value if abs(value) != float("inf") else None
