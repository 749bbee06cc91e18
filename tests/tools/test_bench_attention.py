"""`megaconsa bench-attention`: what is counted, who is refused, what is written. Small real problems on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaconsa.benchmarks.attention import peers, timing
from megaconsa.benchmarks.attention import truth as truth_module
from megaconsa.benchmarks.attention.benchmark import Quartiles, Row, compare, forward_flops
from megaconsa.benchmarks.attention.cases import Inputs, Shape, all_cases, draw
from megaconsa.benchmarks.attention.contestants import Contestant, OurBackend, Peer, Run
from megaconsa.benchmarks.attention.timing import check, errors, time_in_turns
from megaconsa.benchmarks.attention.truth import Results, truth
from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention import reference

CPU = torch.device("cpu")
SHAPE = Shape(2, 37, 6, 3, 8, 5, torch.float32, CPU)
NAMES = ["dense", "window", "mixed", "gated", "gated-half", "gated-partly"]
SMALL = (
    "--batch",
    2,
    "--length",
    40,
    "--heads",
    4,
    "--kv-heads",
    2,
    "--head-dim",
    8,
    "--window",
    6,
)

every_case = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes the CPU, on any machine, but in tests that ask for a GPU."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def inputs_of(name: str, shape: Shape = SHAPE) -> Inputs:
    return draw(shape, next(case for case in all_cases(shape) if case.name == name))


def results_of(contestant: OurBackend | Peer, inputs: Inputs) -> Results:
    run = contestant.prepare(inputs)
    outputs = run.forward()
    return run.collect(tuple(x.detach() for x in outputs), run.backward(outputs))


@every_case
def test_flops_count_the_visible_pairs(name: str) -> None:
    case = inputs_of(name).case
    gate = case.gate or (0.0,) * SHAPE.kv_heads
    pairs = 0
    for head in range(SHAPE.heads):
        window, z = case.windows[head // SHAPE.group], gate[head // SHAPE.group]
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
    out = reference.attention(*leaves, inputs.case.windows, per_row, None, SHAPE.scale)
    wanted = leaves if gate is None else [*leaves, gate]
    expected = (out.detach(), *torch.autograd.grad(out, wanted, inputs.gradient.double()))
    for result, right in zip(truth(inputs).values(), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-12, atol=1e-12)


def bare(heads_first: bool) -> Callable[..., Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """A library that computes windows and no gates, in either layout."""

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
    """Of five KV heads, so that the order given is not its own inverse."""
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
    contestants, seen = runs(OurBackend("sdpa"), OurBackend("reference")), []
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


def test_the_command_writes_what_it_measured(done: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    printed = done("bench-attention", *SMALL, "--out", out)
    content = json.loads(out.read_text())
    assert (
        content["command"]
        == "megaconsa bench-attention " + " ".join(map(str, SMALL)) + " --dtype fp32"
    )
    assert (
        content["versions"]["torch"] == torch.__version__.split("+")[0]
        or content["versions"]["torch"] == torch.__version__
    )
    assert content["shape"]["dtype"] == "float32"
    assert [case["name"] for case in content["cases"]] == NAMES
    assert content["cases"][2]["windows"] == [40, 6]
    assert content["cases"][4]["gate"] == [1.0, 0.0]
    results = content["results"]
    assert [(row["case"], row["contestant"]) for row in results] == [
        (n, c) for n in NAMES for c in ("sdpa", "reference")
    ]
    for row in results:
        assert 0 < row["forward"]["low"] <= row["forward"]["median"] <= row["forward"]["high"]
        assert row["total_ms"] == row["forward"]["median"] + row["backward"]["median"]
        flops = next(
            case["forward_flops"] for case in content["cases"] if case["name"] == row["case"]
        )
        assert row["tflops"] == pytest.approx(3.5 * flops / row["total_ms"] / 1e9)
        assert row["ratio"] is None
        assert set(row["errors"]) == {"out", "dq", "dk", "dv"} | (
            {"dz"} if row["case"].startswith("gated") else set()
        )
        assert max(row["errors"].values()) < content["bound"] == 1e-5
    for said in ("No GPU", "TFLOP/s", "gated-partly", f"wrote {out}"):
        assert said in printed


def test_cases_are_chosen_and_the_dtype_is_kept(done: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    done(
        "bench-attention",
        *SMALL,
        "--case",
        "mixed",
        "--case",
        "dense",
        "--dtype",
        "bf16",
        "--out",
        out,
    )
    content = json.loads(out.read_text())
    assert content["command"].endswith("--dtype bf16 --case mixed --case dense")
    assert [case["name"] for case in content["cases"]] == ["dense", "mixed"]
    assert (
        1e-5
        < max(error for row in content["results"] for error in row["errors"].values())
        < content["bound"]
        == 5e-3
    )


def narrower(*qkv: Tensor, window: tuple[int, ...], **arguments: Any) -> Tensor:
    """One key too few in windowed heads."""
    length = qkv[0].shape[1]
    return hybrid_attention(
        *qkv, window=[size if size >= length else size - 1 for size in window], **arguments
    )


def unfinished(*qkv: Tensor, **arguments: Any) -> Tensor:
    """One value never written."""
    out = hybrid_attention(*qkv, **arguments).clone()
    out[0, 0, 0, 0] = float("nan")
    return out


def one_sided(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """Right output, half the gradient of k."""
    return hybrid_attention(q, (k + k.detach()) / 2, v, **arguments)


def crashing(*qkv: Tensor, **arguments: Any) -> Tensor:
    raise RuntimeError("an illegal memory access was encountered\nlong explanation")


WRONG = {
    narrower: "has the error",
    unfinished: "out has the error nan",
    one_sided: "dk has the error",
    crashing: "an illegal memory access was encountered",
}


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_no_speed_of_a_wrong_backend(
    function: Callable[..., Tensor],
    megaconsa: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        peers, "contestants", lambda device: [OurBackend("reference"), OurBackend("sdpa", function)]
    )
    outcome = megaconsa(
        "bench-attention", *SMALL, "--case", "mixed", "--out", tmp_path / "out.json"
    )
    assert outcome.code == 1
    assert outcome.err.startswith(
        "error: no speed is reported, because sdpa fails the case mixed at batch 2, length 40, window 6"
    )
    assert WRONG[function] in outcome.err
    assert outcome.err.count("\n") == 1
    assert "  reference " in outcome.out
    assert "TFLOP/s" not in outcome.out
    assert not list(tmp_path.iterdir())


class OnCpu(Peer):
    """A peer that may run here."""

    def refusal(self, inputs: Inputs) -> str | None:
        return None


def peer_by(function: Callable[..., Tensor]) -> Contestant:
    def build(shape: Shape, windows: tuple[int, ...]) -> Callable[..., Tensor]:
        return lambda *qkv: function(*qkv, window=windows, backend="reference")

    return OnCpu(function.__name__, build, heads_first=False, windowed=True, launch_per_window=True)


def missing(shape: Shape, windows: tuple[int, ...]) -> Callable[..., Tensor]:
    import package_that_is_not_there  # type: ignore[import-not-found]

    return package_that_is_not_there.attention  # type: ignore[no-any-return]


def test_a_peer_that_fails_is_left_out_with_its_reason(
    done: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = [
        *map(peer_by, (hybrid_attention, narrower, crashing)),
        OnCpu("absent", missing, False, True, True),
    ]
    monkeypatch.setattr(peers, "contestants", lambda device: [OurBackend("sdpa"), *found])
    printed = done(
        "bench-attention",
        *SMALL,
        "--case",
        "mixed",
        "--case",
        "gated-half",
        "--out",
        tmp_path / "out.json",
    )
    content = json.loads((tmp_path / "out.json").read_text())
    timed = [(row["case"], row["contestant"], row["launches"]) for row in content["results"]]
    assert timed == [
        (c, n, k)
        for c in ("mixed", "gated-half")
        for n, k in (("sdpa", 1), ("hybrid_attention", 2))
    ]
    for ours, peer in zip(content["results"][::2], content["results"][1::2], strict=True):
        assert (ours["ratio"], peer["ratio"]) == (ours["total_ms"] / peer["total_ms"], 1)
    assert (
        "not timed: crashing (mixed, gated-half): an illegal memory access was encountered\n"
        in printed
    )
    assert (
        "not timed: absent (mixed, gated-half): package_that_is_not_there is not installed\n"
        in printed
    )
    assert "not timed: narrower (mixed, gated-half): wrong: " in printed
    assert "  hybrid_attention x 2 " in printed


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--case", "mixd"), "--case mixd is unknown; choose one of dense, window, mixed"),
        (("--heads", 5), "--heads 5 must be a multiple of --kv-heads 2"),
        (("--window", 40), "--window 40 must be smaller than --length 40"),
        (("--dtype", "fp8"), "--dtype fp8 is unknown; choose one of bf16, fp16, fp32"),
    ],
)
def test_refused_input(
    arguments: tuple[object, ...], said: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    assert said in refused("bench-attention", *SMALL, *arguments, "--out", tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_file(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "is a folder" in refused("bench-attention", *SMALL, "--out", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(done: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    done(
        "bench-attention",
        "--batch",
        1,
        "--length",
        1000,
        "--window",
        100,
        "--case",
        "dense",
        "--case",
        "gated",
        "--out",
        out,
    )
    content = json.loads(out.read_text())
    timed = {(row["case"], row["contestant"]) for row in content["results"]}
    assert {
        ("dense", "triton"),
        ("dense", "FlexAttention"),
        ("gated", "triton"),
        ("gated", "sdpa"),
    } <= timed
    assert "gated triton / dense triton" in [ratio["name"] for ratio in content["ratios"]]
