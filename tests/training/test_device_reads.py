"""After the check of a step, the host needs nothing more from the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaconsa.config import build
from megaconsa.data.stream import Batch
from megaconsa.parallel import mesh
from megaconsa.parallel.context_parallel import ContextParallel
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.step_result import Fault
from megaconsa.parallel.tensor_parallel import TensorParallel
from megaconsa.parallel.world import ALONE
from megaconsa.reporting.metrics import computed
from megaconsa.training.batches import labelled_tokens
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.trainer import Trainer
from megaconsa.upload import upload
from tests.support.planted_nan import nan_in_a_gradient

MakeConfig = Callable[..., dict[str, Any]]
WARM_UP_STEPS = 2
"""They compile kernels, and fill what is kept from step to step."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def build_run(make_config: MakeConfig, run: Path, **sections: dict[str, Any]) -> Trainer:
    values = make_config(run={"dir": str(run)}, **sections)
    return build_trainer(check_inputs(build(values)), mesh.initialize())


def spoil(trainer: Trainer) -> None:
    """Overwrites what the passes have left on the device."""
    engine = trainer.engine
    engine.engine.total_loss.fill_(math.nan)
    engine.optimizer._global_grad_norm.fill_(math.nan)
    if trainer.gates is None:
        return
    for leaf in trainer.gates._leaves:
        assert leaf.grad is not None
        leaf.data.fill_(math.nan)
        leaf.grad.fill_(math.nan)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sections",
    [
        {"allocation": {"source": "rule", "rule": "head-share"}},
        {"gates": {"controller": "evidence"}},
        {"gates": {"controller": "paper", "learning_rate": 1.0}},
    ],
    ids=["train", "evidence", "paper"],
)
def test_the_check_has_read_all_that_a_row_holds(
    sections: dict[str, Any],
    precision: str,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows and gates are the same if everything is overwritten right after the check.

    On a GPU, reading it later would wait for AdamW.
    """
    plain, spoiled = [
        build_run(make_config, tmp_path / name, **sections, training={"precision": precision})
        for name in ("plain", "spoiled")
    ]
    check = spoiled._check

    def check_and_spoil(loss: float, grad_norm: float) -> Fault | None:
        fault = check(loss, grad_norm)
        spoil(spoiled)
        return fault

    monkeypatch.setattr(spoiled, "_check", check_and_spoil)
    for _ in range(3):
        first, second = computed([plain.step(), spoiled.step()])
        assert first == second
        assert first["loss"] is not None
        assert first["grad_norm"] is not None
    if plain.gates is not None:
        assert spoiled.gates is not None
        theirs = spoiled.gates.state()
        for name, tensor in plain.gates.state().items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_known_where_the_check_is_not_called(
    precision: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    """DeepSpeed itself refuses a gradient that is not finite. The loss may be finite then."""
    trainer = build_run(make_config, tmp_path / "bad", training={"precision": precision})
    with nan_in_a_gradient(trainer.engine):
        row = trainer.step()
    assert row["skipped"] == 1
    assert row["grad_norm"] is None
    untouched = build_run(make_config, tmp_path / "good", training={"precision": precision})
    assert row["loss"] == untouched.step()["loss"]


def test_a_rank_alone_agrees_with_itself_without_its_device() -> None:
    # No value can be read from this device.
    world = replace(ALONE, device=torch.device("meta"))
    alone = Mesh(world, None, 0, 1, 0, 1, ContextParallel(), TensorParallel(), None)
    labels = torch.tensor([[1, -100, 2, 3]])
    ids = torch.zeros_like(labels)
    batch = Batch(tokens=labels, labels=labels, documents=ids, sequences=torch.tensor([0]))
    assert labelled_tokens([batch, batch], alone) == 6
    assert alone.all_reduce_max(3) == 3


def test_an_upload_is_exact() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    cpu = torch.device("cpu")
    assert upload(values, cpu) is values
    assert torch.equal(upload(values.t(), cpu), values.t())


def test_steps_leave_no_events_behind(make_config: MakeConfig, tmp_path: Path) -> None:
    """DeepSpeed's timers would keep two events of every step of a run."""
    trainer = build_run(make_config, tmp_path / "run")
    for _ in range(2):
        trainer.step()
    timers = trainer.engine.engine.timers.get_timers()
    kept = {name: len(timer.event_timers) for name, timer in timers.items()}
    assert kept["train_batch"] == 0
    trainer.step()
    assert {name: len(timer.event_timers) for name, timer in timers.items()} == kept


@pytest.fixture
def sync_errors() -> Iterator[Callable[[bool], None]]:
    """Turns on and off that torch refuses to wait for the GPU. It is off after the test."""

    def switch(on: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


@pytest.mark.gpu
@needs_gpu
def test_an_upload_waits_for_nothing(sync_errors: Callable[[bool], None]) -> None:
    cuda = torch.device("cuda", torch.cuda.current_device())
    ones = torch.ones(3)
    sources = [torch.arange(6.0).reshape(2, 3).t(), ones.expand(4, 3), torch.ones(2, device=cuda)]
    expected = [source.clone() for source in sources]
    sync_errors(True)
    uploaded = [upload(source, cuda) for source in sources]
    # The host may overwrite its own tensor at once.
    ones.fill_(7)
    sync_errors(False)
    for found, values in zip(uploaded, expected, strict=True):
        assert found.device == cuda
        assert torch.equal(found.cpu(), values.cpu())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "allocation",
    [{"source": "learn"}, {"source": "rule", "rule": "head-share"}],
    ids=["learn", "train"],
)
def test_the_host_waits_only_before_adamw(
    allocation: dict[str, Any],
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sync_errors: Callable[[bool], None],
) -> None:
    """From the check of a step to the optimizer of the next one, torch would refuse any wait.

    The tested backend reads nothing. flash-attn must know the documents' bounds on the host.
    """
    trainer = build_run(
        make_config,
        tmp_path / "run",
        allocation=allocation,
        model={"head_dim": 64},
        attention={"backend": "triton"},
        training={"precision": "bf16", "steps": 8},
    )
    for _ in range(WARM_UP_STEPS):
        trainer.step()
    check = trainer._check
    optimize = trainer.engine.optimizer.step
    checked = 0

    def check_and_refuse_waits(loss: float, grad_norm: float) -> Fault | None:
        nonlocal checked
        fault = check(loss, grad_norm)
        checked += 1
        sync_errors(True)
        return fault

    def allow_waits_and_optimize() -> None:
        sync_errors(False)
        optimize()

    def refuse(device: Any = None) -> None:
        raise AssertionError("the host waits for the whole device")

    monkeypatch.setattr(trainer, "_check", check_and_refuse_waits)
    monkeypatch.setattr(trainer.engine.optimizer, "step", allow_waits_and_optimize)
    # The debug mode does not cover it.
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    for _ in range(3):
        row = trainer.step()
        trainer._agree()
        assert row["loss"] is not None
    assert checked == 3
