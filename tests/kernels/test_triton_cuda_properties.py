"""Properties of the Triton kernels on a GPU: equal bits, isolation, compiling and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.triton.operators import attention
from tests.support import attention_properties as properties
from tests.support.attention_cases import (
    FULL,
    Case,
    assert_same_bits,
    check,
    draw,
    random_documents,
    random_gate,
    run,
)
from tests.support.cuda_cases import DIM, TOLERANCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_three_runs_give_the_same_bits() -> None:
    """The size fills the GPU, so programs finish in a different order each time."""
    case = Case(
        4096,
        (512, FULL) * 4,
        random_gate(2, 8),
        random_documents(4096, batch=2),
        batch=2,
        group=2,
        dim=DIM,
    )
    for each in (case, replace(case, documents=None), replace(case, gate=None, documents=None)):
        inputs = draw(each, "cuda", torch.bfloat16)
        first = run(attention, inputs)
        for _ in range(2):
            assert_same_bits(first, run(attention, inputs))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 127, 128])
@pytest.mark.parametrize("gate", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("documents", [None, ((50, 1, 77),)], ids=["single", "packed"])
def test_exactly_the_visible_keys_weigh(
    window: int, gate: float | None, documents: tuple[tuple[int, ...], ...] | None
) -> None:
    inputs = draw(
        Case(DIM, (window,), None if gate is None else (gate,), documents, dim=DIM),
        "cuda",
        torch.bfloat16,
    )
    properties.exactly_the_visible_keys_weigh(attention, inputs)


@pytest.mark.parametrize(
    "case",
    [
        Case(1500, (16,), dim=DIM),
        Case(1500, (16,), gate=(0.0,), dim=DIM),
        Case(1500, (FULL,), documents=((750, 750),), dim=DIM),
        Case(1500, (16,), gate=(0.5,), documents=((750, 750),), dim=DIM),
    ],
    ids=["window", "gate of 0", "documents", "gated documents"],
)
def test_blocks_that_nobody_sees_are_not_read(case: Case) -> None:
    properties.blocks_that_nobody_sees_are_not_read(
        attention, draw(case, "cuda", torch.bfloat16), tokens=400
    )


@pytest.mark.parametrize("gate", [None, ((0.3, 1.0), (0.3, 1.0))], ids=["allocated", "gated"])
def test_other_rows_and_heads_change_nothing(gate: tuple[tuple[float, ...], ...] | None) -> None:
    inputs = draw(Case(300, (70, FULL), gate, batch=2, group=2, dim=DIM), "cuda", torch.bfloat16)
    properties.other_rows_and_heads_change_nothing(attention, inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "upstream"])
def test_what_is_not_finite_stays_visible(name: str, value: float) -> None:
    inputs = draw(Case(300, (70,), (0.4,), dim=DIM), "cuda", torch.bfloat16)
    properties.what_is_not_finite_stays_visible(attention, inputs, name, value)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_upstream_of_any_size(size: float) -> None:
    inputs = draw(Case(300, (70, FULL), (0.3, 0.9), group=2, dim=DIM), "cuda", torch.bfloat16)
    check(attention, properties.uneven_upstream(inputs, size), TOLERANCES[torch.bfloat16])


def test_an_outlier_costs_the_others_nothing() -> None:
    inputs = draw(
        Case(1000, (70, FULL), (0.3, 0.9), ((1, 999),), group=2, dim=DIM), "cuda", torch.bfloat16
    )
    properties.an_outlier_costs_the_others_nothing(
        attention, inputs, key=100, value=10, tolerance=TOLERANCES[torch.bfloat16]
    )


def test_binarised_gates_equal_the_allocated_table() -> None:
    inputs = draw(
        Case(
            500,
            (70,) * 4,
            (1.0, 0.0, 0.0, 1.0),
            random_documents(500, 2),
            batch=2,
            group=2,
            dim=DIM,
        ),
        "cuda",
    )
    properties.binarised_gates_equal_the_allocated_table(attention, inputs)


FULL_FEATURED = Case(
    300, (70, FULL), (0.3, 0.0), random_documents(300, 2), batch=2, group=2, dim=DIM
)


def checkpointed(*arguments: object) -> Tensor:
    return checkpoint(attention, *arguments, use_reentrant=False)


def compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: HeadPattern,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    torch.compiler.reset()
    function = torch.compile(hybrid_attention, fullgraph=True)
    return function(
        q,
        k,
        v,
        window=heads.windows,
        gate=heads.gate,
        documents=documents,
        scale=scale,
        backend="triton",
    )


@pytest.mark.parametrize("wrapped", [checkpointed, compiled])
@pytest.mark.parametrize(
    "case",
    [FULL_FEATURED, replace(FULL_FEATURED, gate=None, documents=None)],
    ids=["gated", "allocated"],
)
def test_checkpointed_and_compiled_give_the_same_bits(
    wrapped: Callable[..., Tensor], case: Case
) -> None:
    inputs = draw(case, "cuda", torch.bfloat16)
    assert_same_bits(run(wrapped, inputs), run(attention, inputs))


def test_captured_in_a_cuda_graph() -> None:
    """A graph of the forward and backward pass is replayed on new values.

    Nothing waits for the GPU, and nothing is kept from the capture.
    """
    inputs, fresh = (
        draw(replace(FULL_FEATURED, seed=seed), "cuda", torch.bfloat16) for seed in (0, 1)
    )
    leaves = [
        x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.gate) if x is not None
    ]

    def step() -> tuple[Tensor, ...]:
        gate = leaves[3].expand(inputs.q.shape[0], -1)
        heads = HeadPattern(inputs.windows, gate)
        out = attention(*leaves[:3], heads, inputs.documents, inputs.scale)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs.upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, value in zip(
            leaves, (fresh.q, fresh.k, fresh.v, torch.tensor([0.0, 0.7])), strict=True
        ):
            leaf.copy_(value)
        inputs.upstream.copy_(fresh.upstream)
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)
