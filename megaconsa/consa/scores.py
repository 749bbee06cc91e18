"""Scores of units on frozen weights: what the baselines of docs/baselines.md are made of.

A score says how much a unit is worth as a full one. `Constraint.top_k` turns scores into a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaconsa.consa.allocation import FULL_WINDOW

CHUNK_BYTES = 2**28
"""Attention probabilities held at a time."""


class UnitSelector:
    """Tells layers the kind of their heads, and can be switched between two forward passes.

    units: either a table, (layers, units per layer) booleans on the CPU, where True is full;
    or fp32 gates in (0, 1) of the same shape, or (B, layers, units per layer) with gates of
    their own for every sequence.
    """

    def __init__(self, units: Tensor, window: int, num_kv_heads: int) -> None:
        self.units = units
        self.window = window
        self.num_kv_heads = num_kv_heads

    def select(self, layer: int, sequences: Tensor) -> tuple[int | tuple[int, ...], Tensor | None]:
        """Windows and gates of `layer`, as megaconsa.model.attention.HeadSelector asks."""
        units = self.units[..., layer, :]
        heads = units.expand(*units.shape[:-1], self.num_kv_heads)
        if heads.dtype == torch.bool:
            windows = tuple(FULL_WINDOW if full else self.window for full in heads.tolist())
            return windows, None
        return self.window, heads


@dataclass(frozen=True)
class Estimate:
    """Scores and their standard errors, (layers, units per layer) fp64 each."""

    scores: Tensor
    standard_errors: Tensor


def estimate(sums: Tensor, counts: Tensor) -> Estimate:
    """Means per token, over sequences that were drawn independently.

    sums: (sequences, layers, units per layer), each sequence's sum over its tokens.
    counts: (sequences,), its number of tokens.

    Tokens of a sequence depend on one another, so sequences are the sample. The mean is
    m = sum(s) / sum(n), with the variance N / (N - 1) * sum((s - m n)^2) / sum(n)^2 of cluster
    sampling (Cochran, Sampling Techniques, 1977, chapter 6). Standard errors are NaN unless two
    sequences have tokens.
    """
    measured = counts > 0
    sums = sums[measured].double()
    counts = counts[measured].double()
    number = len(counts)
    total = counts.sum()
    mean = sums.sum(dim=0) / total
    residuals = sums - mean * counts[:, None, None]
    correction = number / (number - 1) if number > 1 else torch.nan
    variance = correction * residuals.square().sum(dim=0) / total.square()
    return Estimate(mean, variance.sqrt())


def mass_outside_window(q: Tensor, k: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attention probability on keys that a window would hide, summed over queries with such keys.

    q: (B, S, heads, D) and k: (B, S, kv_heads, D), as attention takes them; its scale is
    1 / sqrt(D). starts: (B, S) integers, the index at which each position's document begins. A
    query sees the keys from there up to itself.

    Returns the sums, (B, kv_heads) fp64, where a KV head's is the mean over its query heads, and
    the number of those queries, (B,). The softmax is exact and in fp32. Queries are taken in
    chunks, so that memory holds about CHUNK_BYTES of probabilities whatever S is.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, heads // kv_heads))
    keys = k.float()
    positions = torch.arange(length, device=q.device)
    sums = torch.zeros(batch, kv_heads, dtype=torch.float64, device=q.device)
    rows = max(1, CHUNK_BYTES // (4 * batch * heads * length))
    for begin in range(0, length, rows):
        # No query of the chunk sees a key after the chunk's own end.
        end = min(begin + rows, length)
        at = positions[begin:end, None]
        past = positions[None, :end]
        visible = (past <= at) & (past >= starts[:, begin:end, None])  # (B, rows, keys)
        queries = grouped[:, begin:end].float() * dim**-0.5
        scores = torch.einsum("bqhgd,bkhd->bhgqk", queries, keys[:, :end])
        scores.masked_fill_(~visible[:, None, None], -torch.inf)
        probabilities = scores.softmax(dim=-1)
        outside = past <= at - window
        mass = (probabilities * outside).sum(dim=-1)  # (B, kv_heads, group, rows)
        sums += mass.double().mean(dim=2).sum(dim=-1)
    counts = (positions - starts >= window).sum(dim=1)
    return sums, counts
