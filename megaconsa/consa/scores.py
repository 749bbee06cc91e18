"""Scores of units on frozen weights, for the baselines of docs/baselines.md.

A score says how much a unit is worth as a full one. `Constraint.top_k` turns scores into a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels.attention.head_pattern import HeadPattern

CHUNK_BYTES = 2**28
"""Bytes of attention probabilities in memory at a time."""


class UnitSelector:
    """Tells layers the kind of their heads.

    `units` can be replaced between two forward passes. It is one of

    - a table: (layers, units per layer) booleans on the CPU, where True is full
    - gates that all sequences share: fp32 in (0, 1), (layers, units per layer)
    - gates for every sequence: fp32 in (0, 1), (B, layers, units per layer)
    """

    def __init__(self, units: Tensor, window: int, num_kv_heads: int) -> None:
        self.units = units
        self.window = window
        self.num_kv_heads = num_kv_heads

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        """Windows and gates of `layer`, as HeadSelector requires."""
        units = self.units[..., layer, :]
        heads = units.expand(*units.shape[:-1], self.num_kv_heads)
        if heads.dtype == torch.bool:
            windows = tuple(FULL_WINDOW if full else self.window for full in heads.tolist())
            return HeadPattern(windows)
        return HeadPattern((self.window,) * self.num_kv_heads, heads)


@dataclass(frozen=True)
class Estimate:
    """Scores and their standard errors, each (layers, units per layer) fp64."""

    scores: Tensor
    standard_errors: Tensor


def estimate(sums: Tensor, counts: Tensor) -> Estimate:
    """Means per token and their standard errors.

    sums: (sequences, layers, units per layer), each sequence's sum over its tokens.
    counts: (sequences,), each sequence's number of tokens.

    Sequences must be drawn independently. They are the sample, because the tokens of a sequence
    depend on one another. The mean of N sequences with sums s and counts n is

        m = sum(s) / sum(n)

    Its variance is that of cluster sampling (Cochran, Sampling Techniques, 1977, chapter 6):

        N / (N - 1) * sum((s - m n)^2) / sum(n)^2

    Standard errors are NaN where fewer than two sequences have tokens.
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

    q: (B, S, heads, D), as attention takes it. The scale is 1 / sqrt(D).
    k: (B, S, kv_heads, D), as attention takes it.
    starts: (B, S) integers, the index at which each position's document begins. A query sees the
        keys from there up to itself.
    window: number of keys that a windowed query sees, its own included.

    Returns the sums, (B, kv_heads) fp64, and the number of those queries, (B,). The sum of a KV
    head is the mean over its query heads. The softmax is exact and in fp32. Queries are processed
    in chunks, so memory holds about CHUNK_BYTES of probabilities for any S.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, heads // kv_heads))
    keys = k.float()
    positions = torch.arange(length, device=q.device)
    sums = torch.zeros(batch, kv_heads, dtype=torch.float64, device=q.device)
    # Queries of a chunk. Each costs 4 bytes per sequence, head and key.
    rows = max(1, CHUNK_BYTES // (4 * batch * heads * length))
    for begin in range(0, length, rows):
        # No query of the chunk sees a key after the end of the chunk.
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
