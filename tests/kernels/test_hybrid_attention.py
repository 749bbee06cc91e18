"""Hybrid attention on a CPU.

The reference is compared with loops over queries and keys. The other backend is compared with the
reference.
All comparisons are in fp64, where two correct implementations agree up to rounding and a key too
many shows. The gradient of a gate at exactly 0 or 1 must be 0, the derivative of the clamp.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels import hybrid_attention

LENGTH = 9
FAST = ["sdpa"]
EVERY = ["reference", "sdpa"]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def qkv(
    batch: int, length: int, kv_heads: int, group: int, dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws q, k and v. Queries and keys are large enough to make attention uneven."""
    q = 2 * draw((batch, length, kv_heads * group, dim), seed)
    return (
        q,
        2 * draw((batch, length, kv_heads, dim), seed + 1),
        draw((batch, length, kv_heads, dim), seed + 2),
    )


def documents_of(*lengths: list[int]) -> Tensor:
    """Makes document ids from the lengths of the documents of each row.

    The id of a document is the index where it starts, as in the loader.
    """
    rows = [
        [start for start, stop in pairwise(boundaries(row)) for _ in range(stop - start)]
        for row in lengths
    ]
    return torch.tensor(rows, dtype=torch.int32)


def boundaries(lengths: list[int]) -> list[int]:
    return [sum(lengths[:count]) for count in range(len(lengths) + 1)]


