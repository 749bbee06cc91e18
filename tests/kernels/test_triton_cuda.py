"""The Triton kernels on a GPU in fp32, fp16 and bf16, against the fp64 reference.

Every run allocates memory full of NaN (attention_cases.poisoned_memory). Most cases share their head dimension, group size and
precision, since each new combination is compiled anew; the head dimensions are compiled side by side, in processes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import attention_properties as properties
import pytest
import torch
from attention_cases import (
    BLOCK_EDGES,
    FULL,
    HEAD_DIMS,
    Case,
    Inputs,
    assert_same_bits,
    check,
    draw,
    errors,
    random_documents,
    random_gate,
    run,
)
from attention_properties import LAYOUTS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention.triton.operators import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DIM = 128

every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=list(NAMES.values()))
widest_and_narrowest = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"]
)


def check_on_gpu(case: Case, dtype: torch.dtype) -> None:
    check(attention, draw(case, "cuda", dtype), TOLERANCES[dtype])


@every_dtype
@pytest.mark.parametrize("length", [1, 7, 63, 65, 1000, 8191])
@pytest.mark.parametrize("mode", ["allocated", "gated and packed"])
def test_lengths(mode: str, length: int, dtype: torch.dtype) -> None:
    # At 8191 tokens the reference holds half a GiB for each matrix of scores.
    batch = 1 if length == 8191 else 2
    gate, documents = (
        ((0.001, 0.85), random_documents(length, batch)) if mode != "allocated" else (None, None)
    )
    check_on_gpu(Case(length, (100, FULL), gate, documents, batch, group=2, dim=DIM), dtype)


@pytest.mark.parametrize("length", [1, 65, 1000, 8191])
@pytest.mark.parametrize("mode", ["gated", "packed"])
def test_lengths_of_gated_and_of_packed(mode: str, length: int) -> None:
    gate, documents = (
        ((0.6, 0.001), None) if mode == "gated" else (None, random_documents(length, batch=1))
    )
    check_on_gpu(Case(length, (100, FULL), gate, documents, group=2, dim=DIM), torch.bfloat16)


@widest_and_narrowest
@pytest.mark.parametrize("gate", [None, (0.3, 0.6)], ids=["allocated", "gated"])
@pytest.mark.parametrize("window", [1, 2, *BLOCK_EDGES, 255, 256, 257, 299, 300, 301, FULL])
def test_windows(window: int, gate: tuple[float, ...] | None, dtype: torch.dtype) -> None:
    check_on_gpu(Case(300, (window, 90), gate, batch=2, group=2, dim=DIM), dtype)


@pytest.mark.parametrize("gate", [None, (0.3, 0.0, 0.9, 1.0, 0.5)], ids=["allocated", "gated"])
def test_each_head_has_its_window(gate: tuple[float, ...] | None) -> None:
    check_on_gpu(Case(300, (FULL, 1, 33, 299, 8), gate, batch=2, group=2, dim=DIM), torch.bfloat16)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_group_sizes(group: int) -> None:
    check_on_gpu(
        Case(
            200,
            (70, FULL),
            (0.3, 0.8),
            random_documents(200, batch=2),
            batch=2,
            group=group,
            dim=DIM,
        ),
        torch.bfloat16,
    )


@widest_and_narrowest
@pytest.mark.parametrize(
    "gate",
    [
        (0.0, 0.0),
        (1.0, 1.0),
        (0.001, 0.001),
        (0.999, 0.999),
        (1.0, 0.0),
        ((0.0, 1.0), (0.5, 0.001)),
        random_gate(2, 2),
    ],
    ids=["zeros", "ones", "small", "large", "mixed", "per sequence", "random"],
)
def test_gates(gate: tuple[float, ...], dtype: torch.dtype) -> None:
    check_on_gpu(Case(300, (70, 129), gate, batch=2, group=2, dim=DIM), dtype)


@widest_and_narrowest
@pytest.mark.parametrize("gate", [None, (0.4, 1.0)], ids=["allocated", "gated"])
@pytest.mark.parametrize(
    "documents",
    [
        ((1,) * 500, (1,) * 500),
        ((500,), (500,)),
        ((128, 128, 244), (127, 129, 1, 243)),
        ((1, 498, 1), (256, 244)),
        random_documents(500, batch=2),
    ],
    ids=["one token each", "one document", "at block edges", "short at the ends", "random"],
)
def test_documents(
    documents: tuple[tuple[int, ...], ...], gate: tuple[float, ...] | None, dtype: torch.dtype
) -> None:
    check_on_gpu(Case(500, (70, FULL), gate, documents, batch=2, group=2, dim=DIM), dtype)


def measure(case: Case, dtype: torch.dtype) -> dict[str, float]:
    inputs = draw(case, "cuda", dtype)
    return errors(run(attention, inputs), inputs)


DimKey = tuple[int, torch.dtype, bool]


@pytest.fixture(scope="module")
def errors_by_dim() -> dict[DimKey, Future[dict[str, float]]]:
    """Errors for each (head dimension, precision, gated)."""
    pool = ProcessPoolExecutor(8, mp_context=get_context("spawn"))
    futures = {
        (dim, dtype, gated): pool.submit(
            measure,
            Case(
                65,
                (20, FULL),
                (0.3, 0.001) if gated else None,
                ((30, 35),) * 2,
                batch=2,
                group=2,
                dim=dim,
            ),
            dtype,
        )
        for dim in HEAD_DIMS
        for dtype in TOLERANCES
        for gated in (False, True)
    }
    pool.shutdown(
        wait=False
    )  # the processes end, and free the GPU's memory, when the last of these is done
    return futures


@pytest.mark.parametrize("gated", [False, True], ids=["allocated", "gated"])
@every_dtype
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(
    errors_by_dim: dict[DimKey, Future[dict[str, float]]], dim: int, dtype: torch.dtype, gated: bool
) -> None:
    measured = errors_by_dim[dim, dtype, gated].result()
    assert all(error <= TOLERANCES[dtype] for error in measured.values()), measured


@widest_and_narrowest
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    inputs = draw(
        Case(137, (60, FULL), (0.3, 1.0), ((37, 100), (137,)), batch=2, group=2, dim=DIM),
        "cuda",
        dtype,
    )
    check(attention, inputs.map(LAYOUTS[layout]), TOLERANCES[dtype])


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "tokens", "heads"])
def test_strides_beyond_2_31_elements(axis: int) -> None:
    """The last sequence, token or head starts 2^31 elements or more behind the first."""

    def far(x: Tensor) -> Tensor:
        strides = list(x.stride())
        strides[axis] = math.ceil(2**31 / (x.shape[axis] - 1) / 8) * 8
        buffer = x.new_empty(
            1 + sum(stride * (extent - 1) for stride, extent in zip(strides, x.shape, strict=True))
        )
        return buffer.as_strided(x.shape, strides).copy_(x)

    inputs = draw(
        Case(65, (20, FULL), (0.3, 0.8), ((30, 35),) * 2, batch=2, group=2, dim=DIM),
        "cuda",
        torch.bfloat16,
    )
    check(attention, inputs.map(far), TOLERANCES[torch.bfloat16])


def test_more_than_2_31_elements() -> None:
    """Every tensor has more. Short documents keep it quick: the truth of a head is that of a batch of documents."""
    length, heads, document = 2**18, 66, 128
    assert length * heads * DIM > 2**31

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    torch.manual_seed(0)
    shape = (1, length, heads, DIM)
    inputs = Inputs(
        q=normal(*shape),
        k=normal(*shape),
        v=normal(*shape),
        upstream=normal(1, heads, length, DIM).transpose(1, 2),
        windows=(20,) * heads,
        gate=torch.full((heads,), 0.3, device="cuda"),
        documents=(torch.arange(length, device="cuda", dtype=torch.int32) // document)[None],
        scale=DIM**-0.5,
    )
    results = run(attention, inputs)
    for head in (0, heads // 2, heads - 1):

        def of_head(x: Tensor, head: int = head) -> Tensor:
            return x[0, :, head].reshape(length // document, document, 1, DIM)

        only = slice(head, head + 1)
        part = replace(inputs.map(of_head), windows=(20,), gate=inputs.gate[only], documents=None)  # type: ignore[index]
        part_results = {
            name: x[only] if name == "gate" else of_head(x) for name, x in results.items()
        }
        measured = errors(part_results, part)
        assert all(error <= TOLERANCES[torch.bfloat16] for error in measured.values()), measured


def test_more_rows_than_a_grid_axis_holds() -> None:
    batch, heads = 16_400, 4
    assert batch * heads > 65_535
    check_on_gpu(Case(2, (1, 2), (0.3, 0.8), batch=batch, group=2, dim=DIM), torch.bfloat16)


def test_heads_beyond_the_cache() -> None:
    """Worked off in sections of heads and sequences, the last of them smaller."""
    check_on_gpu(
        Case(
            1000,
            (FULL, 9, 300, 70, FULL, 1, 128, 500),
            random_gate(9, 8),
            batch=9,
            group=2,
            dim=DIM,
        ),
        torch.bfloat16,
    )


def test_three_runs_give_the_same_bits() -> None:
    """At a size that fills the GPU, where programs finish in another order each time."""
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
    windows: tuple[int, ...],
    gate: Tensor | None,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    torch.compiler.reset()
    function = torch.compile(hybrid_attention, fullgraph=True)
    return function(
        q, k, v, window=windows, gate=gate, documents=documents, scale=scale, backend="triton"
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
    """Forward and backward, replayed on new values: nothing waits for the GPU, and nothing is kept from the capture."""
    inputs, fresh = (
        draw(replace(FULL_FEATURED, seed=seed), "cuda", torch.bfloat16) for seed in (0, 1)
    )
    leaves = [
        x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.gate) if x is not None
    ]

    def step() -> tuple[Tensor, ...]:
        gate = leaves[3].expand(inputs.q.shape[0], -1)
        out = attention(
            leaves[0], leaves[1], leaves[2], inputs.windows, gate, inputs.documents, inputs.scale
        )
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
