"""The allocation: the finished table of which KV heads are full and which use the sliding window.

It is built from scores, from a table or from JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megaconsa.consa.constraint import Constraint, Granularity, Scope
from megaconsa.errors import InputError
from megaconsa.files import parse_json, replace_text
from megaconsa.reading import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from megaconsa.kernels.attention.head_pattern import HeadPattern

FORMAT_VERSION = 1
FULL_WINDOW = 2**31 - 1
"""Window of a full-attention head. It is longer than any sequence, and still fits an int32."""
_REQUIRED_FIELDS = {
    "window",
    "full",
    "num_layers",
    "num_kv_heads",
    "granularity",
    "scope",
    "target_sparsity",
}
"""Fields that allocation.json must have, besides its version."""


@dataclass(frozen=True)
class Allocation:
    """Which KV heads keep full attention.

    window: number of keys that a sliding-window head sees, the query's own included.
    full: (num_layers, num_kv_heads) booleans in the model's original head order. True is full
        attention (z = 1).
    target_sparsity: the sparsity that was asked for.
    origin: where the table came from (a rule, or a learning run and its step), for people to read.
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
        """Whether all heads of each layer are of one kind, for any granularity."""
        return all(len(set(row)) == 1 for row in self.full)

    def windows(self, layer: int) -> tuple[int, ...]:
        """Window of each KV head of `layer`, as `megaconsa.kernels.hybrid_attention` takes it."""
        return tuple(FULL_WINDOW if full else self.window for full in self.full[layer])

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        """Windows and gates of `layer`, as HeadSelector requires.

        The windows are the same for every sequence, and there are no gates.
        """
        # Only a model selects. A table that is read or counted needs no kernels and no torch.
        from megaconsa.kernels.attention.head_pattern import HeadPattern

        return HeadPattern(self.windows(layer))

    def full_heads_first(self, layer: int) -> tuple[int, ...]:
        """Original indices of the KV heads of `layer`, full-attention heads first.

        The original order is kept within both kinds.
        """
        return self.head_order(layer, 1)

    def head_order(self, layer: int, ranks: int) -> tuple[int, ...]:
        """Original indices of the KV heads of `layer`, ordered for `ranks` equal contiguous parts.

        The parts have as equal a number of full heads as the counts allow. Each part lists its full
        heads first, and keeps the original order within both kinds. Full heads that are left over
        go to one rank each. The ranks take turns from layer to layer, so their totals over any run
        of layers differ by at most one. Raises ValueError where the ranks cannot share the heads
        equally.
        """
        row = self.full[layer]
        if len(row) % ranks:
            raise ValueError(f"{len(row)} KV heads do not divide into {ranks} equal parts")
        # The first rank that takes a left-over head. It follows the last rank that took one.
        turn = sum(map(sum, self.full[:layer])) % ranks
        full = [head for head, is_full in enumerate(row) if is_full]
        windowed = [head for head, is_full in enumerate(row) if not is_full]
        each, left_over = divmod(len(full), ranks)
        order: list[int] = []
        for rank in range(ranks):
            takes_one_more = (rank - turn) % ranks < left_over
            count = each + int(takes_one_more)
            rest = len(row) // ranks - count
            order += full[:count] + windowed[:rest]
            full = full[count:]
            windowed = windowed[rest:]
        return tuple(order)

    def to_json(self) -> dict[str, Any]:
        """The content of allocation.json."""
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
        """Checks the data and builds the table.

        source: names the data in error messages.

        Raises InputError, naming `source`, where the data is incomplete or inconsistent.
        """
        if not isinstance(data, dict) or data.get("version") != FORMAT_VERSION:
            raise InputError(
                f"{source} is not an allocation of version {FORMAT_VERSION}; "
                "make one with finalize-masks or rule-masks"
            )
        missing = _REQUIRED_FIELDS - data.keys()
        if missing:
            raise InputError(
                f"{source} lacks {', '.join(sorted(missing))}; "
                "make it again with finalize-masks or rule-masks"
            )
        full = data["full"]
        layers = data["num_layers"]
        heads = data["num_kv_heads"]
        if not _is_table(full, layers, heads):
            raise InputError(f"{source}: field full is not a table of {layers} x {heads} booleans")
        window = data["window"]
        target = data["target_sparsity"]
        origin = data.get("origin", {})
        # A bool is an int to isinstance, but true is no window.
        if type(window) is not int or window < 1:
            raise InputError(
                f"{source}: window is {window!r}, but must be an integer of at least 1"
            )
        choices = {"granularity": get_args(Granularity), "scope": get_args(Scope)}
        for name, known in choices.items():
            if data[name] not in known:
                raise InputError(
                    f"{source}: {name} is {data[name]!r}, but must be one of {', '.join(known)}"
                )
        is_number = isinstance(target, int | float) and not isinstance(target, bool)
        if not is_number or not 0 <= target <= 1:
            raise InputError(
                f"{source}: target_sparsity is {target!r}, but must be a number from 0 to 1"
            )
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
        """The exact top-k table.

        scores: (layers, units per layer).
        """
        return cls.from_table(constraint.top_k(scores), constraint, window, origin)

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        constraint: Constraint,
        window: int,
        origin: dict[str, Any] | None = None,
    ) -> Allocation:
        """The allocation of a table of units.

        table: (layers, units per layer) booleans. True is full.
        """
        return cls.from_heads(constraint.heads(table), constraint, window, origin)

    @classmethod
    def from_heads(
        cls,
        full: Tensor | Sequence[Sequence[bool]],
        constraint: Constraint,
        window: int,
        origin: dict[str, Any] | None = None,
    ) -> Allocation:
        """The allocation of a table of KV heads.

        full: (layers, KV heads) booleans. True is full.
        """
        return cls(
            window=window,
            full=as_rows(full),
            granularity=constraint.granularity,
            scope=constraint.scope,
            target_sparsity=constraint.sparsity,
            origin=origin or {},
        )

    def save(self, path: Path) -> None:
        """Writes the allocation as JSON."""
        replace_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Allocation:
        """Reads what `save` wrote. Raises InputError where that fails."""
        try:
            data = parse_json(read_text(path))
        except FileNotFoundError:
            raise InputError(f"allocation file {path} does not exist") from None
        except (OSError, ValueError) as error:
            raise InputError(f"allocation file {path} cannot be read: {error}") from None
        return cls.from_json(data, str(path))

    def check_shape(self, num_layers: int, num_kv_heads: int, source: str) -> None:
        """Raises InputError unless the table fits a model of these numbers of layers and KV heads.

        source: names the table in the error message.
        """
        if (self.num_layers, self.num_kv_heads) != (num_layers, num_kv_heads):
            raise InputError(
                f"{source} was made for {self.num_layers} layers x {self.num_kv_heads} KV heads, "
                f"but the model has {num_layers} x {num_kv_heads}"
            )


def as_rows(full: Tensor | Sequence[Sequence[bool]]) -> tuple[tuple[bool, ...], ...]:
    """A table of booleans as tuples.

    full: (layers, KV heads).
    """
    return tuple(tuple(bool(x) for x in row) for row in full)


def _is_table(full: Any, layers: Any, heads: Any) -> bool:
    """Whether the JSON value `full` is a list of `layers` lists of `heads` booleans."""
    # A bool is an int to isinstance, but true is no number of layers.
    if type(layers) is not int or type(heads) is not int or layers < 1 or heads < 1:
        return False
    if not isinstance(full, list) or len(full) != layers:
        return False
    for row in full:
        if not isinstance(row, list) or len(row) != heads:
            return False
        if not all(isinstance(value, bool) for value in row):
            return False
    return True
