"""Properties of the Triton kernels in the interpreter, on a CPU.

They cover equal bits, isolation of rows and documents, operators, and compiling.
"""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention import reference
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.triton.operators import attention, document_bounds
from tests.support import attention_properties as properties
from tests.support.attention_cases import (
    FULL,
    Case,
    Inputs,
    assert_same_bits,
    draw,
    random_documents,
    run,
)

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="Triton compiles for the GPU here: test_triton_cuda.py covers it",
)


def test_inference_then_training() -> None:
    """What a call without gradients keeps also serves the next call with gradients."""
    inputs = draw(Case(40, (13, 11), group=2))
    with torch.inference_mode():
        heads = HeadPattern(inputs.windows)
        out = attention(inputs.q, inputs.k, inputs.v, heads, None, inputs.scale)
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
    """Hidden keys do not outweigh visible keys, however low the scores of the visible keys are.

    Here one key takes all the weight.
    """
    inputs = draw(Case(70, (7,), gate, ((30, 40),)))
    generator = torch.Generator().manual_seed(1)
    levels = 1 + torch.randperm(70, generator=generator).float()
    q = torch.full_like(inputs.q, 1024)
    k = (-1024 * levels)[None, :, None, None].expand_as(inputs.k)
    z = None if inputs.gate is None else inputs.gate.expand(1, 1)
    arguments = (HeadPattern((7,), z), inputs.documents, inputs.scale)
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
    """Output, dk and dv are bitwise equal, and dq is equal up to rounding.

    The unit in which dq is summed depends on the whole row.
    """
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
        x[:, :20] = 30 * y[:, :20]
        x[:, 61:] = 30 * y[:, 61:]
    results = run(attention, clean)
    others = run(attention, inputs)
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
    """torch's own checks cover the operators.

    They check schema, autograd registration, fake implementation, and tracing with symbolic shapes.
    Gates are inside (0, 1). Other gates leave statistics unwritten, and these would differ between
    two calls.
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
        heads: HeadPattern,
        documents: Tensor | None,
        scale: float,
    ) -> Tensor:
        return hybrid_attention(
            q,
            k,
            v,
            window=heads.windows,
            gate=heads.gate,
            documents=documents,
            scale=scale,
            backend="triton",
        )

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = draw(case)
    assert_same_bits(run(compiled, inputs), run(attention, inputs))
