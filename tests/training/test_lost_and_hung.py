"""A rank that is killed, or hangs in a collective, brings all others down soon, with the cause on top and an exit code that tells."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import await_step, ended, start, write

from megaconsa import incidents
from megaconsa.config import WatchdogSection
from megaconsa.parallel.world import ALONE
from megaconsa.train import train
from megaconsa.training.callbacks.watchdog import Watchdog

MakeConfig = Callable[..., dict[str, Any]]
ENDLESS = {"steps": 100_000}
RANK_1_HANGS = """
import sys, time
from megaconsa.train import _main
from megaconsa.training.trainer import Trainer

step = Trainer.step
def hanging(trainer):
    if trainer.mesh.world.rank == 1 and trainer.progress.step == 5:
        time.sleep(1000)
    return step(trainer)
Trainer.step = hanging
sys.exit(_main(sys.argv[1:]))
"""


def test_a_killed_rank_brings_the_other_down_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    values = make_config(training=ENDLESS)
    run = Path(values["run"]["dir"])
    tasks = start(write(values, tmp_path))
    await_step(run, 3)
    tasks[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    main, other = ended(tasks)
    assert time.monotonic() - killed < 20
    assert (main.code, other.code) == (76, -signal.SIGKILL)
    assert "\nerror: rank 1 of 2 on " in main.err
    assert "died without a word" in main.err
    assert "Traceback" not in main.err
    (incident,) = incidents.read(run)
    assert (incident["kind"], incident["rank"]) == ("lost_rank", 0)


def test_a_rank_that_hangs_is_given_up_with_its_stacks(make_config: MakeConfig, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANK_1_HANGS)
    values = make_config(training=ENDLESS, watchdog={"factor": 5, "minimum_seconds": 5})
    run = Path(values["run"]["dir"])
    main, other = ended(start(write(values, tmp_path), [str(script)]), 150)
    assert (main.code, other.code) == (76, 76), main.err + other.err
    assert "error: nothing has moved for " in main.err + other.err
    (folder,) = (run / "incidents").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0.json", "rank_0.txt", "rank_1.json", "rank_1.txt"]
    assert "all_reduce" in (folder / "rank_0.txt").read_text()
    assert "in hanging" in (folder / "rank_1.txt").read_text()
    collectives = [json.loads((folder / f"rank_{rank}.json").read_text())["entries"] for rank in (0, 1)]
    # The one that rank 1 never came to.
    latest = [max(entry["record_id"] for entry in entries) for entries in collectives]
    assert latest[0] == latest[1] + 1
    (incident,) = incidents.read(run)
    assert incident["kind"] == "hang"
    assert incident["step"] == 6


def test_a_damaged_shard_ends_all_ranks_with_its_name(make_config: MakeConfig, small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data, tmp_path / "data")
    shard = next((tmp_path / "data" / "train").glob("shard.*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    values = make_config(data={"path": str(tmp_path / "data")})
    main, other = ended(start(write(values, tmp_path)))
    assert (main.code, other.code) == (1, 1), main.err + other.err
    assert shard.name in main.err + other.err
    assert "Traceback" not in main.err + other.err
    (incident,) = incidents.read(Path(values["run"]["dir"]))
    assert incident["kind"] == "error"
    assert shard.name in incident["text"]


def test_what_lies_between_steps_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """A validation that takes longer than a step may; as soon as steps have been timed, their own limit holds."""
    watchdog = Watchdog(tmp_path, WatchdogSection(factor=2, minimum_seconds=0.01, pause_seconds=500), ALONE)
    nobody: Any = None
    assert watchdog.step_limit == 500
    for _ in range(3):
        watchdog.before_step(nobody)
        time.sleep(0.05)
        watchdog.on_step(nobody, {})
        assert watchdog.deadline - time.monotonic() > 499
    watchdog.before_step(nobody)
    assert 0.09 < watchdog.deadline - watchdog.begun < 0.3
    watchdog.on_finish(nobody)


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["python", "interpreter"])
def test_a_hang_of_one_process_ends_it_too(hold: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """Also where a C call holds the interpreter, so that no Python thread runs: then by faulthandler's thread, with code 1."""
    held = "import ctypes; ctypes.PyDLL(None).sleep(1000)" if hold == "interpreter" else "time.sleep(1000)"
    script = tmp_path / "script.py"
    patched = "import megaconsa.training.callbacks.watchdog as watchdog\nwatchdog.BACKSTOP_SECONDS = 3\n"
    script.write_text(patched + RANK_1_HANGS.replace("rank == 1", "rank == 0").replace("time.sleep(1000)", held))
    values = make_config(training=ENDLESS, watchdog={"factor": 2, "minimum_seconds": 2, "pause_seconds": 8})
    (task,) = start(write(values, tmp_path), [str(script)], tasks=1)
    (alone,) = ended([task], 150)
    assert alone.code == (1 if hold == "interpreter" else 76), alone.err
    assert "in hanging" in alone.err + "".join(path.read_text() for path in Path(values["run"]["dir"]).glob("incidents/*/*.txt"))


def test_a_run_that_goes_well_leaves_nothing_of_it(make_config: MakeConfig, tmp_path: Path) -> None:
    values = make_config(training={"steps": 3}, watchdog={"minimum_seconds": 1})
    assert train(write(values, tmp_path), []) == 0
    assert not {"incidents", "incidents.jsonl", "failures"} & {path.name for path in Path(values["run"]["dir"]).iterdir()}
