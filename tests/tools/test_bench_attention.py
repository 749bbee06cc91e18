"""bench-attention: what is counted, how contestants are run, and how they are timed.

The problems are small and run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megaconsa.benchmarks.attention import peers, timing
from megaconsa.benchmarks.attention import truth as truth_module
from megaconsa.benchmarks.attention.benchmark import Quartiles, Row, compare, forward_flops
from megaconsa.benchmarks.attention.cases import Shape, all_cases
from megaconsa.benchmarks.attention.contestants import OurBackend, Peer, Run
from megaconsa.benchmarks.attention.timing import check, errors, time_in_turns
from megaconsa.benchmarks.attention.truth import truth
from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention import reference
from megaconsa.kernels.attention.head_pattern import HeadPattern
from tests.support.bench_problems import CPU, NAMES, SHAPE, every_case, inputs_of, results_of

pytestmark = pytest.mark.usefixtures("no_gpu")


@every_case
def test_flops_count_the_visible_pairs(name: str) -> None:
    case = inputs_of(name).case
    gate = case.gate or (0.0,) * SHAPE.kv_heads
    pairs = 0
    for head in range(SHAPE.heads):
        window = case.windows[head // SHAPE.group]
        z = gate[head // SHAPE.group]
        for query in range(SHAPE.length):
            pairs += sum(1 for key in range(query + 1) if z > 0 or query - key < window)
    assert forward_flops(SHAPE, case) == 4 * SHAPE.head_dim * SHAPE.batch * pairs


@every_case
def test_truth_is_the_reference_in_fp64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth_module, "BLOCK", 16)
    inputs = inputs_of(name)
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    gate = None if inputs.gate is None else inputs.gate.double().requires_grad_()
    per_row = None if gate is None else gate.expand(SHAPE.batch, -1)
    out = reference.attention(*leaves, HeadPattern(inputs.case.windows, per_row), None, SHAPE.scale)
    wanted = leaves if gate is None else [*leaves, gate]
    expected = (out.detach(), *torch.autograd.grad(out, wanted, inputs.gradient.double()))
    for result, right in zip(truth(inputs).values(), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-12, atol=1e-12)


def bare(heads_first: bool) -> Callable[..., Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """A library that computes windows but no gates, in either layout."""

    def build(shape: Shape, windows: tuple[int, ...]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attention(*qkv: Tensor) -> Tensor:
            assert all(x.is_contiguous() for x in qkv)
            q, k, v = (x.transpose(1, 2) for x in qkv) if heads_first else qkv
            out = hybrid_attention(q, k, v, window=windows, backend="reference")
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
        "bare", bare(heads_first), heads_first, windowed=True, launch_per_window=launch_per_window
    )
    assert peer.serves(inputs.case) == (launch_per_window or inputs.gate is None)
    if peer.serves(inputs.case):
        two = launch_per_window and name not in ("dense", "window")
        assert peer.prepare(inputs).launches == (2 if two else 1)
        assert max(errors(results_of(peer, inputs), truth(inputs), inputs).values()) < 1e-6


def test_peers_without_windows_serve_the_dense_case_alone() -> None:
    cases = all_cases(SHAPE)
    served = {peer.name: [case.name for case in cases if peer.serves(case)] for peer in peers.PEERS}
    assert served == {
        "FlashAttention 4": NAMES,
        "cuDNN (SDPA)": ["dense"],
        "FlashAttention 2 (SDPA)": ["dense"],
        "FlexAttention": ["dense", "window", "mixed"],
    }
    assert "needs a CUDA GPU" in str(peers.PEERS[0].refusal(inputs_of("dense")))


@every_case
def test_sorted_heads_are_the_same_heads(name: str) -> None:
    """With five KV heads, the order of the heads is not its own inverse."""
    inputs = inputs_of(name, Shape(2, 37, 10, 5, 8, 5, torch.float32, CPU))
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
    assert (large.length, large.window) == (1024, 256)


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
