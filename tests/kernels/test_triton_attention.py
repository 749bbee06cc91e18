"""The Triton kernels in the interpreter, on a CPU in fp32, compared with the fp64 reference.

Every run allocates memory full of NaN (attention_cases.poisoned_memory). So each test also shows
that all outputs are written and that nothing unwritten is read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.kernels.attention import reference
from megaconsa.kernels.attention.launch import Launch
from megaconsa.kernels.attention.triton import backward_operator, forward_operator
from megaconsa.kernels.attention.triton.operators import attention, document_bounds
from tests.support import attention_properties as properties
from tests.support.attention_cases import (
    BLOCK_EDGES,
    FULL,
    HEAD_DIMS,
    Case,
    Inputs,
    assert_same_bits,
    check,
    document_ids,
    draw,
    random_documents,
    random_gate,
    run,
)
from tests.support.attention_properties import LAYOUTS

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="Triton compiles for the GPU here: test_triton_cuda.py covers it",
)

TOLERANCE = 1e-5


@pytest.mark.parametrize("gate", [None, (0.3, 0.85)], ids=["allocated", "gated"])
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("length", [1, 7, 63, 65])
def test_lengths(length: int, packed: bool, gate: tuple[float, ...] | None) -> None:
    documents = random_documents(length, batch=2) if packed else None
    check(attention, draw(Case(length, (5, FULL), gate, documents, batch=2)), TOLERANCE)


@pytest.mark.parametrize("gate", [None, (0.3, 1.0)], ids=["allocated", "gated"])
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("earlier_keys", [1, 31, 64, 99])
def test_keys_before_the_first_query(
    earlier_keys: int, packed: bool, gate: tuple[float, ...] | None
) -> None:
    documents = random_documents(100, batch=2) if packed else None
    case = Case(100, (20, FULL), gate, documents, batch=2, group=2, earlier_keys=earlier_keys)
    check(attention, draw(case), TOLERANCE)


@pytest.mark.parametrize("length", [1, 7, 65, 130])
def test_16_bits(length: int) -> None:
    """The interpreter multiplies fp16 correctly.

    This covers what only 16-bit inputs do, such as the fixed point of dz and its sums of dq.
    """
    case = Case(
        length,
        (20, FULL, 9),
        (0.3, 0.001, 1.0),
        random_documents(length, batch=2),
        batch=2,
        group=2,
    )
    check(attention, draw(case, "cpu", torch.float16), 1e-3)


@pytest.mark.parametrize(
    "case",
    [Case(20, (20,), (0.4,)), Case(65, (5,), (0.4,), ((64, 1),))],
    ids=["short", "late document"],
)
def test_rows_of_padding_that_see_no_key(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of queries are longer than tiles of keys.

    The softmax of some rows then has no sum and must not affect the gradients.
    """
    monkeypatch.setattr(forward_operator, "forward_launch", lambda q, **_: Launch(128, 32, 4, 1))
    monkeypatch.setattr(backward_operator, "backward_launch", lambda q, **_: Launch(64, 64, 4, 1))
    check(attention, draw(case, "cpu", torch.float16), 1e-3)


def test_a_nan_gate_stays_visible() -> None:
    inputs = draw(Case(20, (7, 7), (0.4, float("nan"))))
    results = run(attention, inputs)
    assert results["out"][:, :, 0].isfinite().all()
    assert results["out"][:, :, 1].isnan().all()
    assert results["gate"][1].isnan()


@pytest.mark.parametrize(
    "case",
    [
        Case(1000, (70,)),
        Case(1000, (70,), gate=(0.6,)),
        Case(1000, (FULL,), gate=(0.6,), documents=random_documents(1000, batch=1)),
    ],
    ids=["allocated", "gated", "packed"],
)
def test_length_1000(case: Case) -> None:
    check(attention, draw(case), TOLERANCE)


def test_length_8191() -> None:
    """Compares with references of overlapping pieces.

    Tokens that are a window inside a piece do not depend on tokens outside the piece.
    """
    length = 8191
    window = 17
    piece = 512
    inputs = draw(Case(length, (window,)))
    wide = inputs.double()
    results = run(attention, inputs)
    truths = {name: torch.empty(x.shape, dtype=torch.float64) for name, x in results.items()}
    for start in range(0, length, piece):
        first = max(0, start - window)
        stop = min(length, start + piece)
        tokens = slice(first, stop + window)
        part = Inputs(
            wide.q[:, tokens],
            wide.k[:, tokens],
            wide.v[:, tokens],
            wide.upstream[:, tokens],
            (window,),
            None,
            None,
            wide.scale,
        )
        for name, truth in run(reference.attention, part).items():
            truths[name][:, start:stop] = truth[:, start - first : stop - first]
    for name, truth in truths.items():
        size = truth.norm() + 0.1 * inputs.upstream.norm()
        assert (results[name] - truth).norm() <= TOLERANCE * size


