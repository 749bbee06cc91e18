"""Which backend serves a call, what `auto` logs about it, and that the choice compiles."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels import Problem, choose_backend, find_backend, hybrid_attention
from megaconsa.kernels.attention import backends, flash_library

CPU = Problem(
    device=torch.device("cpu"),
    dtype=torch.bfloat16,
    batch=4,
    length=8192,
    heads=16,
    kv_heads=2,
    head_dim=128,
    windows=(1024, 1024),
    gated=False,
    packed=False,
    scale=128**-0.5,
)
GPU = replace(CPU, device=torch.device("cuda"))
MIXED = (1024, FULL_WINDOW)
NOT_INSTALLED = "flash needs the package flash-attn-4 on this GPU; install it"


@pytest.fixture(autouse=True)
def _no_choice_is_remembered() -> Iterator[None]:
    backends._choose_once.cache_clear()
    backends._said.clear()
    yield
    backends._choose_once.cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Simulates a GPU with or without FlashAttention. Nothing runs on it."""
    missing = None if request.param else NOT_INSTALLED
    monkeypatch.setattr(flash_library, "missing", lambda device: missing)
    monkeypatch.setattr(flash_library, "served_head_dims", lambda device: (72, 128))
    monkeypatch.setattr(flash_library, "_capability", lambda device: 9)


@pytest.mark.parametrize(
    ("library", "problem", "name"),
    [
        (True, GPU, "flash"),
        (True, replace(GPU, windows=(FULL_WINDOW, 8192)), "flash"),
        (True, replace(GPU, windows=MIXED), "flash"),
        (True, replace(GPU, gated=True, length=8192), "flash"),
        (True, replace(GPU, gated=True, length=4095), "triton"),
        (True, replace(GPU, gated=True, length=8192, closed=1), "triton"),
        (True, replace(GPU, gated=True, length=32768, closed=1), "flash"),
        (False, replace(GPU, gated=True, length=8192), "triton"),
        (True, replace(GPU, packed=True), "triton"),
        (True, replace(GPU, packed=True, gated=True), "triton"),
        (True, replace(GPU, dtype=torch.float32), "triton"),
        (True, replace(GPU, head_dim=72, windows=MIXED), "flash"),
        (True, replace(GPU, head_dim=72, gated=True), "flash"),
        (True, replace(GPU, head_dim=72, packed=True), "flash"),
        (True, replace(GPU, head_dim=20), "sdpa"),
        (True, replace(GPU, dtype=torch.float64), "sdpa"),
        (False, GPU, "triton"),
        (False, replace(GPU, head_dim=72), "sdpa"),
        (True, CPU, "sdpa"),
        (True, replace(CPU, gated=True, dtype=torch.float32), "sdpa"),
        (True, replace(CPU, windows=MIXED, dtype=torch.float32), "sdpa"),
    ],
    indirect=["library"],
)
@pytest.mark.usefixtures("library")
def test_auto_takes_the_fastest_that_serves(problem: Problem, name: str) -> None:
    pytest.importorskip("triton")
    assert choose_backend("auto", problem).name == name


@pytest.mark.parametrize("library", [True], indirect=True)
@pytest.mark.usefixtures("library")
def test_gated_heads_stay_with_triton_on_gpus_that_were_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(flash_library, "_capability", lambda device: 8)
    assert choose_backend("auto", replace(GPU, gated=True)).name == "triton"
    assert choose_backend("auto", GPU).name == "flash"


