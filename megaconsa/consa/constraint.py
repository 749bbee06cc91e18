"""The target that gates are held to, and its arithmetic: which units exist and how many of them use the sliding window.

A unit is a KV head or a whole layer. A constraint says that, of its units, an exact number is windowed. With `per_layer` scope
every layer has a constraint of its own; with `global` scope one constraint spans all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from megaconsa.errors import InputError

Granularity = Literal["kv_head", "layer"]
Scope = Literal["per_layer", "global"]

LISTED_UNITS = 16
"""Up to this many units, a refusal lists every sparsity that is possible."""


@dataclass(frozen=True)
class Constraint:
    """How many units are windowed, and within which groups. Raises InputError where no exact allocation exists.

    Scores and tables of units have the shape (layers, units per layer) throughout: one column per KV head, or a single
    column with `layer` granularity.

    sparsity: the fraction of units that use the sliding window.
    floor: full units that every layer keeps at least. Needs `global` scope.
    """

    num_layers: int
    num_kv_heads: int
    sparsity: float
    granularity: Granularity = "kv_head"
    scope: Scope = "per_layer"
    floor: int = 0

    def __post_init__(self) -> None:
        if self.granularity == "layer" and self.scope == "per_layer":
            raise InputError(
                "allocation.scope=per_layer cannot hold with allocation.granularity=layer: a layer is one unit; use allocation.scope=global"
            )
        if not 0 <= self.sparsity <= 1:  # a NaN fails this too
            raise InputError(f"allocation.sparsity={self.sparsity} must lie between 0 and 1")
        if abs(self.windowed - self.sparsity * self.units) > 1e-6 * self.units:
            raise InputError(self._impossible())
        self._check_floor()

    @property
    def units_per_layer(self) -> int:
        return self.num_kv_heads if self.granularity == "kv_head" else 1

    @property
    def count(self) -> int:
        """Number of constraints."""
        return self.num_layers if self.scope == "per_layer" else 1

    @property
    def units(self) -> int:
        """Units under one constraint."""
        return self.num_layers * self.units_per_layer // self.count

    @property
    def windowed(self) -> int:
        """Windowed units under one constraint."""
        return round(self.sparsity * self.units)

    @property
    def full(self) -> int:
        """Full units under one constraint."""
        return self.units - self.windowed

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(layers, units per layer)."""
        return self.num_layers, self.units_per_layer

    def rows(self, values: Tensor) -> Tensor:
        """Groups per-unit values by constraint: (layers, units per layer) -> (constraints, units)."""
        return values.reshape(self.count, self.units)

    def top_k(self, scores: Tensor) -> Tensor:
        """The exact table: in each constraint the units with the largest scores are full. Ties keep the lower index.

        scores: (layers, units per layer). Returns booleans of that shape, on the CPU. The floor's units come first.
        """
        rows = self._ranked(scores)
        order = rows.argsort(dim=-1, descending=True, stable=True)
        table = torch.zeros_like(rows, dtype=torch.bool)
        table.scatter_(-1, order[:, : self.full], True)
        return table.reshape(self.shape)

    def cut(self, scores: Tensor) -> Tensor:
        """The score midway between the last full unit and the first windowed one, per constraint: (constraints,) fp64.

        Where all units are of one kind there is nothing to cut: minus infinity if all are full, infinity if all are windowed.
        A unit that only the floor keeps full does not move the cut.
        """
        if self.windowed == 0:
            return torch.full((self.count,), -torch.inf, dtype=torch.float64)
        last_full, first_windowed = self._beside_the_cut(scores)
        return (last_full + first_windowed) / 2

    def margin(self, scores: Tensor) -> float:
        """The smallest gap between the last full unit and the first windowed one, over the constraints; infinity if none is cut."""
        if self.windowed in (0, self.units):
            return float("inf")
        last_full, first_windowed = self._beside_the_cut(scores)
        return float((last_full - first_windowed).min())

    def sparsities(self, open_probability: Tensor) -> Tensor:
        """Expected sparsity of each constraint, (constraints,): one minus the mean probability of being open."""
        return 1 - self.rows(open_probability).mean(dim=1)

    def heads(self, table: Tensor) -> Tensor:
        """A table of units as one of KV heads: (layers, units per layer) -> (layers, KV heads)."""
        return table.expand(self.num_layers, self.num_kv_heads)

    def check_scores(self, scores: Tensor, source: str) -> None:
        """Raises InputError, naming `source`, unless the scores are finite and one per unit."""
        if tuple(scores.shape) != self.shape:
            shape = " x ".join(map(str, scores.shape))
            raise InputError(
                f"{source} holds scores of shape {shape}, but the model has {self.shape[0]} x {self.shape[1]} units"
            )
        if not bool(scores.isfinite().all()):
            layer, unit = (~scores.isfinite()).nonzero()[0].tolist()
            raise InputError(
                f"{source}: the score of layer {layer}, unit {unit} is {float(scores[layer, unit])}, not a number"
            )

    def _ranked(self, scores: Tensor) -> Tensor:
        """Scores by constraint, those that the floor keeps full raised to infinity."""
        values = scores.detach().double().cpu()
        if self.floor:
            best = values.argsort(dim=1, descending=True, stable=True)[:, : self.floor]
            values = values.scatter(1, best, torch.inf)
        return self.rows(values)

    def _beside_the_cut(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the last full and the first windowed unit of each constraint.

        Where the floor takes every full unit, the last full one is its lowest. All windowed: the last full one is at infinity.
        """
        ranked = self._ranked(scores).sort(dim=-1, descending=True).values
        first_windowed = ranked[:, self.full]
        if self.full == 0:
            return torch.full_like(first_windowed, torch.inf), first_windowed
        last_full = ranked[:, self.full - 1]
        if self.floor and bool(last_full.isinf().any()):
            kept = scores.detach().double().cpu()[self.top_k(scores)]
            last_full = torch.maximum(kept.min().reshape(1), first_windowed)
        return last_full, first_windowed

    def _impossible(self) -> str:
        place = f"the {self.units} KV heads of a layer"
        if self.scope == "global":
            place = f"{self.units} {'layers' if self.granularity == 'layer' else 'KV heads'}"
        if self.units <= LISTED_UNITS:
            possible = ", ".join(f"{count / self.units:.6g}" for count in range(self.units + 1))
            return f"allocation.sparsity={self.sparsity:g} cannot be met by {place}; possible are {possible}"
        near = sorted({max(0, min(self.units, self.windowed + step)) for step in (-2, -1, 0, 1, 2)})
        possible = ", ".join(f"{count / self.units:.6g}" for count in near)
        return (
            f"allocation.sparsity={self.sparsity:g} cannot be met by {place}; "
            f"multiples of 1/{self.units} are possible, near it {possible}"
        )

    def _check_floor(self) -> None:
        if self.floor == 0:
            return
        if self.scope != "global" or self.granularity != "kv_head":
            raise InputError(
                f"allocation.floor={self.floor} needs allocation.scope=global and allocation.granularity=kv_head: "
                "elsewhere the target itself says what each layer keeps"
            )
        if not 0 < self.floor <= self.num_kv_heads:
            raise InputError(
                f"allocation.floor={self.floor} must lie between 0 and the {self.num_kv_heads} KV heads of a layer"
            )
        if self.floor * self.num_layers > self.full:
            highest = 1 - self.floor / self.num_kv_heads
            raise InputError(
                f"allocation.floor={self.floor} keeps {self.floor * self.num_layers} units full, but allocation.sparsity="
                f"{self.sparsity:g} leaves {self.full}; lower the floor, or the sparsity to {highest:g} at most"
            )