@pytest.mark.parametrize("gate", [None, (0.3,)], ids=["allocated", "gated"])
@pytest.mark.parametrize("window", [1, 2, *BLOCK_EDGES, 130, 131, 132, FULL])
def test_windows(window: int, gate: tuple[float, ...] | None) -> None:
    check(attention, draw(Case(131, (window,), gate)), TOLERANCE)


@pytest.mark.parametrize("gate", [None, (0.3, 0.0, 0.9, 1.0, 0.5)], ids=["allocated", "gated"])
def test_each_head_has_its_window(gate: tuple[float, ...] | None) -> None:
    check(attention, draw(Case(70, (FULL, 1, 33, 70, 8), gate)), TOLERANCE)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_group_sizes(group: int) -> None:
    check(attention, draw(Case(40, (9, FULL), (0.3, 0.8), group=group)), TOLERANCE)


@pytest.mark.parametrize("gate", [None, (0.3,)], ids=["allocated", "gated"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim: int, gate: tuple[float, ...] | None) -> None:
    check(attention, draw(Case(37, (6,), gate, ((11, 26),), group=2, dim=dim)), TOLERANCE)


@pytest.mark.parametrize(
    "gate",
    [
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        (0.001, 0.001, 0.001),
        (0.999, 0.999, 0.999),
        (0.001, 1.0, 0.0),
        ((0.0, 0.5, 1.0), (1.0, 0.001, 0.999)),
        random_gate(2, 3),
    ],
    ids=["zeros", "ones", "small", "large", "mixed", "per sequence", "random"],
)
def test_gates(gate: tuple[float, ...]) -> None:
    """Gates (kv_heads,) are broadcast over the batch with stride 0.

    Their gradient is summed over the batch.
    """
    check(attention, draw(Case(50, (6, 20, 33), gate, batch=2)), TOLERANCE)


@pytest.mark.parametrize(
    "documents",
    [
        ((1,) * 100, (1,) * 100),
        ((32, 32, 36), (31, 33, 1, 35)),
        ((1, 98, 1), (64, 36)),
        random_documents(100, batch=2),
    ],
    ids=["one token each", "at block edges", "short at the ends", "random"],
)
@pytest.mark.parametrize("gate", [None, (0.4, 1.0)], ids=["allocated", "gated"])
def test_documents(documents: tuple[tuple[int, ...], ...], gate: tuple[float, ...] | None) -> None:
    check(attention, draw(Case(100, (5, FULL), gate, documents, batch=2)), TOLERANCE)


def test_document_ids_only_mark_where_documents_start() -> None:
    inputs = draw(Case(40, (5, FULL), (0.4, 0.7), documents=((3, 17, 20), (1, 38, 1)), batch=2))
    lengths = torch.tensor([[3, 17, 20], [1, 38, 1]])
    numbers = torch.tensor([-7, 0, FULL], dtype=torch.int32)
    renamed = torch.stack([numbers.repeat_interleave(row) for row in lengths])
    results = run(attention, inputs)
    assert_same_bits(results, run(attention, replace(inputs, documents=renamed)))
    # A column of a wider table, as from the loader, is not contiguous.
    column = torch.stack([renamed, renamed], dim=2)[:, :, 0]
    assert_same_bits(results, run(attention, replace(inputs, documents=column)))


def test_document_bounds() -> None:
    starts, ends = document_bounds(document_ids(((3, 1, 4), (8,))))
    assert starts.tolist() == [[0, 0, 0, 3, 4, 4, 4, 4], [0] * 8]
    assert ends.tolist() == [[3, 3, 3, 4, 8, 8, 8, 8], [8] * 8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """80 columns are held in a block of 128.

    The rest of the block must not come from the next head.
    """
    inputs = draw(Case(37, (6, FULL), (0.3, 1.0), ((11, 26), (37,)), batch=2, dim=80))
    check(attention, inputs.map(LAYOUTS[layout]), TOLERANCE)


def test_slices_of_a_fused_projection() -> None:
    inputs = draw(Case(37, (6, FULL), batch=2, group=2))
    fused = torch.cat([inputs.q, inputs.k, inputs.v], dim=2)
    q, k, v = fused.split([4, 2, 2], dim=2)
    check(attention, replace(inputs, q=q, k=k, v=v), TOLERANCE)


def test_one_key_and_value_for_the_whole_batch() -> None:
    inputs = draw(Case(37, (6, FULL), batch=3, group=2))
    check(
        attention,
        replace(inputs, k=inputs.k[:1].expand(3, -1, -1, -1), v=inputs.v[:1].expand(3, -1, -1, -1)),
        TOLERANCE,
    )


def test_upstream_of_a_sum() -> None:
    """out.sum().backward() passes a single number with strides of 0."""
    inputs = draw(Case(37, (6, FULL), (0.3, 0.9), batch=2))
    check(attention, replace(inputs, upstream=torch.ones(()).expand_as(inputs.q)), TOLERANCE)


@pytest.mark.parametrize("size", [1e-10, 1e10])
def test_upstream_of_any_size(size: float) -> None:
    check(
        attention,
        properties.uneven_upstream(draw(Case(70, (6, FULL), (0.3, 0.9))), size),
        TOLERANCE,
    )


def test_an_outlier_costs_the_others_nothing() -> None:
    inputs = draw(Case(70, (6, FULL), (0.3, 0.9), ((1, 69),)))
    properties.an_outlier_costs_the_others_nothing(
        attention, inputs, key=1000, value=1000, tolerance=TOLERANCE
    )


@pytest.mark.parametrize("needed", [("q",), ("v",), ("gate",), ("k", "gate")])
def test_some_inputs_need_gradients(needed: tuple[str, ...]) -> None:
    inputs = draw(Case(40, (6, FULL), (0.3, 0.9)))
    assert_same_bits(run(attention, inputs, needed), run(attention, inputs))


@pytest.mark.parametrize(("queries", "keys"), [(16, 128), (128, 16)])
def test_tile_shapes(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int) -> None:
    """The tiles are those of other precisions and devices."""
    launch = Launch(queries, keys, num_warps=4, num_stages=2)
    monkeypatch.setattr(forward_operator, "forward_launch", lambda *_, **__: launch)
    monkeypatch.setattr(backward_operator, "backward_launch", lambda *_, **__: launch)
    documents = random_documents(200, batch=1)
    check(attention, draw(Case(200, (70,), documents=documents)), TOLERANCE)
    check(attention, draw(Case(200, (70, 1), (0.3, 0.8), ((150, 1, 49),))), TOLERANCE)


@pytest.mark.parametrize("cache_bytes", [1, 40_000])
def test_sections_of_heads(monkeypatch: pytest.MonkeyPatch, cache_bytes: int) -> None:
    """The data of a launch exceeds the cache.

    The launch is then processed in sections of heads, and the last section is smaller.
    """
    for module in (forward_operator, backward_operator):
        monkeypatch.setattr(module, "cache_bytes", lambda device: cache_bytes)
    check(attention, draw(Case(40, (9, FULL, 3, 20, FULL), (0.3, 0.8, 0.0, 0.5, 1.0))), TOLERANCE)


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    batch = draw_(st.integers(1, 2))
    length = draw_(st.integers(1, 40))
    kv_heads = draw_(st.integers(1, 2))
    window = st.one_of(st.integers(1, length + 2), st.just(FULL))
    z = st.sampled_from([0.0, 0.001, 0.5, 0.97, 1.0])
    gate = st.tuples(*[z] * kv_heads)
    starts = st.lists(st.booleans(), min_size=length - 1, max_size=length - 1)

    def lengths(new: list[bool]) -> tuple[int, ...]:
        inner = [position for position, starts_here in enumerate(new, 1) if starts_here]
        bounds = [0, *inner, length]
        return tuple(stop - start for start, stop in pairwise(bounds))

    return Case(
        length,
        windows=draw_(st.tuples(*[window] * kv_heads)),
        gate=draw_(st.one_of(st.none(), gate, st.tuples(*[gate] * batch))),
        documents=draw_(st.one_of(st.none(), st.tuples(*[starts.map(lengths)] * batch))),
        batch=batch,
        group=draw_(st.integers(1, 2)),
        dim=draw_(st.sampled_from([16, 32, 80])),
        scale=draw_(st.sampled_from([None, 0.01, 0.7])),
        seed=draw_(st.integers(0, 9)),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_any_shape(case: Case) -> None:
    check(attention, draw(case), TOLERANCE)
