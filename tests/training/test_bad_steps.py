"""Which steps are skipped.

A skipped step leaves weights, moments, gates and multipliers unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megaconsa.config import BadStepsSection, build
from megaconsa.errors import RunError
from megaconsa.parallel import mesh
from megaconsa.parallel.step_result import Fault
from megaconsa.reporting.metrics import computed
from megaconsa.training import bad_steps
from megaconsa.training.bad_steps import BadSteps, deviations
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.trainer import Trainer

MakeConfig = Callable[..., dict[str, Any]]
SPIKES = BadStepsSection(spikes="skip")


def settled() -> BadSteps:
    """The state after 200 applied steps.

    The loss falls from 3 to 2.6 with a noise of 0.02, and norms are around 0.5.
    """
    draw = random.Random(0)
    found = BadSteps()
    for step in range(200):
        numbers = {
            "loss": 3 - step / 500 + draw.gauss(0, 0.02),
            "grad_norm": 0.5 * 2 ** draw.gauss(0, 0.15),
        }
        assert found.fault(SPIKES, numbers) is None, step
        found.applied(**numbers)
    return found


def test_what_is_not_finite_is_named() -> None:
    for name in ("loss", "grad_norm", "gate_grad_norm"):
        numbers = {"loss": 2.0, "grad_norm": 0.5, "gate_grad_norm": 0.1} | {name: float("nan")}
        assert BadSteps().fault(BadStepsSection(), numbers) == Fault(f"its {name} is nan")


def test_spikes_are_told_from_noise_and_only_where_asked_for() -> None:
    run = settled()
    assert len(run.losses) == len(run.grad_norms) == bad_steps.WINDOW
    for numbers in ({"loss": 4.5, "grad_norm": 0.5}, {"loss": 2.6, "grad_norm": 6.0}):
        fault = run.fault(SPIKES, numbers)
        assert fault is not None
        assert fault.is_spike
        assert "deviations above" in fault.reason
        assert run.fault(BadStepsSection(), numbers) is None
    assert run.fault(SPIKES, {"loss": 1.0, "grad_norm": 0.01}) is None  # a fall is not a spike
    too_few = BadSteps(losses=run.losses[: bad_steps.LEAST - 1])
    assert too_few.fault(SPIKES, {"loss": 100.0, "grad_norm": 0.5}) is None


def test_a_spike_does_not_hide_the_next() -> None:
    run = settled()
    before = deviations(4.5, run.losses)
    run.losses[-10:] = [50.0] * 10
    assert deviations(4.5, run.losses) > before / 2


def test_a_constant_loss_does_not_make_a_spike_of_a_hundredth() -> None:
    assert deviations(2.02, [2.0] * 100) == pytest.approx(1.0)


def test_too_many_in_a_row_end_the_run() -> None:
    run = BadSteps()
    section = BadStepsSection(limit=2)
    run.skip(section, 7, "its loss is nan")
    run.applied(2.0, 0.5)
    run.skip(section, 9, "its loss is nan")
    with pytest.raises(
        RunError,
        match=r"2 steps in a row, up to step 10, were not applied "
        r"\(bad_steps.limit=2\): .*its loss is nan",
    ):
        run.skip(section, 10, "its loss is nan")
    assert run.skipped == 3


def held(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies everything that a step may change."""
    assert trainer.gates is not None
    own = dict(trainer.engine.weights()) | dict(trainer.engine.moments()) | trainer.gates.state()
    return {name: tensor.clone() for name, tensor in own.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_spike_is_skipped_whole(
    precision: str, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    values = make_config(training={"precision": precision}, bad_steps={"spikes": "skip"})
    trainer = build_trainer(check_inputs(build(values)), mesh.initialize())
    trainer.step()
    # Compared with these losses, any loss of a fresh model is a spike.
    trainer.progress.bad_steps.losses = [0.001] * bad_steps.LEAST
    before = held(trainer)
    row = trainer.step()
    assert row["skipped"] == 1
    assert row["loss"] > 1
    assert row["grad_norm"] > 0
    assert "step 2 was not applied: its loss of " in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in held(trainer).items())
    assert trainer.engine.optimizer_steps == 1
    trainer.progress.bad_steps.losses = []
    assert trainer.step()["skipped"] == 1
    assert not torch.equal(before["evidence.sum"], held(trainer)["evidence.sum"])


def test_what_was_seen_of_steps_is_resumed(
    make_config: MakeConfig, train: Any, tmp_path: Path
) -> None:
    from megaconsa.checkpoint import store

    def config(name: str, **sections: Any) -> dict[str, Any]:
        return make_config(run={"dir": str(tmp_path / name)}, **sections)

    whole = train(config("whole"))
    stopped = config("stopped")
    trainer = build_trainer(check_inputs(build(stopped)), mesh.initialize())
    step = trainer.step

    def stop_at_3() -> dict[str, Any]:
        if trainer.progress.step == 2:
            trainer.request_stop()
        return step()

    trainer.step = stop_at_3  # type: ignore[method-assign]
    assert not trainer.run()
    resumed = build_trainer(check_inputs(build(stopped)), mesh.initialize())
    assert asdict(resumed.progress.bad_steps) == asdict(trainer.progress.bad_steps)
    assert len(resumed.progress.bad_steps.losses) == 3
    for callback in resumed.callbacks:
        callback.on_finish(resumed)
    assert computed(train(stopped)) == computed(whole)
    final = store.resolve(tmp_path / "stopped").state["bad_steps"]
    assert final == store.resolve(tmp_path / "whole").state["bad_steps"]
