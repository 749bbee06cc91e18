"""The Triton kernels on a GPU in fp32, fp16 and bf16, compared with the fp64 reference.

Every run allocates memory full of NaN (attention_cases.poisoned_memory). Most cases share their
head dimension, group size and precision, because each new combination is compiled. The head
dimensions are compiled in parallel, in separate processes.
"""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from megaconsa.kernels.attention.triton.operators import attention
from tests.support.attention_cases import (
    BLOCK_EDGES,
    FULL,
    HEAD_DIMS,
    Case,
    check,
    draw,
    errors,
    random_documents,
    random_gate,
    run,
)
from tests.support.attention_properties import LAYOUTS
from tests.support.cuda_cases import (
    DIM,
    TOLERANCES,
    check_on_gpu,
    every_dtype,
    widest_and_narrowest,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@every_dtype
@pytest.mark.parametrize("length", [1, 7, 63, 65, 1000, 8191])
@pytest.mark.parametrize("mode", ["allocated", "gated and packed"])
def test_lengths(mode: str, length: int, dtype: torch.dtype) -> None:
    # At 8191 tokens the reference needs half a GiB for each matrix of scores.
    batch = 1 if length == 8191 else 2
    gate = None
    documents = None
    if mode != "allocated":
        gate = (0.001, 0.85)
        documents = random_documents(length, batch)
    check_on_gpu(Case(length, (100, FULL), gate, documents, batch, group=2, dim=DIM), dtype)


@pytest.mark.parametrize("length", [1, 65, 1000, 8191])
@pytest.mark.parametrize("mode", ["gated", "packed"])
def test_lengths_of_gated_and_of_packed(mode: str, length: int) -> None:
    gate, documents = (
        ((0.6, 0.001), None) if mode == "gated" else (None, random_documents(length, batch=1))
    )
    check_on_gpu(Case(length, (100, FULL), gate, documents, group=2, dim=DIM), torch.bfloat16)


@every_dtype
@pytest.mark.parametrize("mode", ["allocated", "gated and packed"])
@pytest.mark.parametrize("earlier_keys", [1, 64, 300, 999])
def test_keys_before_the_first_query(earlier_keys: int, mode: str, dtype: torch.dtype) -> None:
    gate = None
    documents = None
    if mode != "allocated":
        gate = (0.001, 0.85)
        documents = random_documents(1000, 2)
    windows = (100, FULL)
    case = Case(1000, windows, gate, documents, 2, group=2, dim=DIM, earlier_keys=earlier_keys)
    check_on_gpu(case, dtype)


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
    # The processes end after the last of these futures, and then they free the GPU's memory.
    pool.shutdown(wait=False)
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
