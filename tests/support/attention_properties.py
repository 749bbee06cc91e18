"""Properties of an attention kernel on any device and in any precision.

They hold in addition to being close to the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megaconsa.kernels.attention.head_pattern import HeadPattern
from tests.support.attention_cases import FULL, Attention, Inputs, errors, run


def _inside_nan(x: Tensor, before: int) -> Tensor:
    """Returns x as a view into a buffer of NaN.

    A read beyond the tokens, heads or columns of x would bring in NaN.
    """
    buffer = x.new_full([extent + 2 * before for extent in x.shape], float("nan"))
    return buffer[tuple(slice(before, before + extent) for extent in x.shape)].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns not contiguous": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "inside NaN, aligned": lambda x: _inside_nan(x, 8),
    "inside NaN, not aligned": lambda x: _inside_nan(x, 1),
}
"""The same values in other memory layouts."""


def exactly_the_visible_keys_weigh(attention: Attention, inputs: Inputs) -> None:
    """Checks that key i - W + 1 has weight and key i - W has exactly none.

    The values are the identity matrix, so the output is the attention matrix.

    inputs: one sequence, one head, as many tokens as columns.
    """
    length = inputs.q.shape[1]
    identity = torch.eye(length, device=inputs.q.device, dtype=inputs.q.dtype)[None, :, None]
    gate = None if inputs.gate is None else inputs.gate.expand(1, 1)
    heads = HeadPattern(inputs.windows, gate)
    out = attention(inputs.q, inputs.k, identity, heads, inputs.documents, inputs.scale)
    index = torch.arange(length, device=inputs.q.device)
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0) & (
        distance < (inputs.windows[0] if gate is None or not gate.any() else length)
    )
    if inputs.documents is not None:
        seen &= inputs.documents[0, :, None] == inputs.documents[0, None, :]
    assert torch.equal(out[0, :, 0] > 0, seen)


def blocks_that_nobody_sees_are_not_read(attention: Attention, inputs: Inputs, tokens: int) -> None:
    """Checks that the first and the last tokens never meet in a product.

    NaN would spoil a product even if its weights were masked to 0.

    inputs: the two ends, of `tokens` tokens each, are further apart than a window and two tiles of
        any launch, or are in different documents.
    """
    results = run(attention, inputs)
    ends = (slice(0, tokens), slice(-tokens, None))
    for spoiled, kept in (ends, ends[::-1]):
        broken = inputs.map(Tensor.clone)
        for x in (broken.q, broken.k, broken.v, broken.upstream):
            x[:, spoiled] = float("nan")
        others = run(attention, broken)
        for name in ("out", "k", "v"):
            assert torch.equal(results[name][:, kept], others[name][:, kept])


def other_rows_and_heads_change_nothing(attention: Attention, inputs: Inputs) -> None:
    """Checks bitwise equality, also for the gradient of the gate.

    inputs: two sequences and two KV heads. Gates are per sequence.
    """
    broken = inputs.map(Tensor.clone)
    group = inputs.q.shape[2] // 2
    for x, heads in ((broken.q, group), (broken.k, 1), (broken.v, 1), (broken.upstream, group)):
        x[0, :, heads:] = float("nan")
        x[1] = float("inf")
    results = run(attention, inputs)
    others = run(attention, broken)
    for name, heads in (("out", group), ("q", group), ("k", 1), ("v", 1)):
        assert torch.equal(results[name][0, :, :heads], others[name][0, :, :heads])
    if inputs.gate is not None:
        assert torch.equal(results["gate"][0, 0], others["gate"][0, 0])


def what_is_not_finite_stays_visible(
    attention: Attention, inputs: Inputs, name: str, value: float
) -> None:
    """Checks that a broken step does not give plausible numbers.

    This could happen because dq may be summed as integers, which cannot hold NaN.
    """
    token = inputs.q.shape[1] // 2
    broken = inputs.map(Tensor.clone)
    # An infinite key must get weight. With the other sign, no query would attend to it.
    if name == "k":
        value *= float(broken.q[0, token, 0, 3].sign())
    getattr(broken, name)[0, token, 0, 3] = value
    results = run(attention, broken)
    for result in ("q",) if name == "upstream" else ("q", "out"):
        assert not results[result][0, token].isfinite().all(), result


def an_outlier_costs_the_others_nothing(
    attention: Attention, inputs: Inputs, key: float, value: float, tolerance: float
) -> None:
    """Checks that the tokens beside an outlier keep their precision.

    The first token is a document by itself and gets far larger keys and values.
    """
    broken = inputs.map(Tensor.clone)
    broken.k[:, 0] *= key
    broken.v[:, 0] *= value
    rest = replace(
        broken.map(lambda x: x[:, 1:]),
        documents=None if inputs.documents is None else inputs.documents[:, 1:].contiguous(),
    )
    results = {
        name: x if name == "gate" else x[:, 1:] for name, x in run(attention, broken).items()
    }
    measured = errors(results, rest)
    assert all(error <= tolerance for error in measured.values()), measured


def uneven_upstream(inputs: Inputs, size: float) -> Inputs:
    """Scales the upstream gradients to very different sizes, a third of them to zero.

    dq may be summed in units that depend on these sizes.
    """
    upstream = inputs.upstream * size
    upstream[:, ::3] *= 1e-6
    upstream[:, 1::3] = 0
    return replace(inputs, upstream=upstream)


def binarised_gates_equal_the_allocated_table(attention: Attention, inputs: Inputs) -> None:
    """Checks invariant 4: z of 0 or 1 with one window equals a window for each head.

    inputs: fp32, with a gate (kv_heads,) of zeros and ones.
    """
    assert inputs.gate is not None
    windows = tuple(
        FULL if z else window
        for z, window in zip(inputs.gate.tolist(), inputs.windows, strict=True)
    )
    results = run(attention, inputs)
    assert not results.pop("gate").any()
    for name, other in run(attention, replace(inputs, windows=windows, gate=None)).items():
        torch.testing.assert_close(results[name], other, rtol=1e-6, atol=1e-6)
