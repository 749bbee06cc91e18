"""Budgets of cache or attention, and their conversion to a sparsity.

This is arithmetic on shapes alone. All KV heads of a model cost the same, so the cost falls
linearly with the sparsity, from the dense model to the all-windowed one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from megaconsa.consa import rules
from megaconsa.consa.constraint import Constraint
from megaconsa.errors import InputError
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import kv_cache_bytes, visible_pairs

Quantity = Literal["cache_bytes", "cache_share", "attention_share"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


@dataclass(frozen=True)
class Budget:
    """The most that a model may cost at a context length.

    quantity: what is limited, a field of the section `allocation`.
        cache_bytes: bytes of bf16 keys and values per token, averaged over the context.
        cache_share: the KV cache as a share of the dense model's.
        attention_share: visible (query, key) pairs as a share of the dense model's.
    limit: the largest allowed cost, in the unit of the quantity.
    context: tokens of the sequence.
    """

    quantity: Quantity
    limit: float
    context: int

    def __str__(self) -> str:
        return f"allocation.{self.quantity}={self.limit} at {self.context} tokens"

    def lowest_sparsity(
        self, model_config: ModelConfig, window: int, constraint: Constraint
    ) -> float:
        """The lowest sparsity that costs no more than the limit.

        It is a whole number of units in each constraint.

        window: keys that a windowed head sees.
        constraint: says what the units are. Its own sparsity is ignored.

        Raises InputError for a limit above the dense model's cost, or below the least that the
        constraint allows.
        """
        dense, windowed = self._extremes(model_config, window)
        # The decimal number as written, not the nearest binary number: 0.35 means 35/100.
        limit = Fraction(str(self.limit))
        if limit > dense:
            raise InputError(
                f"{self} is above {self._rounded_up(dense)}, the cost of the dense model; "
                "lower it, or leave it out and give allocation.sparsity=0"
            )
        saved_by_unit = (dense - windowed) / constraint.units
        least = dense - saved_by_unit * _most_windowed(constraint)
        if limit < least:
            raise InputError(self._below(least, window, constraint.floor))
        if limit == dense:
            return 0.0
        return math.ceil((dense - limit) / saved_by_unit) / constraint.units

    def _extremes(self, model_config: ModelConfig, window: int) -> tuple[Fraction, Fraction]:
        """Costs of the dense and of the all-windowed model, in the unit of the limit."""
        if self.quantity == "attention_share":
            dense = visible_pairs(self.context, self.context)
            windowed = visible_pairs(self.context, window)
            return Fraction(1), Fraction(windowed, dense)
        layers = model_config.num_hidden_layers
        all_windowed = rules.all_swa(layers, model_config.num_key_value_heads, window)
        dense = kv_cache_bytes(model_config, None, self.context)
        windowed = kv_cache_bytes(model_config, all_windowed, self.context)
        if self.quantity == "cache_share":
            return Fraction(1), Fraction(windowed, dense)
        return Fraction(dense, self.context), Fraction(windowed, self.context)

    def _below(self, least: Fraction, window: int, floor: int) -> str:
        """The error message for a limit below `least`, the least that is possible."""
        lowest = self._rounded_up(least)
        if floor:
            return (
                f"{self} is a budget below {lowest}, the least that attention.window={window} and "
                f"allocation.floor={floor} cost; raise it, shorten the window or lower the floor"
            )
        return (
            f"{self} is a budget below {lowest}, what all-windowed costs with "
            f"attention.window={window}; raise it, or shorten the window"
        )

    def _rounded_up(self, cost: Fraction) -> str:
        """A cost for people. It is never below the true cost, so it is accepted as a limit."""
        unit = 1 if self.quantity == "cache_bytes" else Fraction(1, 1_000_000)
        return f"{float(math.ceil(cost / unit) * unit):.12g}"


def _most_windowed(constraint: Constraint) -> int:
    """The most units under one constraint that may be windowed."""
    if constraint.floor:
        # A floor implies one constraint for all layers.
        return constraint.units - constraint.floor * constraint.num_layers
    return constraint.units
