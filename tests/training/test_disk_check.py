"""A run that keeps more checkpoints than its disk can hold is refused before it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaconsa.checkpoint import store
from megaconsa.config import build
from megaconsa.errors import InputError
from megaconsa.model.flops import parameter_count
from megaconsa.parallel.world import ALONE
from megaconsa.planning.plan import CHECKPOINT_BYTES
from megaconsa.training import start_checks
from megaconsa.training.disk_check import check_disk
from megaconsa.training.inputs import Inputs, check_inputs

MakeConfig = Callable[..., dict[str, Any]]


def inputs_of(values: dict[str, Any]) -> Inputs:
    return check_inputs(build(values))


def checkpoints(values: dict[str, Any]) -> float:
    """Returns how many more checkpoints the run needs room for."""
    inputs = inputs_of(values)
    return check_disk(inputs)[1] / (parameter_count(inputs.model_config).total * CHECKPOINT_BYTES)


@pytest.mark.parametrize("disk", ["1m"], indirect=True)
def test_a_disk_without_room_for_one(disk: Path, make_config: MakeConfig) -> None:
    """A checkpoint of the small model takes 0.6 MB."""
    inputs = inputs_of(make_config(run={"dir": str(disk / "run")}))
    with pytest.raises(
        InputError, match=r"has 1 MiB free for checkpoints .* need .* MiB more: up to 3 of .* each"
    ):
        start_checks.check_machines(inputs, ALONE)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("disk", ["30m"], indirect=True)
@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link"])
def test_two_fit_but_three_do_not(
    linked: bool, disk: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """A checkpoint takes 11.4 MiB. The third one would fail, and each one after it."""
    run = tmp_path / "run" if linked else disk / "run"
    if linked:
        run.mkdir()
        (run / "checkpoints").symlink_to(disk)
    shape = {"hidden_size": 160, "intermediate_size": 480, "head_dim": 16}
    values = make_config(run={"dir": str(run)}, model=shape)
    with pytest.raises(
        InputError, match=r"checkpoint.keep=2 .* lower checkpoint.keep or choose another disk"
    ):
        check_disk(inputs_of(values))
    values["checkpoint"]["keep"] = 1
    free, needed = check_disk(inputs_of(values))
    assert 22 << 20 < needed < free <= 30 << 20


def test_checkpoints_that_stay_for_ever_make_no_room(make_config: MakeConfig, train: Any) -> None:
    """Steps 2 and 4 stay. Step 6 makes room for a later one, so that two more are needed."""
    checkpoint = {"every": 2, "keep": 2, "keep_every": 4}
    train(make_config(checkpoint=checkpoint))
    inputs = inputs_of(make_config(checkpoint=checkpoint))
    assert [path.name for path in inputs.found] == ["step_6", "step_4"]
    longer = build(make_config(checkpoint=checkpoint, training={"steps": 40}))
    _, needed = check_disk(replace(inputs, config=longer))
    assert needed == 2 * parameter_count(inputs.model_config).total * CHECKPOINT_BYTES


def test_what_the_run_holds_already_counts(make_config: MakeConfig, train: Any) -> None:
    values = make_config(checkpoint={"every": 2, "keep": 4})
    assert checkpoints(values) == 5
    train(make_config(checkpoint={"every": 2, "keep": 4}))
    assert len(store.committed(Path(values["run"]["dir"]))) == 3
    assert checkpoints(values) == 1  # the run is over
    for path in store.committed(Path(values["run"]["dir"]))[:-2]:
        path.rename(path.with_name("." + path.name + ".tmp"))
    rest = [int(path.name[5:]) for path in store.committed(Path(values["run"]["dir"]))]
    assert sorted(rest) == [2, 4]
    assert checkpoints(values) == 2  # steps 5 and 6, because the clock may ask at any step
    values["checkpoint"]["minutes"] = 0
    assert checkpoints(values) == 1


@pytest.mark.parametrize(("every", "expected"), [(0, 1), (6, 1), (5, 2), (2, 3), (1, 5)])
def test_no_more_than_the_run_will_write(
    every: int, expected: int, make_config: MakeConfig
) -> None:
    assert (
        checkpoints(make_config(checkpoint={"every": every, "minutes": 0, "keep": 4})) == expected
    )


@pytest.mark.parametrize("disk", ["4m"], indirect=True)
def test_leftovers_of_a_killed_run_are_room(disk: Path, make_config: MakeConfig) -> None:
    values = make_config(run={"dir": str(disk / "run")})
    leftover = disk / "run" / "checkpoints" / ".step_4.tmp" / "model.safetensors"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(bytes(3 << 20))
    free, needed = check_disk(inputs_of(values))
    assert free > 3 << 20 > needed


@pytest.mark.parametrize("disk", ["4m"], indirect=True)
def test_those_that_stay_for_ever_are_told_of(
    disk: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    values = make_config(
        run={"dir": str(disk / "run")},
        training={"steps": 60},
        checkpoint={"every": 2, "keep": 1, "keep_every": 6},
    )
    check_disk(inputs_of(values))
    assert "checkpoint.keep_every=6 keeps 10 more checkpoints" in caplog.text


def test_a_link_to_nowhere(make_config: MakeConfig, tmp_path: Path) -> None:
    values = make_config()
    run = Path(values["run"]["dir"])
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"run/checkpoints is a link to .*gone, which is no folder"
    ):
        inputs_of(values)


def test_the_size_of_a_checkpoint_is_foreseen(
    make_config: MakeConfig, train: Any, caplog: pytest.LogCaptureFixture
) -> None:
    values = make_config()
    inputs = inputs_of(values)
    with caplog.at_level(logging.INFO, "megaconsa"):
        start_checks.check_machines(inputs, ALONE)
    assert "1 process, CPU; " in caplog.text
    train(values)
    _, needed = check_disk(inputs_of(values))
    assert needed == pytest.approx(store.resolve(inputs.config.run.dir).bytes, rel=0.1)