def test_the_kernels_can_be_imported_without_triton() -> None:
    """A finished model then runs by sdpa."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from megaconsa.kernels import hybrid_attention
q = torch.randn(1, 8, 2, 16)
print(hybrid_attention(q, q, q, window=4, gate=torch.tensor([0.5, 0.0])).shape)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("library", "problem", "said"),
    [
        (True, replace(GPU, gated=True), "takes triton: gates in one pass"),
        (
            False,
            GPU,
            "takes triton: a window for each head in one pass, "
            "because flash needs the package flash-attn-4 on this GPU",
        ),
        (
            True,
            replace(CPU, gated=True),
            "takes sdpa: two calls for gated heads, "
            "because triton needs a CUDA GPU and flash needs a CUDA GPU",
        ),
    ],
    indirect=["library"],
)
@pytest.mark.usefixtures("library")
def test_auto_says_once_what_it_takes_and_why(
    problem: Problem, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.INFO, logger="megaconsa.kernels"):
        for length in (100, 200, 200):
            choose_backend("auto", replace(problem, length=length))
        choose_backend("sdpa", problem)
    assert [record.getMessage() for record in caplog.records] == [f"attention.backend=auto {said}"]


@pytest.mark.parametrize("library", [True], indirect=True)
@pytest.mark.usefixtures("library")
def test_gated_and_finished_heads_are_one_choice_and_checks_say_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="megaconsa.kernels"):
        find_backend("auto", GPU)
        assert caplog.records == []
        for gated in (True, False):
            choose_backend("auto", replace(CPU, gated=gated))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("library", "name", "problem", "message"),
    [
        (
            True,
            "cudnn",
            CPU,
            "backend cudnn is unknown; choose one of auto, reference, sdpa, triton, flash",
        ),
        (True, "flash", CPU, "flash needs a CUDA GPU; take sdpa"),
        (False, "flash", GPU, "flash-attn-4 on this GPU; install it"),
        (
            True,
            "flash",
            replace(GPU, dtype=torch.float32),
            "bf16 and fp16, not torch.float32; set training.precision=bf16",
        ),
        (True, "flash", replace(GPU, head_dim=20), "head_dim 20 on this GPU"),
        (
            True,
            "flash",
            replace(GPU, head_dim=264),
            "head_dim 264 on this GPU; take triton or sdpa",
        ),
    ],
    indirect=["library"],
)
@pytest.mark.usefixtures("library")
def test_a_named_backend_that_cannot_serve_is_refused(
    name: str, problem: Problem, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend(name, problem)


def test_triton_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed; install the package triton"):
        choose_backend("triton", GPU)


@pytest.mark.parametrize(
    ("capability", "package"),
    [
        (7, None),
        (8, "flash-attn"),
        (9, "flash-attn-4"),
        (10, "flash-attn-4"),
        (11, "flash-attn-4"),
        (12, "flash-attn"),
    ],
)
def test_the_package_for_each_gpu_is_named(
    capability: int, package: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(flash_library, "import_module", absent)
    monkeypatch.setattr(flash_library, "_capability", lambda device: capability)
    flash_library._flash_attn_2.cache_clear()
    flash_library._flash_attn_4.cache_clear()
    said = str(flash_library.missing(GPU.device))
    if package is None:
        assert "compute capability 8.0" in said
    else:
        assert f"needs the package {package} on this GPU (No module named 'flash_attn." in said


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_every_call_compiles_without_a_graph_break(backend: str, dynamic: bool | None) -> None:
    def run(
        q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, documents: Tensor | None
    ) -> Tensor:
        window = 5 if gate is not None else (5, FULL_WINDOW)
        return hybrid_attention(
            q, k, v, window=window, gate=gate, documents=documents, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (12, 16):
        generator = torch.Generator().manual_seed(length)
        q, k, v = (
            torch.randn(2, length, heads, 16, generator=generator, requires_grad=True)
            for heads in (4, 2, 2)
        )
        gate = torch.rand(2, 2, generator=generator).requires_grad_()
        documents = (torch.arange(length) // 7).expand(2, -1).int().contiguous()
        for arguments in ((gate, None), (None, None), (None, documents)):
            leaves = [q, k, v] if arguments[0] is None else [q, k, v, gate]
            results = []
            for function in (run, compiled):
                out = function(q, k, v, *arguments)
                results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager)
