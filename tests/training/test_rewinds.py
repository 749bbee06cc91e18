"""A run goes back after a spike and skips the batches that led to it.

Interruptions do not change this.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa import incidents, run_folder
from megaconsa.checkpoint import store
from megaconsa.config import build
from megaconsa.errors import InputError, RunError
from megaconsa.parallel import mesh
from megaconsa.reporting.metrics import computed, read_metrics
from megaconsa.training import bad_steps
from megaconsa.training.callbacks.rewinds import rewound
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.trainer import Trainer
from tests.support import ROOT
from tests.support.ranks import ended, start, write
from tests.support.spikes import spike_in

MakeConfig = Callable[..., dict[str, Any]]
SPIKE_ON_RANK_1 = f"""
import os, sys
from contextlib import nullcontext
sys.path.insert(0, {str(ROOT)!r})
from megaconsa.train import _main
from megaconsa.training import bad_steps
from tests.support.spikes import spike_in

bad_steps.LEAST = 4
with spike_in(7) if os.environ["SLURM_PROCID"] == "1" else nullcontext():
    sys.exit(_main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes spikes count after four steps."""
    monkeypatch.setattr(bad_steps, "LEAST", 4)


def trainer_of(values: dict[str, Any]) -> Trainer:
    return build_trainer(check_inputs(build(values)), mesh.initialize())


def released(trainer: Trainer) -> Trainer:
    """Makes a trainer that is no longer needed release the run folder."""
    for callback in trainer.callbacks:
        callback.on_finish(trainer)
    return trainer


def spiky(
    make_config: MakeConfig, tmp_path: Path, name: str = "run", limit: int = 3
) -> dict[str, Any]:
    return make_config(
        run={"dir": str(tmp_path / name)},
        training={"steps": 10},
        checkpoint={"every": 4},
        bad_steps={"spikes": "rewind", "deviations": 50.0, "limit": limit},
    )


def test_it_goes_on_behind_the_spike(make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
    """The reference is a run that was stopped after the same checkpoint.

    Its stream is advanced by hand.
    """
    values = spiky(make_config, tmp_path)
    run = tmp_path / "run"
    with spike_in(7):
        assert not trainer_of(values).run()
    newest = store.newest(run)
    assert newest is not None
    assert newest.step == 4
    assert json.loads((run / run_folder.REWINDS).read_text()) == [{"step": 7, "sequences": 28}]
    assert [(entry["kind"], entry["step"]) for entry in incidents.read(run)] == [
        ("skipped", 7),
        ("rewind", 7),
    ]
    train(values)

    by_hand = spiky(make_config, tmp_path, "by_hand")
    with spike_in(7):
        assert not trainer_of(by_hand).run()
    (tmp_path / "by_hand" / run_folder.REWINDS).unlink()
    trainer = trainer_of(by_hand)
    assert trainer.progress.sequences == 16
    for _ in range(3):
        next(trainer.steps)
    trainer.progress.sequences = 28
    assert trainer.run()
    found, truth = (
        computed(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("run", "by_hand")
    )
    assert found == truth
    assert [row["step"] for row in found] == list(range(1, 11))
    assert found[-1]["skipped"] == 0


def test_it_passes_over_them_once(make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
    values = spiky(make_config, tmp_path)
    with spike_in(7):
        assert not trainer_of(values).run()
    interrupted = trainer_of(values)
    assert (interrupted.progress.step, interrupted.progress.sequences, interrupted.rewinds) == (
        4,
        28,
        1,
    )
    interrupted.request_stop()
    assert not interrupted.run()
    resumed = released(trainer_of(values))
    assert (resumed.progress.step, resumed.progress.sequences) == (5, 28 + 4)
    rows = train(values)
    whole = spiky(make_config, tmp_path, "whole")
    with spike_in(7):
        assert not trainer_of(whole).run()
    assert computed(rows) == computed(train(whole))


def test_it_does_not_go_back_for_ever(make_config: MakeConfig, tmp_path: Path) -> None:
    values = spiky(make_config, tmp_path, limit=2)
    for step in (7, 6):
        with spike_in(step if step == 7 else 2):
            assert not trainer_of(values).run()
    with (
        spike_in(3),
        pytest.raises(
            RunError,
            match=r"newest checkpoint 2 times \(bad_steps.limit=2\) "
            r"and met a spike again, in step 7",
        ),
    ):
        trainer_of(values).run()


def test_a_spike_in_the_last_step(make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
    values = spiky(make_config, tmp_path)
    with spike_in(10):
        assert not trainer_of(values).run()
    assert len(train(values)) == 10


def test_a_damaged_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / run_folder.REWINDS).write_text('[{"step": 3}]')
    with pytest.raises(
        InputError,
        match=r"rewinds.json cannot be read as a list of steps and sequences; restore it",
    ):
        rewound(tmp_path, 1, 4)


def test_two_ranks_go_back_together(make_config: MakeConfig, tmp_path: Path) -> None:
    values = spiky(make_config, tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SPIKE_ON_RANK_1)
    tasks = ended(start(write(values, tmp_path), [str(script)]))
    assert [task.code for task in tasks] == [75, 75], tasks
    assert json.loads((tmp_path / "run" / run_folder.REWINDS).read_text()) == [
        {"step": 7, "sequences": 28}
    ]
    resumed = released(trainer_of(values))
    assert (resumed.progress.step, resumed.progress.sequences) == (4, 28)
