"""Faults that end all ranks soon, with the cause on top.

These are a rank that is killed or hangs, a full disk, and data that is damaged or missing.
"""

from __future__ import annotations

import json
import shutil
import signal
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaconsa import incidents, reading
from megaconsa.checkpoint import store
from megaconsa.config import WatchdogSection
from megaconsa.data import shards
from megaconsa.data.flat_shard import FlatShard
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.stream import BatchStream
from megaconsa.parallel.world import ALONE
from megaconsa.reporting.metrics import read_metrics
from megaconsa.train import train
from megaconsa.training.callbacks.watchdog import Watchdog
from tests.support import ROOT
from tests.support.disks import damage_all_rows
from tests.support.ranks import await_step, ended, start, write

MakeConfig = Callable[..., dict[str, Any]]
ENDLESS = {"steps": 100_000}
TWO_GPUS = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
RANK_1_SLEEPS = """
import sys, time
from megaconsa.train import _main
from megaconsa.training.trainer import Trainer

method = Trainer.METHOD
def hanging(trainer):
    if trainer.mesh.world.rank == 1 and trainer.progress.step == 5:
        time.sleep(SECONDS)
    return method(trainer)
Trainer.METHOD = hanging
sys.exit(_main(sys.argv[1:]))
"""
RANK_1_HANGS = RANK_1_SLEEPS.replace("METHOD", "step").replace("SECONDS", "1000")
LAST_READER_HANGS = """
import itertools, os, sys, time
from megaconsa.data.token_shards import TokenShards
from megaconsa.train import _main
from megaconsa.training.callbacks import watchdog

watchdog.GRACE_SECONDS = 1.0
rows = TokenShards.rows
calls = itertools.count()
def hanging(shards, ids):
    is_last = int(os.environ["SLURM_PROCID"]) == int(os.environ["SLURM_NTASKS"]) - 1
    if next(calls) == 8 and is_last:
        time.sleep(1000)
    return rows(shards, ids)
TokenShards.rows = hanging
sys.exit(_main(sys.argv[1:]))
"""
RANK_1_WAITS_FOR_DATA = RANK_1_SLEEPS.replace("METHOD", "_fetch").replace("SECONDS", "10")
DISK_FILLS = f"""
import sys
import time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.support.disks import fill
from megaconsa.checkpoint import store
from megaconsa.train import _main
from megaconsa.training.trainer import Trainer

step = Trainer.step
def filling(trainer):
    if trainer.mesh.world.rank == 0 and trainer.progress.step == 3:
        # The checkpoint of step 2 is written beside training. It must fit.
        while not store.committed(Path(DISK) / "run"):
            time.sleep(0.01)
        fill(Path(DISK))
    return step(trainer)
Trainer.step = filling
sys.exit(_main(sys.argv[1:]))
"""


