"""bench-attention: what is counted, how contestants are run, and how they are timed.

The problems are small and run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from megaconsa.benchmarks.attention import peers, timing
from megaconsa.benchmarks.attention import truth as truth_module
from megaconsa.benchmarks.attention.benchmark import Quartiles, Row, compare, forward_flops
from megaconsa.benchmarks.attention.cases import Shape, all_cases
from megaconsa.benchmarks.attention.contestants import Attention, OurBackend, Peer, Run
from megaconsa.benchmarks.attention.timing import check, errors, time_in_turns
from megaconsa.benchmarks.attention.truth import truth
from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention import reference
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.visibility import visible
from tests.support.bench_problems import CPU, NAMES, SHAPE, every_case, inputs_of, results_of

pytestmark = pytest.mark.usefixtures("no_gpu")


@every_case
def test_flops_count_the_visible_pairs(name: str) -> None:
    inputs = inputs_of(name)
    case = inputs.case
    gate = case.gate or (0.0,) * SHAPE.kv_heads
    pairs = 0
    for head in range(SHAPE.heads):
        z = gate[head // SHAPE.group]
        window = SHAPE.length if z > 0 else case.windows[head // SHAPE.group]
        seen = visible(SHAPE.length, window, inputs.documents, CPU)
        pairs += int(seen.expand(SHAPE.batch, -1, -1, -1).sum())
    assert forward_flops(SHAPE, case) == 4 * SHAPE.head_dim * pairs


@every_case
def test_truth_is_the_reference_in_fp64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth_module, "BLOCK", 16)
    inputs = inputs_of(name)
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    gate = None if inputs.gate is None else inputs.gate.double().requires_grad_()
    per_row = None if gate is None else gate.expand(SHAPE.batch, -1)
    pattern = HeadPattern(inputs.case.windows, per_row)
    out = reference.attention(*leaves, pattern, inputs.documents, SHAPE.scale)
    wanted = leaves if gate is None else [*leaves, gate]
    expected = (out.detach(), *torch.autograd.grad(out, wanted, inputs.gradient.double()))
    for result, right in zip(truth(inputs).values(), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-12, atol=1e-12)


def bare(heads_first: bool) -> Callable[..., Attention]:
    """A library that computes windows and documents but no gates, in either layout."""

    def build(shape: Shape, windows: tuple[int, ...], documents: Tensor | None) -> Attention:
        def attention(*qkv: Tensor) -> Tensor:
            assert all(x.is_contiguous() for x in qkv)
            q, k, v = (x.transpose(1, 2) for x in qkv) if heads_first else qkv
            out = hybrid_attention(
                q, k, v, window=windows, documents=documents, backend="reference"
            )
            return out.transpose(1, 2) if heads_first else out

        return attention

    return build


@every_case
@pytest.mark.parametrize("heads_first", [False, True], ids=["BSHD", "BHSD"])
@pytest.mark.parametrize("launch_per_window", [False, True], ids=["masks", "launches"])
def test_what_a_peer_launches_is_the_case(
    name: str, heads_first: bool, launch_per_window: bool
) -> None:
    inputs = inputs_of(name)
    peer = Peer(
        "bare",
        bare(heads_first),
        heads_first,
        windowed=True,
        launch_per_window=launch_per_window,
        packed=True,
    )
    assert peer.serves(inputs.case) == (launch_per_window or inputs.gate is None)
    if peer.serves(inputs.case):
        two = launch_per_window and name not in ("dense", "window", "packed")
        assert peer.prepare(inputs).launches == (2 if two else 1)
        assert max(errors(results_of(peer, inputs), truth(inputs), inputs).values()) < 1e-6


def varlen_by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int | None, int | None],
) -> tuple[Tensor, None]:
    """Stands in for FlashAttention 4's `flash_attn_varlen_func`: one call for each document."""
    assert causal
    assert cu_seqlens_q is cu_seqlens_k
    assert cu_seqlens_q.dtype == torch.int32
    bounds = cu_seqlens_q.tolist()
    assert bounds[-1] == len(q) == len(k) == len(v)
    assert max(end - start for start, end in pairwise(bounds)) == max_seqlen_q == max_seqlen_k
    left, right = window_size
    assert right == (None if left is None else 0)
    window = max_seqlen_q if left is None else left + 1
    outputs = []
    for start, end in pairwise(bounds):
        q_, k_, v_ = (x[None, start:end] for x in (q, k, v))
        out = hybrid_attention(q_, k_, v_, window=window, scale=softmax_scale, backend="reference")
        outputs.append(out[0])
    return torch.cat(outputs), None


@pytest.mark.parametrize("name", ["packed", "packed-mixed", "packed-gated"])
def test_documents_as_flash_attention_4_gets_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(flash_attn_varlen_func=varlen_by_document)
    monkeypatch.setattr(peers, "import_module", lambda name: library)
    inputs = inputs_of(name)
    peer = peers.PEERS[0]
    run = peer.prepare(inputs)
    assert {leaf.shape[0] for leaf in run.leaves} == {SHAPE.batch * SHAPE.length}
    assert run.launches == (1 if name == "packed" else 2)
    assert max(errors(results_of(peer, inputs), truth(inputs), inputs).values()) < 1e-6


