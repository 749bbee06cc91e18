"""Allocations that follow a rule instead of being learned.

They are the baselines that a learned allocation must beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint, Granularity, Scope
from megaconsa.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["dense", "all-swa", "interleaved", "head-share", "bottom-swa", "middle", "random"]
RULES: tuple[str, ...] = get_args(Rule)

WITH_SPARSITY = ("head-share", "bottom-swa", "middle", "random")
"""Rules that take a sparsity. The other rules fix which layers are windowed."""

OWN_UNITS: dict[str, tuple[Granularity, Scope]] = {
    "head-share": ("kv_head", "per_layer"),
    "bottom-swa": ("layer", "global"),
    "middle": ("layer", "global"),
}
"""Granularity and scope of the rules that fix them. `random` takes any combination."""


def dense(num_layers: int, num_kv_heads: int, window: int) -> Allocation:
    """Full attention everywhere."""
    return _layers([True] * num_layers, num_kv_heads, window, "dense")


def all_swa(num_layers: int, num_kv_heads: int, window: int) -> Allocation:
    """The sliding window everywhere."""
    return _layers([False] * num_layers, num_kv_heads, window, "all-swa")


def interleaved(num_layers: int, num_kv_heads: int, window: int, ratio: int) -> Allocation:
    """`ratio` sliding-window layers before each full one.

    A ratio of 3 gives S S S F S S S F ... with S for sliding window and F for full. Raises
    InputError where the ratio is below 1 or leaves no layer full.
    """
    if ratio < 1:
        raise InputError(f"ratio={ratio} of the interleaved rule must be at least 1")
    if ratio >= num_layers:
        problem = f"ratio={ratio} of the interleaved rule leaves none of {num_layers} layers full"
        raise InputError(f"{problem}; use less, or all-swa")
    full = [layer % (ratio + 1) == ratio for layer in range(num_layers)]
    return _layers(full, num_kv_heads, window, f"interleaved {ratio}:1")


def head_share(
    num_layers: int,
    num_kv_heads: int,
    window: int,
    sparsity: float,
    seed: int | None = None,
) -> Allocation:
    """The same share of sliding-window heads in every layer.

    Without a seed, the first KV heads of each layer stay full. With a seed, the full heads of each
    layer are drawn at random. Keeping the first heads is a lottery: the index of a head says
    nothing about its worth, so any head may be the one that matters. Compare with several seeds.
    """
    constraint = Constraint(num_layers, num_kv_heads, sparsity, *OWN_UNITS["head-share"])
    if seed is not None:
        return _drawn(constraint, window, seed, "head-share")
    row = [head < constraint.full for head in range(num_kv_heads)]
    return Allocation.from_heads([row] * num_layers, constraint, window, {"rule": "head-share"})


def bottom_swa(num_layers: int, num_kv_heads: int, window: int, sparsity: float) -> Allocation:
    """Sliding-window layers at the bottom of the stack, full layers above."""
    constraint = Constraint(num_layers, num_kv_heads, sparsity, *OWN_UNITS["bottom-swa"])
    full = [layer >= constraint.windowed for layer in range(num_layers)]
    return _by_layers(full, constraint, window, "bottom-swa")


def middle(num_layers: int, num_kv_heads: int, window: int, sparsity: float) -> Allocation:
    """Full layers in the middle of the stack, sliding-window layers below and above.

    The bottom gets one layer more than the top where their number is odd.
    """
    constraint = Constraint(num_layers, num_kv_heads, sparsity, *OWN_UNITS["middle"])
    above = constraint.windowed // 2
    below = constraint.windowed - above
    full = [below <= layer < num_layers - above for layer in range(num_layers)]
    return _by_layers(full, constraint, window, "middle")


def random(constraint: Constraint, window: int, seed: int) -> Allocation:
    """Full units drawn by a seed.

    Their number is that of the constraint, and all units are equally likely.
    """
    return _drawn(constraint, window, seed, "random")


def build(
    rule: str,
    num_layers: int,
    num_kv_heads: int,
    window: int,
    *,
    sparsity: float = 0.5,
    granularity: Granularity = "kv_head",
    scope: Scope = "global",
    floor: int = 0,
    ratio: int = 3,
    seed: int | None = None,
) -> Allocation:
    """Builds the allocation of a rule by its name.

    sparsity: used by the rules in WITH_SPARSITY.
    granularity, scope, floor: used by random.
    ratio: used by interleaved.
    seed: required by random and optional for head-share.

    Raises InputError for an unknown rule, or where the rule has no allocation.
    """
    match rule:
        case "dense":
            return dense(num_layers, num_kv_heads, window)
        case "all-swa":
            return all_swa(num_layers, num_kv_heads, window)
        case "interleaved":
            return interleaved(num_layers, num_kv_heads, window, ratio)
        case "head-share":
            return head_share(num_layers, num_kv_heads, window, sparsity, seed)
        case "bottom-swa":
            return bottom_swa(num_layers, num_kv_heads, window, sparsity)
        case "middle":
            return middle(num_layers, num_kv_heads, window, sparsity)
        case "random":
            if seed is None:
                raise InputError("rule random needs a seed; give one, for example --seed 0")
            constraint = Constraint(num_layers, num_kv_heads, sparsity, granularity, scope, floor)
            return random(constraint, window, seed)
    raise InputError(f"rule {rule!r} is unknown; choose one of {', '.join(RULES)}")


def _layers(full: list[bool], num_kv_heads: int, window: int, rule: str) -> Allocation:
    """An allocation by layers. full: one boolean per layer."""
    sparsity = 1 - sum(full) / len(full)
    constraint = Constraint(len(full), num_kv_heads, sparsity, "layer", "global")
    return _by_layers(full, constraint, window, rule)


def _by_layers(full: Sequence[bool], constraint: Constraint, window: int, rule: str) -> Allocation:
    """An allocation by layers. full: one boolean per layer."""
    rows = [[of_layer] * constraint.num_kv_heads for of_layer in full]
    return Allocation.from_heads(rows, constraint, window, {"rule": rule})


def _drawn(constraint: Constraint, window: int, seed: int, rule: str) -> Allocation:
    """An allocation whose full units are drawn by a seed."""
    origin = {"rule": rule, "seed": seed}
    return Allocation.from_scores(_random_scores(constraint, seed), constraint, window, origin)


def _random_scores(constraint: Constraint, seed: int) -> Tensor:
    """A random score for each unit, (layers, units per layer) fp64 on the CPU.

    A seed gives the same scores on every machine.
    """
    import torch  # Only these two rules need it.

    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(constraint.shape, dtype=torch.float64, generator=generator)
