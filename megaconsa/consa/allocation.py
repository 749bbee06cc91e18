"""The finished table of which attention units are full and which use the sliding window: rules, binarising, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from megaconsa.consa.constraint import Constraint, Granularity, Scope
from megaconsa.errors import InputError
from megaconsa.files import parse_json, replace_text
from megaconsa.reading import read_text

FORMAT_VERSION = 1
FULL_WINDOW = 2**31 - 1
"""Window of a full-attention head: longer than any sequence, and still an int32."""


@dataclass(frozen=True)
class Allocation:
    """Which KV heads keep full attention.

    full: (num_layers, num_kv_heads) booleans in the model's original head order; True is full attention (z = 1).
    window: number of keys a sliding-window head sees, itself included.
    origin: where the table came from (a rule, a learning run and its step), for people to read.
    """

    window: int
    full: tuple[tuple[bool, ...], ...]
    granularity: Granularity = "kv_head"
    scope: Scope = "per_layer"
    target_sparsity: float = 0.0
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return len(self.full)

    @property
    def num_kv_heads(self) -> int:
        return len(self.full[0])

    @property
    def sparsity(self) -> float:
        """Fraction of KV heads that use the sliding window."""
        return 1.0 - sum(map(sum, self.full)) / (self.num_layers * self.num_kv_heads)

    @property
    def is_layer_wise(self) -> bool:
        """Whether every layer is of one kind, whatever the granularity it was made with."""
        return all(len(set(row)) == 1 for row in self.full)

    def windows(self, layer: int) -> tuple[int, ...]:
        """Window of each KV head of `layer`, as `megaconsa.kernels.hybrid_attention` takes it."""
        return tuple(FULL_WINDOW if full else self.window for full in self.full[layer])

    def select(self, layer: int, sequences: Tensor) -> tuple[int | tuple[int, ...], Tensor | None]:
        """Windows and gates of `layer`: the same for every sequence, and no gates. What a layer asks, as of a GateBank."""
        return self.windows(layer), None

    def full_heads_first(self, layer: int) -> tuple[int, ...]:
        """Original indices of the KV heads of `layer`, full-attention heads first, otherwise in order."""
        return self.head_order(layer, 1)

    def head_order(self, layer: int, ranks: int) -> tuple[int, ...]:
        """Original indices of the KV heads of `layer` in the order in which they lie over `ranks` equal contiguous parts.

        Each part has as equal a number of full heads as the counts allow, full heads first, otherwise in order. Full heads that are
        left over go to one rank each, from layer to layer in turn: the ranks' totals over any run of layers differ by at most one.
        Raises ValueError where the ranks cannot share the heads equally.
        """
        row = self.full[layer]
        if len(row) % ranks:
            raise ValueError(f"{len(row)} KV heads do not divide into {ranks} equal parts")
        # The first rank that takes one more: the one after the last that did.
        turn = sum(map(sum, self.full[:layer])) % ranks
        full = [head for head, is_full in enumerate(row) if is_full]
        windowed = [head for head, is_full in enumerate(row) if not is_full]
        each, left_over = divmod(len(full), ranks)
        order: list[int] = []
        for rank in range(ranks):
            count = each + ((rank - turn) % ranks < left_over)
            rest = len(row) // ranks - count
            order += full[:count] + windowed[:rest]
            full, windowed = full[count:], windowed[rest:]
        return tuple(order)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "window": self.window,
            "granularity": self.granularity,
            "scope": self.scope,
            "target_sparsity": self.target_sparsity,
            "sparsity": self.sparsity,
            "full": [list(row) for row in self.full],
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, data: Any, source: str = "allocation") -> Allocation:
        """Checks and builds the table; raises InputError naming `source` where the data does not hold together."""
        if not isinstance(data, dict) or data.get("version") != FORMAT_VERSION:
            raise InputError(
                f"{source} is not an allocation of version {FORMAT_VERSION}; make one with finalize-masks or rule-masks"
            )
        missing = {
            "window",
            "full",
            "num_layers",
            "num_kv_heads",
            "granularity",
            "scope",
            "target_sparsity",
        } - data.keys()
        if missing:
            raise InputError(
                f"{source} lacks {', '.join(sorted(missing))}; make it again with finalize-masks or rule-masks"
            )
        full, layers, heads = data["full"], data["num_layers"], data["num_kv_heads"]
        if (
            not isinstance(full, list)
            or len(full) != layers
            or layers < 1
            or heads < 1
            or any(
                not isinstance(row, list)
                or len(row) != heads
                or any(not isinstance(x, bool) for x in row)
                for row in full
            )
        ):
            raise InputError(f"{source}: field full is not a table of {layers} x {heads} booleans")
        window, target, origin = data["window"], data["target_sparsity"], data.get("origin", {})
        if type(window) is not int or window < 1:
            raise InputError(
                f"{source}: window is {window!r}, but must be an integer of at least 1"
            )
        for name, known in (("granularity", get_args(Granularity)), ("scope", get_args(Scope))):
            if data[name] not in known:
                raise InputError(
                    f"{source}: {name} is {data[name]!r}, but must be one of {', '.join(known)}"
                )
        if not isinstance(target, int | float):
            raise InputError(f"{source}: target_sparsity is {target!r}, but must be a number")
        if not isinstance(origin, dict):
            raise InputError(f"{source}: origin is {origin!r}, but must be a mapping")
        return cls(
            window=window,
            full=tuple(tuple(row) for row in full),
            granularity=data["granularity"],
            scope=data["scope"],
            target_sparsity=float(target),
            origin=origin,
        )

    @classmethod
    def from_scores(
        cls,
        scores: Tensor,
        constraint: Constraint,
        window: int,
        origin: dict[str, Any] | None = None,
    ) -> Allocation:
        """The exact top-k table of scores (layers, units per layer)."""
        return cls.from_table(constraint.top_k(scores), constraint, window, origin)

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        constraint: Constraint,
        window: int,
        origin: dict[str, Any] | None = None,
    ) -> Allocation:
        """table: (layers, units per layer) booleans, True is full."""
        return cls(
            window=window,
            full=as_rows(constraint.heads(table)),
            granularity=constraint.granularity,
            scope=constraint.scope,
            target_sparsity=constraint.sparsity,
            origin=origin or {},
        )

    def save(self, path: Path) -> None:
        replace_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Allocation:
        try:
            data = parse_json(read_text(path))
        except FileNotFoundError:
            raise InputError(f"allocation file {path} does not exist") from None
        except (OSError, ValueError) as error:
            raise InputError(f"allocation file {path} cannot be read: {error}") from None
        return cls.from_json(data, str(path))

    def check_shape(self, num_layers: int, num_kv_heads: int, source: str) -> None:
        """Raises InputError unless the table fits a model of that many layers and KV heads."""
        if (self.num_layers, self.num_kv_heads) != (num_layers, num_kv_heads):
            raise InputError(
                f"{source} was made for {self.num_layers} layers x {self.num_kv_heads} KV heads, "
                f"but the model has {num_layers} x {num_kv_heads}"
            )


def as_rows(full: Tensor | Sequence[Sequence[bool]]) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(bool(x) for x in row) for row in full)
