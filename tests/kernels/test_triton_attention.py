"""The Triton kernels on a CPU, in Triton's interpreter and fp32, against the fp64 reference.

Every run allocates memory full of NaN (attention_cases.poisoned_memory), so each test also shows that all outputs are written and
that nothing unwritten is read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import attention_properties as properties
import pytest
import torch
import triton
from attention_cases import (
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
from attention_properties import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention import reference
from megaconsa.kernels.attention.backends import Problem
from megaconsa.kernels.attention.launch import Launch
from megaconsa.kernels.attention.triton import operators
from megaconsa.kernels.attention.triton.operators import attention, document_bounds, refusal

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


@pytest.mark.parametrize("length", [1, 7, 65, 130])
def test_16_bits(length: int) -> None:
    """The interpreter multiplies fp16 rightly: what only 16-bit inputs do, such as the fixed point of dz and its sums of dq."""
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
    """Tiles of queries longer than those of keys: their softmax has no sum, and must leave the gradients alone."""
    monkeypatch.setattr(operators, "forward_launch", lambda q, gated: Launch(128, 32, 4, 1))
    monkeypatch.setattr(operators, "backward_launch", lambda q, gated: Launch(64, 64, 4, 1))
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
    """Against truths of overlapping pieces: what lies a window inside a piece does not depend on tokens outside it."""
    length, window, piece = 8191, 17, 512
    inputs = draw(Case(length, (window,)))
    wide = inputs.double()
    results = run(attention, inputs)
    truths = {name: torch.empty(x.shape, dtype=torch.float64) for name, x in results.items()}
    for start in range(0, length, piece):
        first, stop = max(0, start - window), min(length, start + piece)
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
        assert (results[name] - truth).norm() <= TOLERANCE * (
            truth.norm() + 0.1 * inputs.upstream.norm()
        )


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
    """Gates (kv_heads,) are broadcast over the batch with stride 0; their gradient is summed over it."""
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
    # As a column of a wider table of the loader: not contiguous.
    assert_same_bits(
        results,
        run(attention, replace(inputs, documents=torch.stack([renamed, renamed], dim=2)[:, :, 0])),
    )


def test_document_bounds() -> None:
    starts, ends = document_bounds(document_ids(((3, 1, 4), (8,))))
    assert starts.tolist() == [[0, 0, 0, 3, 4, 4, 4, 4], [0] * 8]
    assert ends.tolist() == [[3, 3, 3, 4, 8, 8, 8, 8], [8] * 8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """80 columns are held in a block of 128, whose rest must not come from the next head."""
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
    """out.sum().backward() hands over a single number with strides of 0."""
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
    """The tiles of other precisions and devices."""
    launch = Launch(queries, keys, num_warps=4, num_stages=2)
    monkeypatch.setattr(operators, "forward_launch", lambda *_, **__: launch)
    monkeypatch.setattr(operators, "backward_launch", lambda *_, **__: launch)
    documents = random_documents(200, batch=1)
    check(attention, draw(Case(200, (70,), documents=documents)), TOLERANCE)
    check(attention, draw(Case(200, (70, 1), (0.3, 0.8), ((150, 1, 49),))), TOLERANCE)


@pytest.mark.parametrize("cache_bytes", [1, 40_000])
def test_sections_of_heads(monkeypatch: pytest.MonkeyPatch, cache_bytes: int) -> None:
    """A launch whose data exceed the cache is worked off in sections of heads, the last of them smaller."""
    monkeypatch.setattr(operators, "_cache_bytes", lambda device: cache_bytes)
    check(attention, draw(Case(40, (9, FULL, 3, 20, FULL), (0.3, 0.8, 0.0, 0.5, 1.0))), TOLERANCE)


def test_inference_then_training() -> None:
    """What is kept from a call without gradients serves the next one with them."""
    inputs = draw(Case(40, (13, 11), group=2))
    with torch.inference_mode():
        out = attention(inputs.q, inputs.k, inputs.v, inputs.windows, None, None, inputs.scale)
    assert torch.equal(out, run(attention, inputs)["out"])


def test_no_sequences() -> None:
    for gate in (None, (0.3, 0.8)):
        results = run(attention, draw(Case(8, (3, FULL), gate, batch=0)))
        assert all(not x.any() for x in results.values())


def test_two_runs_give_the_same_bits() -> None:
    inputs = draw(Case(150, (40, FULL), (0.3, 0.8), random_documents(150, batch=1), group=2))
    assert_same_bits(run(attention, inputs), run(attention, inputs))


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("gate", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("documents", [None, ((20, 1, 43),)], ids=["single", "packed"])
def test_exactly_the_visible_keys_weigh(
    window: int, gate: float | None, documents: tuple[tuple[int, ...], ...] | None
) -> None:
    inputs = draw(Case(64, (window,), None if gate is None else (gate,), documents, dim=64))
    properties.exactly_the_visible_keys_weigh(attention, inputs)


@pytest.mark.parametrize("gate", [None, (0.25,)], ids=["allocated", "gated"])
def test_scores_far_below_zero(gate: tuple[float, ...] | None) -> None:
    """Keys hidden from a query do not outweigh visible ones however low their scores are. One key takes all the weight here."""
    inputs = draw(Case(70, (7,), gate, ((30, 40),)))
    generator = torch.Generator().manual_seed(1)
    levels = 1 + torch.randperm(70, generator=generator).float()
    q, k = (
        torch.full_like(inputs.q, 1024),
        (-1024 * levels)[None, :, None, None].expand_as(inputs.k),
    )
    z = None if inputs.gate is None else inputs.gate.expand(1, 1)
    arguments = ((7,), z, inputs.documents, inputs.scale)
    torch.testing.assert_close(
        attention(q, k, inputs.v, *arguments), reference.attention(q, k, inputs.v, *arguments)
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(480, (16,)),
        Case(480, (16,), gate=(0.0,)),
        Case(480, (16,), gate=(0.5,), documents=((240, 240),)),
    ],
    ids=["window", "gate of 0", "documents"],
)
def test_blocks_that_nobody_sees_are_not_read(case: Case) -> None:
    properties.blocks_that_nobody_sees_are_not_read(attention, draw(case), tokens=100)


@pytest.mark.parametrize("gate", [None, ((0.3, 1.0), (0.3, 1.0))], ids=["allocated", "gated"])
def test_other_rows_and_heads_change_nothing(gate: tuple[tuple[float, ...], ...] | None) -> None:
    properties.other_rows_and_heads_change_nothing(
        attention, draw(Case(70, (9, FULL), gate, batch=2, group=2))
    )


@pytest.mark.parametrize("gate", [None, (0.4, 1.0)], ids=["allocated", "gated"])
def test_another_document_changes_nothing(gate: tuple[float, ...] | None) -> None:
    """Output, dk and dv bitwise; the unit in which dq is summed depends on the whole row, so dq to rounding."""
    clean = draw(Case(90, (9, FULL), gate, ((20, 41, 29),)))
    other = draw(Case(90, (9, FULL), seed=1))
    own = slice(20, 61)
    inputs = clean.map(Tensor.clone)
    for x, y in (
        (inputs.q, other.q),
        (inputs.k, other.k),
        (inputs.v, other.v),
        (inputs.upstream, other.upstream),
    ):
        x[:, :20], x[:, 61:] = 30 * y[:, :20], 30 * y[:, 61:]
    results, others = run(attention, clean), run(attention, inputs)
    for name in ("out", "k", "v"):
        assert torch.equal(results[name][:, own], others[name][:, own])
    torch.testing.assert_close(results["q"][:, own], others["q"][:, own], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "upstream"])
def test_what_is_not_finite_stays_visible(name: str, value: float) -> None:
    properties.what_is_not_finite_stays_visible(
        attention, draw(Case(70, (9,), (0.4,))), name, value
    )


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
def test_binarised_gates_equal_the_allocated_table(packed: bool) -> None:
    documents = random_documents(90, batch=1) if packed else None
    inputs = draw(Case(90, (17,) * 4, (1.0, 0.0, 0.0, 1.0), documents))
    properties.binarised_gates_equal_the_allocated_table(attention, inputs)


def test_checkpointing_gives_the_same_bits() -> None:
    inputs = draw(Case(70, (9, FULL), (0.4, 0.0), random_documents(70, batch=1), group=2))

    def checkpointed(*arguments: object) -> Tensor:
        return checkpoint(attention, *arguments, use_reentrant=False)

    assert_same_bits(run(checkpointed, inputs), run(attention, inputs))


def operator_inputs(inputs: Inputs) -> tuple[object, ...]:
    starts, ends = (None, None) if inputs.documents is None else document_bounds(inputs.documents)
    return (
        inputs.q,
        inputs.k,
        inputs.v,
        list(inputs.windows),
        inputs.gate,
        starts,
        ends,
        inputs.scale,
    )


@pytest.mark.parametrize(
    "case",
    [Case(20, (5, FULL)), Case(20, (5, 9), ((0.3, 0.8),), ((7, 13),), group=2)],
    ids=["allocated", "gated and packed"],
)
def test_operators_meet_their_contract(case: Case) -> None:
    """Schema, autograd registration, fake implementation and tracing with symbolic shapes, as torch checks them.

    Gates lie inside (0, 1): statistics that other gates leave unwritten would differ between two calls.
    """
    inputs = draw(case)
    arguments = operator_inputs(inputs)
    results = torch.ops.megaconsa.hybrid_attention(*arguments)
    _, _, _, windows, gate, _, ends, scale = arguments
    torch.library.opcheck(
        torch.ops.megaconsa.hybrid_attention_backward,
        (inputs.upstream, inputs.q, inputs.k, inputs.v, windows, gate, ends, scale, *results),
    )
    for x in (inputs.q, inputs.k, inputs.v, inputs.gate):
        if x is not None:
            x.requires_grad_()
    torch.library.opcheck(torch.ops.megaconsa.hybrid_attention, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "case",
    [Case(20, (5, FULL)), Case(20, (5, 9), (0.3, 1.0), ((7, 13),), group=2)],
    ids=["allocated", "gated and packed"],
)
def test_compiled_as_one_graph(case: Case, dynamic: bool) -> None:
    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        windows: tuple[int, ...],
        gate: Tensor | None,
        documents: Tensor | None,
        scale: float,
    ) -> Tensor:
        return hybrid_attention(
            q, k, v, window=windows, gate=gate, documents=documents, scale=scale, backend="triton"
        )

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = draw(case)
    assert_same_bits(run(compiled, inputs), run(attention, inputs))


def problem(**changes: object) -> Problem:
    values = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "batch": 1,
        "length": 8,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "windows": (4, 8),
        "gated": False,
        "packed": False,
        "scale": 0.25,
    }
    return Problem(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_served(dtype: torch.dtype, head_dim: int) -> None:
    assert refusal(problem(dtype=dtype, head_dim=head_dim, gated=True, packed=True)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 20}, "head_dim .*not 20; take"),
        ({"head_dim": 512}, "head_dim .*not 512; take"),
        ({"dtype": torch.float64}, "float64; take"),
        ({"scale": 0.0}, "positive scale, not 0.0; take"),
        ({"scale": -0.5}, "positive scale, not -0.5; take"),
        ({"scale": float("nan")}, "positive scale, not nan; take"),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    sentence = refusal(problem(**changes))
    assert sentence is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(sentence)


def test_a_cpu_is_refused_where_triton_compiles() -> None:
    script = """
import torch
from megaconsa.kernels import hybrid_attention
x = torch.zeros(1, 4, 2, 16)
try:
    hybrid_attention(x, x, x, window=2, backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout == "triton needs a CUDA GPU; take sdpa on this device\n"


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    batch, length, kv_heads = (
        draw_(st.integers(1, 2)),
        draw_(st.integers(1, 40)),
        draw_(st.integers(1, 2)),
    )
    window = st.one_of(st.integers(1, length + 2), st.just(FULL))
    z = st.sampled_from([0.0, 0.001, 0.5, 0.97, 1.0])
    gate = st.tuples(*[z] * kv_heads)
    starts = st.lists(st.booleans(), min_size=length - 1, max_size=length - 1)

    def lengths(new: list[bool]) -> tuple[int, ...]:
        bounds = [
            0,
            *(position for position, starts_here in enumerate(new, 1) if starts_here),
            length,
        ]
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
