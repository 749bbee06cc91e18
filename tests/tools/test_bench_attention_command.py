"""The command bench-attention: what it writes, what it refuses, and backends that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaconsa.benchmarks.attention import peers
from megaconsa.benchmarks.attention.cases import Inputs, Shape
from megaconsa.benchmarks.attention.contestants import Contestant, OurBackend, Peer
from megaconsa.kernels import hybrid_attention
from megaconsa.tools import bench_attention
from tests.support.bench_problems import NAMES

pytestmark = pytest.mark.usefixtures("no_gpu")

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
    packed = {case["name"] for case in content["cases"] if case["packed"]}
    assert packed == {"packed", "packed-mixed", "packed-gated"}
    assert content["cases"][6]["forward_flops"] < content["cases"][0]["forward_flops"]
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
            {"dz"} if "gated" in row["case"] else set()
        )
        assert max(row["errors"].values()) < content["bound"] == 1e-5
    for said in ("No GPU", "TFLOP/s", "gated-partly", "packed-mixed", f"wrote {out}"):
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
    """Leaves out one key in windowed heads."""
    length = qkv[0].shape[1]
    return hybrid_attention(
        *qkv, window=[size if size >= length else size - 1 for size in window], **arguments
    )


def unfinished(*qkv: Tensor, **arguments: Any) -> Tensor:
    """Leaves one value unwritten."""
    out = hybrid_attention(*qkv, **arguments).clone()
    out[0, 0, 0, 0] = float("nan")
    return out


def one_sided(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """Returns the correct output, but half of the gradient of k."""
    return hybrid_attention(q, (k + k.detach()) / 2, v, **arguments)


def across_documents(*qkv: Tensor, documents: Tensor | None, **arguments: Any) -> Tensor:
    """Ignores where documents start."""
    return hybrid_attention(*qkv, **arguments)


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
        "error: no speed is reported, because sdpa fails the case mixed "
        "at batch 2, length 40, window 6"
    )
    assert WRONG[function] in outcome.err
    assert outcome.err.count("\n") == 1
    assert "  reference " in outcome.out
    assert "TFLOP/s" not in outcome.out
    assert not list(tmp_path.iterdir())


def test_no_speed_of_a_backend_that_mixes_documents(
    megaconsa: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        peers, "contestants", lambda device: [OurBackend("reference", across_documents)]
    )
    outcome = megaconsa("bench-attention", *SMALL, "--case", "dense", "--case", "packed")
    assert outcome.code == 1
    assert "reference fails the case packed " in outcome.err


class OnCpu(Peer):
    """A peer that may run on this CPU."""

    def refusal(self, inputs: Inputs) -> str | None:
        return None


def peer_by(function: Callable[..., Tensor]) -> Contestant:
    def build(
        shape: Shape, windows: tuple[int, ...], documents: Tensor | None
    ) -> Callable[..., Tensor]:
        return lambda *qkv: function(*qkv, window=windows, backend="reference")

    return OnCpu(function.__name__, build, heads_first=False, windowed=True, launch_per_window=True)


def missing(
    shape: Shape, windows: tuple[int, ...], documents: Tensor | None
) -> Callable[..., Tensor]:
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


def test_the_help_names_every_case() -> None:
    assert bench_attention.CASES.split(", ") == NAMES


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
        "--case",
        "packed",
        "--case",
        "packed-mixed",
        "--case",
        "packed-gated",
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
        ("packed", "triton"),
        ("packed", "FlexAttention"),
        ("packed-mixed", "triton"),
        ("packed-mixed", "FlexAttention"),
        ("packed-gated", "triton"),
    } <= timed
    assert "gated triton / dense triton" in [ratio["name"] for ratio in content["ratios"]]
