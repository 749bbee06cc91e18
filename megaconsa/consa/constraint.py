"""The sparsity constraint and its arithmetic: which units exist, and how many are windowed.

A unit is a KV head or a whole layer. A constraint says that an exact number of its units use the
sliding window. With `per_layer` scope every layer has its own constraint. With `global` scope one
constraint spans all layers.

A configuration is checked with these numbers alone, so torch is imported where tensors are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from megaconsa.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["kv_head", "layer"]
Scope = Literal["per_layer", "global"]

LISTED_UNITS = 16
"""Up to this many units, an error message lists every possible sparsity."""


@dataclass(frozen=True)
class Constraint:
    """How many units are windowed, and within which groups.

    Scores and tables of units have the shape (layers, units per layer) throughout. There is one
    column per KV head, or a single column with `layer` granularity.

    sparsity: the fraction of units that use the sliding window.
    floor: the minimum number of full units in every layer. It needs `global` scope.

    Raises InputError where no exact allocation exists.
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
                "allocation.scope=per_layer cannot hold with allocation.granularity=layer: "
                "a layer is one unit; use allocation.scope=global"
            )
        if not 0 <= self.sparsity <= 1:  # a NaN fails this too
            raise InputError(f"allocation.sparsity={self.sparsity} must lie between 0 and 1")
        # `windowed` is rounded: it differs where the sparsity is not a whole number of units.
        if abs(self.windowed - self.sparsity * self.units) > 1e-6 * self.units:
            raise InputError(self._impossible())
        self._check_floor()

    @property
    def units_per_layer(self) -> int:
        if self.granularity == "kv_head":
            return self.num_kv_heads
        return 1

    @property
    def count(self) -> int:
        """Number of constraints."""
        if self.scope == "per_layer":
            return self.num_layers
        return 1

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
        """Groups per-unit values by constraint.

        (layers, units per layer) becomes (constraints, units).
        """
        return values.reshape(self.count, self.units)

    def top_k(self, scores: Tensor) -> Tensor:
        """The exact table: the units with the largest scores in each constraint are full.

        scores: (layers, units per layer).

        The units that the floor keeps come first. Ties keep the lower index. Returns booleans of
        the same shape, on the CPU. True is full.
        """
        import torch

        rows = self._ranked(scores)
        # A stable sort puts the lower index first among ties.
        order = rows.argsort(dim=-1, descending=True, stable=True)
        table = torch.zeros_like(rows, dtype=torch.bool)
        table.scatter_(-1, order[:, : self.full], True)
        return table.reshape(self.shape)

    def cut(self, scores: Tensor) -> Tensor:
        """The score midway between the last full unit and the first windowed one.

        scores: (layers, units per layer).

        Returns fp64 (constraints,). There is nothing to cut where all units are of one kind. The
        cut is then minus infinity if all are full, and infinity if all are windowed. A unit that
        only the floor keeps full does not move the cut.
        """
        import torch

        if self.windowed == 0:
            return torch.full((self.count,), -torch.inf, dtype=torch.float64)
        last_full, first_windowed = self._beside_the_cut(scores)
        return (last_full + first_windowed) / 2

    def margin(self, scores: Tensor) -> float:
        """The smallest gap between the last full unit and the first windowed one.

        scores: (layers, units per layer).

        The minimum is over the constraints. Returns infinity if nothing is cut.
        """
        if self.windowed in (0, self.units):
            return float("inf")
        last_full, first_windowed = self._beside_the_cut(scores)
        return float((last_full - first_windowed).min())

    def sparsities(self, open_probability: Tensor) -> Tensor:
        """Expected sparsity of each constraint, (constraints,).

        It is one minus the mean probability of being open.
        """
        return 1 - self.rows(open_probability).mean(dim=1)

    def heads(self, table: Tensor) -> Tensor:
        """Expands a table of units to KV heads.

        (layers, units per layer) becomes (layers, KV heads).
        """
        return table.expand(self.num_layers, self.num_kv_heads)

    def kept_by_floor(self, scores: Tensor) -> Tensor:
        """The units that the floor keeps full: the best of each layer.

        scores: (layers, units per layer). Returns booleans of the same shape, on the CPU.
        """
        import torch

        values = scores.detach().double().cpu()
        best = values.argsort(dim=1, descending=True, stable=True)[:, : self.floor]
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, best, True)

    def check_scores(self, scores: Tensor, source: str) -> None:
        """Raises InputError, naming `source`, unless the scores are finite and one per unit."""
        if tuple(scores.shape) != self.shape:
            shape = " x ".join(map(str, scores.shape))
            raise InputError(
                f"{source} holds scores of shape {shape}, "
                f"but the model has {self.shape[0]} x {self.shape[1]} units"
            )
        if not bool(scores.isfinite().all()):
            layer, unit = (~scores.isfinite()).nonzero()[0].tolist()
            raise InputError(
                f"{source}: the score of layer {layer}, unit {unit} is "
                f"{float(scores[layer, unit])}, not a number"
            )

    def _ranked(self, scores: Tensor) -> Tensor:
        """Scores by constraint, (constraints, units) fp64 on the CPU.

        The scores that the floor keeps full are raised to infinity.
        """
        values = scores.detach().double().cpu()
        if self.floor:
            values = values.masked_fill(self.kept_by_floor(values), math.inf)
        return self.rows(values)

    def _beside_the_cut(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the last full and the first windowed unit of each constraint.

        The last full score is infinity where all units are windowed. Where the floor takes every
        full unit, it is the lowest score that the floor keeps, and at least the first windowed one.
        """
        import torch

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
        """The error message for a sparsity that is not a whole number of units."""
        if self.scope == "global":
            kind = "layers" if self.granularity == "layer" else "KV heads"
            place = f"{self.units} {kind}"
        else:
            place = f"the {self.units} KV heads of a layer"
        problem = f"allocation.sparsity={self.sparsity:g} cannot be met by {place}; "
        if self.units <= LISTED_UNITS:
            return f"{problem}possible are {self._fractions(range(self.units + 1))}"
        near = set()
        for step in (-2, -1, 0, 1, 2):
            near.add(max(0, min(self.units, self.windowed + step)))
        return (
            f"{problem}multiples of 1/{self.units} are possible, "
            f"near it {self._fractions(sorted(near))}"
        )

    def _fractions(self, counts: Iterable[int]) -> str:
        """Sparsities of these numbers of windowed units, for an error message."""
        return ", ".join(f"{count / self.units:.6g}" for count in counts)

    def _check_floor(self) -> None:
        if self.floor == 0:
            return
        if self.scope != "global" or self.granularity != "kv_head":
            raise InputError(
                f"allocation.floor={self.floor} needs allocation.scope=global and "
                "allocation.granularity=kv_head: "
                "elsewhere the target itself says what each layer keeps"
            )
        if not 0 < self.floor <= self.num_kv_heads:
            raise InputError(
                f"allocation.floor={self.floor} must lie between 0 and "
                f"the {self.num_kv_heads} KV heads of a layer"
            )
        if self.floor * self.num_layers > self.full:
            highest = 1 - self.floor / self.num_kv_heads
            raise InputError(
                f"allocation.floor={self.floor} keeps {self.floor * self.num_layers} units full, "
                f"but allocation.sparsity={self.sparsity:g} leaves {self.full}; "
                f"lower the floor, or the sparsity to {highest:g} at most"
            )