def brute_force(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: tuple[int, ...],
    gate: Tensor | None,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    """Computes one query of one head at a time, over a list of the keys that it sees."""
    group = q.shape[2] // k.shape[2]

    def attend(row: int, head: int, query: int, window: int) -> Tensor:
        keys = [
            key
            for key in range(query + 1)
            if query - key < window
            and (documents is None or documents[row, key] == documents[row, query])
        ]
        scores = torch.stack(
            [q[row, query, head] @ k[row, key, head // group] * scale for key in keys]
        )
        weights = scores.exp() / scores.exp().sum()
        return sum(
            (weights[i] * v[row, key, head // group] for i, key in enumerate(keys)), torch.zeros(())
        )

    def output(row: int, head: int, query: int) -> Tensor:
        windowed = attend(row, head, query, windows[head // group])
        if gate is None:
            return windowed
        z = gate.expand(q.shape[0], -1)[row, head // group]
        return z * attend(row, head, query, len(q[row])) + (1 - z) * windowed

    heads = [
        [[output(b, h, i) for h in range(q.shape[2])] for i in range(q.shape[1])]
        for b in range(q.shape[0])
    ]
    return torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in heads])


def check_equal(
    backend: str,
    expected_by: str,
    inputs: tuple[Tensor, ...],
    gate: Tensor | None,
    **arguments: object,
) -> None:
    """Compares the output and the gradients of q, k, v and the gates."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, *([] if gate is None else [gate]))]
    out_gradient = draw(tuple(inputs[0].shape), 99)

    def run(name: str) -> tuple[Tensor, ...]:
        z = None if gate is None else leaves[3]
        if name == "loops":
            windows = arguments["window"]
            windows = windows if isinstance(windows, tuple) else (windows,) * inputs[1].shape[2]
            documents = arguments.get("documents")
            scale = arguments.get("scale") or inputs[0].shape[-1] ** -0.5
            out = brute_force(*leaves[:3], windows, z, documents, scale)  # type: ignore[arg-type]
        else:
            q, k, v = leaves[:3]
            out = hybrid_attention(q, k, v, gate=z, backend=name, **arguments)
        assert out.shape == inputs[0].shape
        return out.detach(), *torch.autograd.grad(out, leaves, out_gradient)

    results = run(backend)
    truths = run(expected_by)
    if gate is not None:
        clamped = (gate <= 0) | (gate >= 1)
        assert not results[-1][clamped].any()
        truths = (*truths[:-1], truths[-1].masked_fill(clamped, 0.0))
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-11)


WINDOWS = [
    1,
    2,
    4,
    LENGTH - 1,
    LENGTH,
    LENGTH + 3,
    FULL_WINDOW,
    (3, FULL_WINDOW),
    (1, 5),
    (FULL_WINDOW, 1),
]
GATES = {
    "none": None,
    "per head": torch.tensor([0.3, 0.85], dtype=torch.float64),
    "per sequence": torch.tensor([[0.02, 0.6], [0.999, 0.4]], dtype=torch.float64),
    "exact": torch.tensor([[0.0, 1.0], [0.5, 0.0]], dtype=torch.float64),
}
PACKINGS = {
    "one": None,
    "random": documents_of([3, 6], [1, 4, 2, 2]),
    "of one token": documents_of([1] * 9, [1, 1, 7]),
}


@pytest.mark.parametrize(
    ("gate", "packing"),
    [
        ("none", "one"),
        ("per head", "one"),
        ("per sequence", "random"),
        ("exact", "of one token"),
        ("none", "random"),
    ],
)
@pytest.mark.parametrize("window", [1, 4, 9, (3, FULL_WINDOW)])
def test_reference_equals_loops(window: int | tuple[int, ...], gate: str, packing: str) -> None:
    inputs = qkv(2, LENGTH, 2, 2, 3)
    check_equal(
        "reference", "loops", inputs, GATES[gate], window=window, documents=PACKINGS[packing]
    )


def test_scale_is_that_of_the_scores() -> None:
    check_equal(
        "reference", "loops", qkv(2, LENGTH, 2, 2, 3), GATES["per head"], window=4, scale=0.3
    )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", FAST)
def test_backends_equal_reference(
    backend: str, window: int | tuple[int, ...], gate: str, packing: str
) -> None:
    inputs = qkv(2, LENGTH, 2, 2, 4)
    check_equal(
        backend, "reference", inputs, GATES[gate], window=window, documents=PACKINGS[packing]
    )


@st.composite
def cases(
    draw_: st.DrawFn,
) -> tuple[tuple[int, ...], int | tuple[int, ...], Tensor | None, Tensor | None, float | None]:
    """Draws a problem.

    Returns (batch, length, KV heads, group, head dimension), window, gate, documents, scale.
    """
    batch = draw_(st.integers(1, 3))
    length = draw_(st.integers(1, 19))
    kv_heads = draw_(st.integers(1, 4))
    group = draw_(st.integers(1, 4))
    dim = draw_(st.integers(1, 9))
    width = st.integers(1, length + 2)
    window = draw_(st.one_of(width, st.tuples(*[width] * kv_heads)))
    z = st.sampled_from([0.0, 0.01, 0.5, 0.97, 1.0])
    heads = st.lists(z, min_size=kv_heads, max_size=kv_heads)
    gate = draw_(st.one_of(st.none(), heads, st.lists(heads, min_size=batch, max_size=batch)))
    starts = st.lists(st.booleans(), min_size=length, max_size=length)
    rows = draw_(st.one_of(st.none(), st.lists(starts, min_size=batch, max_size=batch)))
    documents = None if rows is None else torch.tensor(rows).cumsum(1).to(torch.int32)
    gates = None if gate is None else torch.tensor(gate, dtype=torch.float64)
    return (
        (batch, length, kv_heads, group, dim),
        window,
        gates,
        documents,
        draw_(st.sampled_from([None, 0.7])),
    )


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases())
def test_backends_equal_reference_for_any_shape(
    backend: str,
    case: tuple[tuple[int, ...], int | tuple[int, ...], Tensor | None, Tensor | None, float | None],
) -> None:
    shape, window, gate, documents, scale = case
    check_equal(
        backend, "reference", qkv(*shape), gate, window=window, documents=documents, scale=scale
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("window", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("backend", EVERY)
def test_exactly_the_visible_keys_weigh(
    backend: str, window: int, gate: float | None, packed: bool
) -> None:
    """Key i - W + 1 has weight and key i - W has exactly none.

    The values are the identity matrix, so the output is the attention matrix.
    """
    length = 13
    q, k, _ = qkv(1, length, 1, 1, length, seed=5)
    k /= 4  # so that no weight underflows
    documents = documents_of([4, 1, 8]) if packed else None
    identity = torch.eye(length, dtype=torch.float64)[None, :, None]
    out = hybrid_attention(
        q,
        k,
        identity,
        window=window,
        gate=None if gate is None else torch.tensor([gate], dtype=torch.float64),
        documents=documents,
        backend=backend,
    )
    for query in range(length):
        first = query - window + 1 if not gate else 0
        start = int(documents[0, query]) if documents is not None else 0
        assert out[0, query, 0].nonzero().flatten().tolist() == list(
            range(max(first, start, 0), query + 1)
        )
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("documents", [None, documents_of([5, 1, 11], [17])], ids=["one", "packed"])
@pytest.mark.parametrize("backend", EVERY)
def test_binarised_gates_equal_the_allocated_table(backend: str, documents: Tensor | None) -> None:
    """Invariant 4: z of 0 or 1 with one window equals a window for each head."""
    table = [True, False, False, True]
    gate = torch.tensor(table, dtype=torch.float64)
    windows = tuple(FULL_WINDOW if full else 5 for full in table)
    leaves = [x.requires_grad_() for x in qkv(2, 17, 4, 2, 4)]
    results = []
    for window, z in ((5, gate), (windows, None)):
        out = hybrid_attention(*leaves, window=window, gate=z, documents=documents, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, draw(tuple(out.shape), 3))))
    for gated, allocated in zip(*results, strict=True):
        torch.testing.assert_close(gated, allocated, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "gate", [None, torch.tensor([0.4, 1.0], dtype=torch.float64)], ids=["allocated", "gated"]
)
@pytest.mark.parametrize("backend", EVERY)
def test_another_document_changes_nothing(backend: str, gate: Tensor | None) -> None:
    """The results are bitwise equal.

    Tokens before and after a document do not reach it, in the forward pass or in the backward pass.
    """
    documents = documents_of([4, 6, 5])
    own = slice(4, 10)
    results = []
    for seed in (0, 50):
        mine = qkv(1, 15, 2, 2, 4, seed=7)
        other = qkv(1, 15, 2, 2, 4, seed=seed)
        for x, y in zip(mine, other, strict=True):
            x[:, :4] = 30 * y[:, :4]
            x[:, 10:] = 30 * y[:, 10:]
            x.requires_grad_()
        out = hybrid_attention(
            *mine, window=(3, FULL_WINDOW), gate=gate, documents=documents, backend=backend
        )
        gradients = torch.autograd.grad(out[:, own].square().sum(), mine)
        results.append((out.detach()[:, own], *(gradient[:, own] for gradient in gradients)))
        for gradient in gradients:
            assert not gradient[:, :4].any()
            assert not gradient[:, 10:].any()
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("backend", EVERY)
def test_a_window_may_be_a_number_a_sequence_or_a_tensor(backend: str) -> None:
    inputs = qkv(1, 8, 2, 1, 4)

    def run(window: int | list[int] | tuple[int, ...] | Tensor) -> Tensor:
        return hybrid_attention(*inputs, window=window, backend=backend)

    assert torch.equal(run(3), run((3, 3)))
    for same in ([3, FULL_WINDOW], torch.tensor([3, FULL_WINDOW], dtype=torch.int32)):
        assert torch.equal(run((3, FULL_WINDOW)), run(same))
    assert torch.equal(run((8, FULL_WINDOW)), run(FULL_WINDOW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", EVERY)
def test_output_has_the_precision_of_q(backend: str, dtype: torch.dtype) -> None:
    """Gates and their gradients are fp32 for every precision of the model."""
    rounded = [x.to(dtype) for x in qkv(2, 33, 2, 2, 8)]
    gate = torch.tensor([[0.3, 0.7], [0.0, 1.0]], requires_grad=True)
    out = hybrid_attention(*rounded, window=7, gate=gate, backend=backend)
    assert out.dtype == dtype
    assert torch.autograd.grad(out.float().sum(), gate)[0].dtype == torch.float32
    exact = hybrid_attention(
        *(x.double() for x in rounded), window=7, gate=gate.double(), backend="reference"
    )
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert float(error.detach()) < (1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("gated", [False, True], ids=["allocated", "gated"])
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("earlier_keys", [1, 4, 8])
def test_fewer_queries_than_keys_are_the_last_ones(
    backend: str, gated: bool, packed: bool, earlier_keys: int
) -> None:
    q, k, v = qkv(2, LENGTH, 2, 2, 4)
    gate = torch.tensor([0.25, 0.75], dtype=torch.float64) if gated else None
    settings = {
        "window": (3, FULL_WINDOW),
        "gate": gate,
        "documents": documents_of([4, 5], [1, 8]) if packed else None,
        "backend": backend,
    }
    whole = hybrid_attention(q, k, v, **settings)
    part = hybrid_attention(q[:, earlier_keys:], k, v, **settings)
    torch.testing.assert_close(part, whole[:, earlier_keys:], rtol=1e-12, atol=1e-12)
