"""The bank of gates, which moves the gates of all layers towards the target sparsity.

The bank hands a step's gates to the layers and collects their gradients. It lives beside the
training engine, replicated on every rank. Inside the engine, bf16 would round the gates. A step is

    bank.sample(step)                # one z per (sequence of the global batch, layer, unit)
    ...                              # forward and backward, layers call bank.select(...)
    metrics = bank.update(reduce)    # gradients of z become evidence, and the gates take a step

Call `bank.gradient(reduce)` before `update` where the caller must know first whether the gradient
is finite. Call `bank.discard()` instead of `update` for a step that must not be applied.

`gradient` copies the gradients from the device, and so waits for it. `update` waits for it again
only with the controller `paper`, whose gates are on the device themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.evidence import Evidence, EvidenceSummary
from megaconsa.consa.evidence_gates import EvidenceGates
from megaconsa.consa.gate_settings import GateSettings
from megaconsa.consa.sampled_gates import SampledGates
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.upload import upload

DECIDED = 0.9
"""A unit counts as decided when P(z = 0) or P(z = 1) exceeds this."""
MEMORY_SHARE = 1.0
"""The evidence's memory as a share of the run.

Shorter memories follow the moving weights. Longer memories average more noise away. At 1.0 the
first step still counts a third of the last, and the standard errors are 4 % above those of a plain
mean.
"""


class GateBank:
    """Gates of all layers.

    Attributes:
        gates: the gates themselves, which say how they learn.
        evidence: the evidence about each unit.
        step: the step that was sampled last.
    """

    def __init__(self, settings: GateSettings, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        self.constraint = settings.constraint
        self.device = torch.device(device)
        self.evidence = Evidence(self.constraint, settings.steps, MEMORY_SHARE)
        self.gates = self._build_gates()
        self.step = 0
        self._drawn: Tensor | None = None
        """z of the step that was sampled last, where the gates drew it."""
        self._leaves: list[Tensor] = []
        self._closed: list[list[bool]] | None = None
        self._gradient: Tensor | None = None
        self._table: Allocation | None = None

    def sample(self, step: int) -> None:
        """Sets z for the whole global batch of an optimizer step: (global_batch, layers, units).

        Each layer's slice becomes a leaf. Micro-batches in any order, pipelines and recomputation
        can thus accumulate into its gradient.
        """
        self.step = step
        target = self.settings.target(step)
        z = self.gates.draw(step, target, self.settings.global_batch)
        # Gates that are drawn on a GPU are not read back.
        self._closed = (z == 0).all(dim=0).tolist() if z.device.type == "cpu" else None
        self._drawn = z
        of_layers = upload(z.transpose(0, 1).contiguous(), self.device)
        self._leaves = [layer.requires_grad_() for layer in of_layers.unbind()]

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        """Windows and gates of `layer` for a micro-batch.

        sequences: (B,) int64, indices within the step's global batch.

        Inside `binarized()` there are no gates, but a window per KV head.
        """
        if self._table is not None:
            return self._table.select(layer, sequences)
        gate = self._leaves[layer][sequences]
        heads = self.constraint.num_kv_heads
        closed = None
        if self._closed is not None:
            units = self._closed[layer]
            closed = tuple(units) * (heads // len(units))
        return HeadPattern((self.settings.window,) * heads, gate.expand(-1, heads), closed)

    @contextmanager
    def binarized(self) -> Iterator[Allocation]:
        """Context in which layers attend by the exact top-k table of the current scores."""
        self._table = self.allocation()
        try:
            yield self._table
        finally:
            self._table = None

    def update(self, reduce: Callable[[Tensor], None] = lambda gradient: None) -> dict[str, Any]:
        """Adds the step's gradients to the evidence and moves the gates.

        reduce: as in `gradient`.

        Returns the step's metrics. Raises RuntimeError where `sample` was not called before.
        """
        if self._drawn is None:
            raise RuntimeError("GateBank.update was called before GateBank.sample")
        gradient = self._gradient
        if gradient is None:
            gradient = self.gradient(reduce)
        # The evidence's gates are drawn on the CPU, so this waits for no device.
        z = self._drawn.cpu()
        # The evidence comes first: the gates read it.
        self._add_evidence(gradient, z)
        target = self.settings.target(self.step)
        gate_metrics = self.gates.update(gradient, self.step, target)
        metrics = self._metrics(target, z) | gate_metrics
        self.discard()
        return metrics

    def gradient(self, reduce: Callable[[Tensor], None] = lambda gradient: None) -> Tensor:
        """The loss's gradient in the z of every sequence, (global_batch, layers, units) on the CPU.

        reduce: sums its argument over the ranks in place. The argument holds this rank's part, and
            zeros elsewhere.

        `update` uses the same gradient, without another reduction. Raises RuntimeError where
        `sample` was not called before.
        """
        if not self._leaves:
            raise RuntimeError("GateBank.gradient was called before GateBank.sample")
        gradients = []
        for leaf in self._leaves:
            # Layers of other pipeline ranks have no gradient here.
            gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        gradient = torch.stack(gradients, dim=1)
        reduce(gradient)
        self._gradient = gradient.cpu()
        return self._gradient

    def discard(self) -> None:
        """Drops the step's gates and gradients."""
        self._drawn = None
        self._leaves = []
        self._gradient = None

    def full(self) -> Tensor:
        """The exact top-k table of the current scores, (layers, kv_heads) booleans on the CPU."""
        return self.constraint.heads(self.constraint.top_k(self.gates.scores))

    def allocation(self) -> Allocation:
        """The allocation of the current scores."""
        return Allocation.from_scores(self.gates.scores, self.constraint, self.settings.window)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs. These are the bank's own tensors, not copies."""
        return self.gates.state() | self.evidence.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Copies the tensors of a checkpoint into the bank.

        Raises ValueError where the names differ.
        """
        own = self.state()
        if self.settings.controller != "evidence":
            # Gates of 0.1.0 were saved without evidence.
            # The evidence then starts empty, which is safe: log_alpha does not depend on it.
            for name in self.evidence.state():
                if name not in tensors:
                    del own[name]
        if own.keys() != tensors.keys():
            raise ValueError(f"the gates' state differs in {sorted(own.keys() ^ tensors.keys())}")
        for name, value in own.items():
            value.copy_(tensors[name])

    def summary(self) -> EvidenceSummary:
        """Says whether the evidence supports the current table."""
        return self.evidence.summary(self.constraint.top_k(self.gates.scores))

    def describe(self) -> dict[str, Any]:
        """The gates for people and plots, as gates.json holds them.

        Some fields are per unit (layers x units), the others are about the run.
        """
        summary = self.summary()
        return {
            "controller": self.settings.controller,
            "scores": self.gates.scores.tolist(),
            "probability_full": self.gates.open_probability.tolist(),
            "mean_gradient": self.evidence.scores.tolist(),
            "standard_error": _numbers(self.evidence.standard_errors),
            "z_score": _numbers(self.evidence.z_scores),
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
        """Adds a step's gradients, (global_batch, layers, units), measured at the gates z."""
        # The loss is a mean over the batch, so a sequence's own loss has a gradient that is
        # global_batch times as large.
        falls = -gradient.double() * self.settings.global_batch
        probed = (z > 0) & (z < 1)
        self.evidence.add(falls, probed, self.step, split=not self.gates.is_deciding(self.step))

    def _metrics(self, target: float, z: Tensor) -> dict[str, Any]:
        """The metrics that both kinds of gates have."""
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


def _numbers(table: Tensor) -> list[list[float | None]]:
    """The rows of a table, as JSON can hold them."""
    return [[_number(value) for value in row] for row in table.tolist()]


def _number(value: float) -> float | None:
    """The value, or None for infinity, which JSON does not have."""
    if abs(value) == float("inf"):
        return None
    return value
