"""The finished table of which attention units are full and which use the sliding window: rules, binarising, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megaconsa.errors import InputError
from megaconsa.files import replace_text

Granularity = Literal["kv_head", "layer"]
Scope = Literal["per_layer", "global"]

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
        missing = {"window", "full", "num_layers", "num_kv_heads", "granularity", "scope", "target_sparsity"} - data.keys()
        if missing:
            raise InputError(f"{source} lacks {', '.join(sorted(missing))}; make it again with finalize-masks or rule-masks")
        full, layers, heads = data["full"], data["num_layers"], data["num_kv_heads"]
        if (
            not isinstance(full, list)
            or len(full) != layers
            or layers < 1
            or heads < 1
            or any(not isinstance(row, list) or len(row) != heads or any(not isinstance(x, bool) for x in row) for row in full)
        ):
            raise InputError(f"{source}: field full is not a table of {layers} x {heads} booleans")
        window, target, origin = data["window"], data["target_sparsity"], data.get("origin", {})
        if type(window) is not int or window < 1:
            raise InputError(f"{source}: window is {window!r}, but must be an integer of at least 1")
        for name, known in (("granularity", get_args(Granularity)), ("scope", get_args(Scope))):
            if data[name] not in known:
                raise InputError(f"{source}: {name} is {data[name]!r}, but must be one of {', '.join(known)}")
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

    def save(self, path: Path) -> None:
        replace_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Allocation:
        try:
            data = json.loads(path.read_text())
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


def units_per_constraint(num_layers: int, num_kv_heads: int, granularity: Granularity, scope: Scope) -> int:
    """Number of gated units that one sparsity constraint spans."""
    if granularity == "layer":
        if scope == "per_layer":
            raise InputError(
                "allocation.scope=per_layer cannot hold with allocation.granularity=layer: a layer is one unit; use allocation.scope=global"
            )
        return num_layers
    return num_kv_heads if scope == "per_layer" else num_layers * num_kv_heads


def check_sparsity(sparsity: float, num_layers: int, num_kv_heads: int, granularity: Granularity, scope: Scope) -> int:
    """Returns how many units per constraint use the window; raises InputError where that is not a whole number."""
    units = units_per_constraint(num_layers, num_kv_heads, granularity, scope)
    if not 0 <= sparsity <= 1:  # a NaN fails this too
        raise InputError(f"allocation.sparsity={sparsity} must lie between 0 and 1")
    windowed = round(sparsity * units)
    if abs(windowed - sparsity * units) > 1e-6 * units:
        near = sorted({max(0, min(units, windowed + step)) for step in (-2, -1, 0, 1, 2)})
        possible = ", ".join(f"{count / units:.6g}" for count in (range(units + 1) if units <= 16 else near))
        where = {
            "per_layer": f"the {units} KV heads of a layer",
            "global": f"{units} {'layers' if granularity == 'layer' else 'KV heads'}",
        }
        raise InputError(
            f"allocation.sparsity={sparsity:g} cannot be met by {where[scope]}; "
            f"{'possible are' if units <= 16 else f'multiples of 1/{units} are possible, near it'} {possible}"
        )
    return windowed


def top_k(log_alpha: Tensor, sparsity: float, num_kv_heads: int, granularity: Granularity, scope: Scope) -> Tensor:
    """Binarises so that every constraint meets `sparsity` exactly: its units with the largest log_alpha stay full.

    log_alpha: (layers, kv_heads), or (layers,) for layer granularity. Equal values: the lower index stays full.
    Returns a boolean tensor (layers, kv_heads).
    """
    values = log_alpha.detach().double().cpu()
    num_layers = values.shape[0]
    windowed = check_sparsity(sparsity, num_layers, num_kv_heads, granularity, scope)
    rows = _constraints(values, scope)
    ranking = rows.argsort(dim=-1, descending=True, stable=True)
    full = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, ranking[:, : rows.shape[-1] - windowed], True)
    return _expand(full.reshape(values.shape), num_kv_heads)


def threshold(log_alpha: Tensor, num_kv_heads: int) -> Tensor:
    """Binarises as the paper does, log_alpha > 0 is full; the sparsity that results need not be the target."""
    return _expand(log_alpha.detach().cpu() > 0, num_kv_heads)


def cut_margin(log_alpha: Tensor, sparsity: float, num_kv_heads: int, granularity: Granularity, scope: Scope) -> float:
    """Smallest gap in log_alpha between the last unit kept full and the first made a window, over the constraints."""
    values = log_alpha.detach().double().cpu()
    windowed = check_sparsity(sparsity, values.shape[0], num_kv_heads, granularity, scope)
    rows = _constraints(values, scope)
    if windowed in (0, rows.shape[-1]):
        return float("inf")
    ranked = rows.sort(dim=-1).values
    return float((ranked[:, windowed] - ranked[:, windowed - 1]).min())


def _constraints(values: Tensor, scope: Scope) -> Tensor:
    """The units' values with one row for each constraint."""
    return values if scope == "per_layer" else values.reshape(1, -1)


def _expand(full: Tensor, num_kv_heads: int) -> Tensor:
    return full if full.dim() == 2 else full[:, None].expand(-1, num_kv_heads)


def as_rows(full: Tensor | Sequence[Sequence[bool]]) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(bool(x) for x in row) for row in full)
