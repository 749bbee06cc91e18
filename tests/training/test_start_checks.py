"""Machines on which a run could not work are refused before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.config import build
from megaconsa.exit_codes import LOST
from megaconsa.parallel.world import ALONE
from megaconsa.training import start_checks
from megaconsa.training.inputs import check_inputs
from tests.support.ranks import ended, start, write

MakeConfig = Callable[..., dict[str, Any]]
CHECK = """
import logging, os, sys, time
from pathlib import Path
from megaconsa import config
from megaconsa.console import guarded
from megaconsa.parallel.world import join, leave
from megaconsa.training import start_checks
from megaconsa.training.inputs import check_inputs
from torch import distributed as dist

other = os.environ["SLURM_PROCID"] == "1"
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
FAULT
def main():
    world = join()
    start_checks.check_machines(check_inputs(config.load(Path(sys.argv[1])), world), world)
    leave()
guarded(main)
"""
"""What one rank does before training.

FAULT is replaced by statements that break the machine of the other rank.
"""
ELSEWHERE = "start_checks._appears = lambda path: False"
"""Simulates a node that does not share the folder."""
NO_DATA = """
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.errors import InputError
def missing(folder, cache):
    raise InputError(f"data {folder}: no such folder")
if other:
    DatasetInfo.load = missing
"""
"""Simulates a node without the mount."""
WRONG_SUM = """
all_reduce = dist.all_reduce
def wrong(tensor, *arguments, **named):
    if other and tensor.numel() == 1 and tensor.is_floating_point():
        tensor += 1
    return all_reduce(tensor, *arguments, **named)
dist.all_reduce = wrong
"""
LATE = """
start_checks.SUM_SECONDS = 1
check_sum = start_checks._check_sum
def late(world):
    if other:
        time.sleep(5)
    check_sum(world)
start_checks._check_sum = late
"""
LATE_CLOCK = """
clock = time.time
if other:
    time.time = lambda: clock() - 60
"""


def run_with(fault: str, values: dict[str, Any], folder: Path) -> list[Any]:
    script = folder / "script.py"
    script.write_text(CHECK.replace("FAULT", fault))
    return ended(start(write(values, folder), [str(script)]))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            ELSEWHERE,
            "is not the folder that rank 0 writes in; "
            "put it on a file system that all nodes share (on rank 1 of 2)\n",
        ),
        (NO_DATA, ": no such folder (on rank 1 of 2)\n"),
        (
            WRONG_SUM,
            "error: a sum over all ranks by gloo gave 4 instead of 3; "
            "look at the network between the nodes\n",
        ),
        pytest.param(LATE, "a sum over all ranks by gloo failed (", marks=pytest.mark.nightly),
    ],
    ids=["folder", "data", "sum", "late"],
)
def test_what_cannot_work_now_ends_all_with_the_code_that_requeues(
    fault: str, said: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    values = make_config()
    main, other = run_with(fault, values, tmp_path)
    assert (main.code, other.code) == (LOST, LOST)
    assert said in main.err
    assert main.err.count("\n") == 1
    assert other.err == ""
    assert not Path(values["run"]["dir"]).exists()


def test_clocks_that_differ_are_said(make_config: MakeConfig, tmp_path: Path) -> None:
    main, other = run_with(LATE_CLOCK, make_config(), tmp_path)
    assert (main.code, other.code) == (0, 0)
    assert "the nodes' clocks differ by 60." in main.out
    assert "2 ranks on 1 node, CPU; the sum over all ranks is right, " in main.out


def test_only_empty_folders_are_removed_again(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "study" / "a"
    run.mkdir(parents=True)
    start_checks._remove_empty(run, tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []
    run.mkdir(parents=True)
    other = tmp_path / "runs" / "study" / "b"
    other.mkdir()
    start_checks._remove_empty(run, tmp_path / "runs")
    assert list((tmp_path / "runs" / "study").iterdir()) == [other]


def test_a_process_alone_is_told_nothing_about_others(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = check_inputs(build(make_config()))
    with caplog.at_level(logging.INFO, logger="megaconsa.training.start_checks"):
        start_checks.check_machines(inputs, ALONE)
    (record,) = caplog.records
    assert record.getMessage().startswith("1 process, CPU; ")
    assert "are free" in record.getMessage()
