"""The right result of a case at any length, in fp64, computed one block of queries at a time.

It uses the formula of the backend `reference`. That backend stores every score of every head at
once, which does not fit on any GPU at the lengths that are timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaconsa.benchmarks.attention.cases import Inputs
from megaconsa.kernels.attention.gating import without_ends

BLOCK = 1024
"""Queries that are computed at a time."""

Results = dict[str, Tensor]
"""Tensors by name: out and dq (B, S, heads, D), dk and dv (B, S, kv_heads, D).

With gates there is also dz (kv_heads,).
"""


def truth(inputs: Inputs) -> Results:
    """Returns output and gradients, in fp64."""
    results = {
        "out": torch.zeros_like(inputs.q, dtype=torch.float64),
        "dq": torch.zeros_like(inputs.q, dtype=torch.float64),
        "dk": torch.zeros_like(inputs.k, dtype=torch.float64),
        "dv": torch.zeros_like(inputs.v, dtype=torch.float64),
    }
    if inputs.gate is not None:
        results["dz"] = torch.zeros_like(inputs.gate, dtype=torch.float64)
    for row in range(inputs.shape.batch):
        for head in range(inputs.shape.kv_heads):
            for start in range(0, inputs.shape.length, BLOCK):
                _add_block(results, inputs, row, head, start)
    return results


def _add_block(results: Results, inputs: Inputs, row: int, head: int, start: int) -> None:
    """Computes one block of queries of one KV head's group and adds it to `results`.

    row: sequence of the batch. head: KV head. start: first query of the block.

    The block gives its output and dq, and its part of dk, dv and dz.
    """
    shape = inputs.shape
    stop = min(start + BLOCK, shape.length)
    queries = slice(start, stop)
    group = slice(head * shape.group, (head + 1) * shape.group)
    # (group, queries, D)
    q = inputs.q[row, queries, group].transpose(0, 1).double().requires_grad_()
    gradient = inputs.gradient[row, queries, group].transpose(0, 1).double()
    # (keys, D). Later keys are not visible to any of these queries.
    k = inputs.k[row, :stop, head].double().requires_grad_()
    v = inputs.v[row, :stop, head].double().requires_grad_()
    leaves = {"dq": q, "dk": k, "dv": v}
    index = torch.arange(stop, device=shape.device)
    distance = index[queries, None] - index
    unseen = distance < 0
    if inputs.documents is not None:
        documents = inputs.documents[row, :stop]
        unseen = unseen | (documents[queries, None] != documents)
    scores = q @ k.T * shape.scale  # (group, queries, keys)

    def attend(window: int) -> Tensor:
        hidden = unseen | (distance >= window)
        return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v

    out = attend(inputs.case.windows[head])
    if inputs.gate is not None:
        gate = inputs.gate[head].double().requires_grad_()
        leaves["dz"] = gate
        z = without_ends(gate)
        out = z * attend(shape.length) + (1 - z) * out
    found = torch.autograd.grad(out, list(leaves.values()), gradient)
    gradients = dict(zip(leaves, found, strict=True))
    results["out"][row, queries, group] = out.detach().transpose(0, 1)
    results["dq"][row, queries, group] = gradients["dq"].transpose(0, 1)
    results["dk"][row, :stop, head] += gradients["dk"]
    results["dv"][row, :stop, head] += gradients["dv"]
    if inputs.gate is not None:
        results["dz"][head] += gradients["dz"]
