"""Allocations that follow a rule instead of being learned: the baselines a learned allocation has to beat."""

from __future__ import annotations

from megaconsa.consa.allocation import Allocation, Scope, check_sparsity
from megaconsa.errors import InputError


def dense(num_layers: int, num_kv_heads: int, window: int) -> Allocation:
    """Full attention everywhere."""
    return _layers([True] * num_layers, num_kv_heads, window, "dense")


def all_swa(num_layers: int, num_kv_heads: int, window: int) -> Allocation:
    """The sliding window everywhere."""
    return _layers([False] * num_layers, num_kv_heads, window, "all-swa")


def interleaved(num_layers: int, num_kv_heads: int, window: int, ratio: int) -> Allocation:
    """`ratio` sliding-window layers before each full one (ratio 3: S S S F S S S F ...)."""
    if ratio < 1:
        raise InputError(f"ratio={ratio} of the interleaved rule must be at least 1")
    if ratio >= num_layers:
        raise InputError(f"ratio={ratio} of the interleaved rule leaves none of {num_layers} layers full; use less, or all-swa")
    return _layers([layer % (ratio + 1) == ratio for layer in range(num_layers)], num_kv_heads, window, f"interleaved {ratio}:1")


def head_share(num_layers: int, num_kv_heads: int, window: int, sparsity: float) -> Allocation:
    """The same share of sliding-window heads in every layer; the first KV heads stay full."""
    windowed = check_sparsity(sparsity, num_layers, num_kv_heads, "kv_head", "per_layer")
    row = tuple(head < num_kv_heads - windowed for head in range(num_kv_heads))
    return Allocation(window, (row,) * num_layers, "kv_head", "per_layer", sparsity, {"rule": "head-share"})


def bottom_swa(num_layers: int, num_kv_heads: int, window: int, sparsity: float) -> Allocation:
    """Sliding-window layers at the bottom of the stack, full ones above."""
    windowed = check_sparsity(sparsity, num_layers, num_kv_heads, "layer", "global")
    return _layers([layer >= windowed for layer in range(num_layers)], num_kv_heads, window, "bottom-swa")


RULES = ("dense", "all-swa", "interleaved", "head-share", "bottom-swa")


def build(rule: str, num_layers: int, num_kv_heads: int, window: int, sparsity: float, ratio: int) -> Allocation:
    """The allocation of a rule by its name; sparsity serves head-share and bottom-swa, ratio interleaved."""
    match rule:
        case "dense":
            return dense(num_layers, num_kv_heads, window)
        case "all-swa":
            return all_swa(num_layers, num_kv_heads, window)
        case "interleaved":
            return interleaved(num_layers, num_kv_heads, window, ratio)
        case "head-share":
            return head_share(num_layers, num_kv_heads, window, sparsity)
        case "bottom-swa":
            return bottom_swa(num_layers, num_kv_heads, window, sparsity)
    raise InputError(f"rule {rule!r} is unknown; choose one of {', '.join(RULES)}")


def _layers(full: list[bool], num_kv_heads: int, window: int, rule: str) -> Allocation:
    scope: Scope = "global"
    sparsity = 1 - sum(full) / len(full)
    return Allocation(window, tuple((x,) * num_kv_heads for x in full), "layer", scope, sparsity, {"rule": rule})