@pytest.mark.parametrize("name", ["dense", "window", "mixed", "packed", "packed-mixed"])
def test_flex_attention_sees_the_visible_keys(name: str) -> None:
    inputs = inputs_of(name)
    mask_mod = peers.flex_mask(SHAPE, inputs.case.windows, inputs.documents)
    mask = create_mask(mask_mod, SHAPE.batch, SHAPE.heads, SHAPE.length, SHAPE.length, CPU)
    for head in range(SHAPE.heads):
        window = inputs.case.windows[head // SHAPE.group]
        seen = visible(SHAPE.length, window, inputs.documents, CPU)
        assert torch.equal(mask[:, head], seen[:, 0].expand(SHAPE.batch, -1, -1))


def test_peers_serve_what_they_can_compute() -> None:
    cases = all_cases(SHAPE)
    served = {peer.name: [case.name for case in cases if peer.serves(case)] for peer in peers.PEERS}
    assert served == {
        "FlashAttention 4": NAMES,
        "cuDNN (SDPA)": ["dense"],
        "FlashAttention 2 (SDPA)": ["dense"],
        "FlexAttention": ["dense", "window", "mixed", "packed", "packed-mixed"],
    }
    assert "needs a CUDA GPU" in str(peers.PEERS[0].refusal(inputs_of("dense")))


@every_case
def test_sorted_heads_are_the_same_heads(name: str) -> None:
    """With five KV heads, the order of the heads is not its own inverse."""
    inputs = inputs_of(name, replace(SHAPE, heads=10, kv_heads=5))
    seen = []

    def watched(*qkv: Tensor, **arguments: Any) -> Tensor:
        seen.append(arguments["window"])
        return hybrid_attention(*qkv, **arguments)

    contestant = OurBackend("reference", watched, sorted_heads=True)
    assert max(errors(results_of(contestant, inputs), truth(inputs), inputs).values()) < 1e-6
    assert list(seen[0]) == sorted(inputs.case.windows, reverse=True)


def test_small_problem_is_of_the_same_kind() -> None:
    small = Shape(4, 8191, 16, 8, 128, 1000, torch.bfloat16, CPU).small()
    assert (small.batch, small.length, small.window) == (2, 1023, 232)
    assert (small.length % 128, small.window % 128) == (8191 % 128, 1000 % 128)
    assert SHAPE.small() == SHAPE
    large = Shape(4, 32768, 16, 8, 128, 1024, torch.bfloat16, CPU).small()
    assert (large.length, large.window, large.document_median) == (1024, 256, 150)


def test_small_problem_has_several_documents_and_some_exceed_the_window() -> None:
    small = Shape(4, 8192, 16, 8, 128, 1024, torch.bfloat16, CPU).small()
    for documents in small.document_lengths():
        assert len(documents) >= 4
        assert max(documents) > small.window


def runs(*contestants: OurBackend) -> dict[str, Run]:
    inputs = inputs_of("mixed")
    return {contestant.name: contestant.prepare(inputs) for contestant in contestants}


def test_all_are_timed_in_every_round_unless_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants = runs(OurBackend("sdpa"), OurBackend("reference"))
    seen = []
    monkeypatch.setattr(timing, "SECONDS", 60.0)
    timings = time_in_turns(contestants, CPU, seen.append)
    assert [len(x) for t in timings.values() for x in (t.forward, t.backward)] == [
        timing.ROUNDS
    ] * 4
    assert min(x for t in timings.values() for x in (*t.forward, *t.backward)) > 0
    assert len(seen) == timing.ROUNDS
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    timings = time_in_turns(contestants, CPU, seen.append)
    assert [len(t.forward) for t in timings.values()] == [timing.FEWEST_ROUNDS] * 2


def test_quotients_of_what_was_timed() -> None:
    def row(case: str, contestant: str, milliseconds: float) -> Row:
        quartiles = Quartiles(milliseconds / 2, 0.0, 0.0, 3)
        return Row(
            case,
            contestant,
            True,
            1,
            quartiles,
            quartiles,
            milliseconds,
            1.0,
            None,
            {"out": 0.0},
            {"out": 0.0},
        )

    rows = [
        row("dense", "triton", 10.0),
        row("gated", "triton", 11.0),
        row("mixed", "FlexAttention", 8.0),
    ]
    assert [(ratio.name, ratio.value, ratio.goal) for ratio in compare(rows)] == [
        ("gated triton / dense triton", 1.1, 1.15)
    ]
    rows.append(row("mixed", "triton", 6.0))
    assert next((ratio.name, ratio.value) for ratio in compare(rows)) == (
        "mixed triton / mixed FlexAttention",
        0.75,
    )


def test_gates_at_0_and_1_may_have_any_derivative() -> None:
    inputs = inputs_of("gated-partly", Shape(1, 20, 8, 8, 4, 5, torch.float32, CPU))
    expected = truth(inputs)
    results = {name: x.clone() for name, x in expected.items()}
    assert inputs.gate is not None
    results["dz"][(inputs.gate == 0) | (inputs.gate == 1)] = 1e3
    assert errors(results, expected, inputs)["dz"] == 0
    results["dz"][1] += 1
    assert errors(results, expected, inputs)["dz"] > 1e-3


def test_a_backend_that_refuses_is_no_failure() -> None:
    (verdict,) = check(inputs_of("dense"), [OurBackend("flash")], lambda note: None)
    assert not verdict.wrong(1e-5)
    assert "flash needs a CUDA GPU" in str(verdict.reason)
