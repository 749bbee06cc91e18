"""The right result of a case at any length: the reference's formula in fp64, a block of queries at a time.

`reference` holds every score of every head at once, which no GPU can at the lengths that are timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaconsa.benchmarks.attention.cases import Inputs

BLOCK = 1024

Results = dict[str, Tensor]
"""By name: out and dq (B, S, heads, D), dk and dv (B, S, kv_heads, D), and with gates dz (kv_heads,)."""


def truth(inputs: Inputs) -> Results:
    """Output and gradients, in fp64."""
    wide = [
        torch.zeros_like(x, dtype=torch.float64) for x in (inputs.q, inputs.q, inputs.k, inputs.v)
    ]
    results = dict(zip(("out", "dq", "dk", "dv"), wide, strict=True))
    if inputs.gate is not None:
        results["dz"] = torch.zeros_like(inputs.gate, dtype=torch.float64)
    for row in range(inputs.shape.batch):
        for head in range(inputs.shape.kv_heads):
            for start in range(0, inputs.shape.length, BLOCK):
                _add_block(results, inputs, row, head, start)
    return results


def _add_block(results: Results, inputs: Inputs, row: int, head: int, start: int) -> None:
    """What queries `start` and the following of one KV head's group give: their output and dq, and their part of dk, dv and dz."""
    shape = inputs.shape
    stop = min(start + BLOCK, shape.length)
    queries, group = slice(start, stop), slice(head * shape.group, (head + 1) * shape.group)
    q, gradient = (
        x[row, queries, group].transpose(0, 1).double() for x in (inputs.q, inputs.gradient)
    )
    k, v = (x[row, :stop, head].double().requires_grad_() for x in (inputs.k, inputs.v))
    q.requires_grad_()
    leaves = {"dq": q, "dk": k, "dv": v}
    index = torch.arange(stop, device=shape.device)
    distance = index[queries, None] - index
    scores = q @ k.T * shape.scale  # (group, queries, keys)

    def attend(window: int) -> Tensor:
        return (
            scores.masked_fill((distance < 0) | (distance >= window), float("-inf")).softmax(dim=-1)
            @ v
        )

    out = attend(inputs.case.windows[head])
    if inputs.gate is not None:
        leaves["dz"] = z = inputs.gate[head].double().requires_grad_()
        out = z * attend(shape.length) + (1 - z) * out
    gradients = dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), gradient), strict=True)
    )
    results["out"][row, queries, group] = out.detach().transpose(0, 1)
    results["dq"][row, queries, group] = gradients["dq"].transpose(0, 1)
    results["dk"][row, :stop, head] += gradients["dk"]
    results["dv"][row, :stop, head] += gradients["dv"]
    if inputs.gate is not None:
        results["dz"][head] += gradients["dz"]