@DEVICES
def test_a_killed_rank_brings_the_other_down_at_once(
    device: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    # Without checkpoints, so that no save is under way when the rank dies.
    values = make_config(training=ENDLESS, checkpoint={"every": 0})
    run = Path(values["run"]["dir"])
    tasks = start(write(values, tmp_path), device=device)
    await_step(run, 3)
    tasks[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    main, other = ended(tasks)
    assert time.monotonic() - killed < 20
    assert (main.code, other.code) == (76, -signal.SIGKILL)
    assert "\nerror: rank 1 of 2 on " in main.err
    assert "died without a word" in main.err
    assert "Traceback" not in main.err
    # On a loaded machine the ranks may also be recorded as slow.
    found = [(each["kind"], each["rank"]) for each in incidents.read(run)]
    assert [each for each in found if each[0] != "slow_rank"] == [("lost_rank", 0)]


@DEVICES
def test_a_rank_that_hangs_is_given_up_with_its_stacks(
    device: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANK_1_HANGS)
    values = make_config(training=ENDLESS, watchdog={"factor": 5, "minimum_seconds": 12})
    run = Path(values["run"]["dir"])
    main, other = ended(start(write(values, tmp_path), [str(script)], device=device), 150)
    assert (main.code, other.code) == (76, 76), main.err + other.err
    assert "error: nothing has moved for " in main.err + other.err
    (folder,) = (run / "incidents").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank_0.json",
        "rank_0.txt",
        "rank_1.json",
        "rank_1.txt",
    ]
    assert "in train_step" in (folder / "rank_0.txt").read_text()
    assert "in hanging" in (folder / "rank_1.txt").read_text()
    collectives = [
        json.loads((folder / f"rank_{rank}.json").read_text())["entries"] for rank in (0, 1)
    ]
    # The first collective that rank 1 never reached. On a GPU, rank 0 may have started later ones.
    reached = max(entry["record_id"] for entry in collectives[1])
    unmatched = next(entry for entry in collectives[0] if entry["record_id"] == reached + 1)
    assert "all_reduce" in unmatched["profiling_name"]
    # On a loaded machine the ranks may also be recorded as slow.
    found = [(each["kind"], each["step"]) for each in incidents.read(run)]
    assert [each for each in found if each[0] != "slow_rank"] == [("hang", 6)]


def test_a_damaged_shard_ends_all_ranks_with_its_name(
    make_config: MakeConfig, small_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_data, tmp_path / "data")
    shard = next((tmp_path / "data" / "train").glob("shard.*"))
    damage_all_rows(shard)
    values = make_config(data={"path": str(tmp_path / "data")})
    main, other = ended(start(write(values, tmp_path)))
    assert (main.code, other.code) == (1, 1), main.err + other.err
    assert shard.name in main.err + other.err
    assert "Traceback" not in main.err + other.err
    found = incidents.read(Path(values["run"]["dir"]))
    # On a busy machine, ranks also wait long enough for data to say so.
    (incident,) = [each for each in found if each["kind"] != "slow_data"]
    assert incident["kind"] == "error"
    assert shard.name in incident["text"]


def test_a_shard_that_is_lost_while_training_ends_all_ranks_with_its_name(
    make_config: MakeConfig, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are more shards than are open at a time.

    The run resumes when the lost shard is back.
    """
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)
    library = sysconfig.get_paths()["stdlib"]
    data = tmp_path / "data"
    away = tmp_path / "away"
    sources = [f"{library}/{name}" for name in ("json", "email")]
    prepare(
        sources,
        data,
        Options(sequence_length=64, validation_share=0.1),
        tokenizer=small_data / "tokenizer",
    )
    assert len(list((data / "train").glob("shard.*"))) > FlatShard.loaded_at_once
    values = make_config(training=ENDLESS, data={"path": str(data)}, validation={"every": 0})
    run = Path(values["run"]["dir"])
    configuration = write(values, tmp_path)
    tasks = start(configuration)
    await_step(run, 3)
    away.mkdir()
    for shard in (data / "train").glob("shard.*"):
        shard.rename(away / shard.name)
    main, other = ended(tasks)
    assert (main.code, other.code) == (1, 1), main.err + other.err
    assert "shard cannot be read (No such file or directory)" in main.err + other.err
    assert "Traceback" not in main.err + other.err
    shutil.copytree(away, data / "train", dirs_exist_ok=True)
    reached = read_metrics(run / "metrics.jsonl")[-1]["step"]
    tasks = start(configuration)
    await_step(run, reached + 3)
    (run / "stop").touch()
    assert [task.code for task in ended(tasks)] == [0, 0]


def test_data_may_be_waited_for_longer_than_a_step_may_take(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANK_1_WAITS_FOR_DATA)
    values = make_config(training={"steps": 8}, watchdog={"factor": 5, "minimum_seconds": 4})
    main, other = ended(start(write(values, tmp_path), [str(script)]), 150)
    assert (main.code, other.code) == (0, 0), main.err + other.err


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 0)])
def test_a_reader_that_hangs_is_given_up_with_its_file(
    ranks: int, workers: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(LAST_READER_HANGS)
    values = make_config(training=ENDLESS, data={"workers": workers}, watchdog={"data_seconds": 4})
    run = Path(values["run"]["dir"])
    tasks = ended(start(write(values, tmp_path), [str(script)], tasks=ranks))
    assert [task.code for task in tasks] == [76] * ranks, tasks
    found = incidents.read(run)[-1]
    assert (found["kind"], found["rank"]) == ("hang", ranks - 1)
    shard = next(Path(values["data"]["path"], "train").glob("shard.*"))
    assert f"rank {ranks - 1} has waited for its data for " in found["text"]
    assert "(watchdog.data_seconds=4)" in found["text"]
    assert f"the next rows are in {shard.parent}, in {shard.name};" in found["text"]
    assert found["text"] in tasks[-1].err
    (first,) = run.glob("failures/*/first.txt")
    assert found["text"] in first.read_text()


def test_reading_gives_up_before_the_wait_for_data_does() -> None:
    assert WatchdogSection().data_seconds > 1.5 * reading.PATIENCE_SECONDS


@pytest.mark.parametrize("disk", ["8m"], indirect=True)
def test_a_disk_that_fills_up_ends_all_ranks_and_costs_no_step(
    disk: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(DISK_FILLS.replace("DISK", repr(str(disk))))
    values = make_config(run={"dir": str(disk / "run")}, training={"steps": 12})
    configuration = write(values, tmp_path)
    main, other = ended(start(configuration, [str(script)]))
    assert (main.code, other.code) == (76, 76), main.err + other.err
    assert "checkpoint of step 4 could not be written" in main.out
    assert "checkpoint of step 6 could not be written" in main.out
    assert "error: 2 checkpoints in a row could not be written" in main.err + other.err
    assert read_metrics(disk / "run" / "metrics.jsonl")[-1]["step"] <= 9
    assert "Traceback" not in main.err + other.err
    assert [store.read(path).step for path in store.committed(disk / "run")] == [2]
    (disk / "filler").unlink()
    assert [task.code for task in ended(start(configuration))] == [0, 0]
    whole = make_config(run={"dir": str(tmp_path / "whole")}, training={"steps": 12})
    assert [task.code for task in ended(start(write(whole, tmp_path)))] == [0, 0]
    losses = [
        [row["loss"] for row in read_metrics(run / "metrics.jsonl")]
        for run in (disk / "run", tmp_path / "whole")
    ]
    assert losses[0] == losses[1]


def test_what_lies_between_steps_has_a_limit_of_its_own(small_data: Path, tmp_path: Path) -> None:
    """A validation may take longer than a step.

    Once steps have been timed, they have a shorter limit.
    """
    section = WatchdogSection(factor=2, minimum_seconds=0.01, pause_seconds=500)
    stream = BatchStream(small_data, seed=0, global_batch=4, micro_batch=2)
    watchdog = Watchdog(tmp_path, section, ALONE, stream)
    nobody: Any = None  # the watchdog does not use the trainer
    assert watchdog.step_limit == 500
    for _ in range(3):
        watchdog.before_step(nobody)
        time.sleep(0.05)
        watchdog.on_step(nobody, {})
        assert watchdog.deadline - time.monotonic() > 499
    watchdog.before_step(nobody)
    assert 0.09 < watchdog.deadline - watchdog.begun < 0.3
    watchdog.on_finish(nobody)


@pytest.mark.nightly
@pytest.mark.parametrize("hold", ["python", "interpreter"])
def test_a_hang_of_one_process_ends_it_too(
    hold: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    """This works also where a C call holds the interpreter, so that no Python thread runs.

    Then faulthandler's thread ends the process, with code 1.
    """
    held = "time.sleep(1000)"
    if hold == "interpreter":
        held = "import ctypes; ctypes.PyDLL(None).sleep(1000)"
    script = tmp_path / "script.py"
    patched = (
        "import megaconsa.training.callbacks.watchdog as watchdog\nwatchdog.BACKSTOP_SECONDS = 3\n"
    )
    script.write_text(
        patched + RANK_1_HANGS.replace("rank == 1", "rank == 0").replace("time.sleep(1000)", held)
    )
    values = make_config(
        training=ENDLESS, watchdog={"factor": 2, "minimum_seconds": 2, "pause_seconds": 8}
    )
    (task,) = start(write(values, tmp_path), [str(script)], tasks=1)
    (alone,) = ended([task], 150)
    assert alone.code == (1 if hold == "interpreter" else 76), alone.err
    assert "in hanging" in alone.err + "".join(
        path.read_text() for path in Path(values["run"]["dir"]).glob("incidents/*/*.txt")
    )


def test_a_run_that_goes_well_leaves_nothing_of_it(make_config: MakeConfig, tmp_path: Path) -> None:
    values = make_config(training={"steps": 3}, watchdog={"minimum_seconds": 1})
    assert train(write(values, tmp_path), []) == 0
    assert not {"incidents", "incidents.jsonl", "failures"} & {
        path.name for path in Path(values["run"]["dir"]).iterdir()
    }
