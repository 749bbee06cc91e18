"""Checkpoints written in the background: what is kept, what waits, what a failed write costs."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaconsa.checkpoint import store, writer
from megaconsa.checkpoint.writer import Snapshot, Staging, Writer
from megaconsa.config import build
from megaconsa.errors import InputError, RunError, UnreachableError
from megaconsa.parallel import mesh
from megaconsa.reporting.metrics import read_metrics
from megaconsa.tensor_files import Rows
from megaconsa.training.callbacks.metrics_file import MetricsFile
from megaconsa.training.callbacks.run_lock import RunLock
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.trainer import Callback, Row, Trainer
from tests.support.disks import fill

MakeConfig = Callable[..., dict[str, Any]]


def snapshot(step: int) -> Snapshot:
    weights = {"model.norm.weight": torch.full((4,), float(step))}
    return Snapshot(
        step,
        weights,
        {f"exp_avg/{name}": value for name, value in weights.items()},
        {},
        {"step": step},
    )


def kept(run: Path) -> list[int]:
    return [store.read(path).step for path in store.committed(run)]


def save(of_run: Writer, step: int) -> None:
    of_run.begin(snapshot(step))
    result = of_run.wait()
    assert result is not None
    assert (result.step, result.error) == (step, None)


def test_every_so_many_stay_for_ever(tmp_path: Path) -> None:
    of_run = Writer(tmp_path, keep=2, keep_every=20)
    for step in range(5, 60, 5):
        save(of_run, step)
    assert kept(tmp_path) == [55, 50, 40, 20]


def test_a_replaced_checkpoint_goes_after_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_run = Writer(tmp_path, keep=1)
    save(of_run, 1)

    real = writer.shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.name.endswith(".old") and path.exists():
            raise OSError("killed while it removes")
        real(path, ignore_errors)

    monkeypatch.setattr(writer.shutil, "rmtree", killed)
    of_run.begin(snapshot(1))
    of_run.wait()
    monkeypatch.undo()
    newest = store.newest(tmp_path)
    assert newest is not None
    assert newest.step == 1


def test_one_that_is_read_stays_until_it_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_run = Writer(tmp_path, keep=1)
    save(of_run, 1)
    with store.resolve(tmp_path).in_use(), caplog.at_level(logging.INFO, "megaconsa"):
        save(of_run, 2)
        assert kept(tmp_path) == [2, 1]
        assert "it is being read" in caplog.text
    save(of_run, 3)
    assert kept(tmp_path) == [3]


def test_begin_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    save_file = writer.save_file
    monkeypatch.setattr(
        writer, "save_file", lambda *arguments: may_write.wait(60) and save_file(*arguments)
    )
    of_run = Writer(tmp_path, keep=1)
    of_run.begin(snapshot(1))
    assert of_run.poll() is None
    assert of_run.wait(0.01) is None
    assert kept(tmp_path) == []
    may_write.set()
    assert of_run.wait() is not None
    assert kept(tmp_path) == [1]
    assert of_run.wait() is None


def test_what_is_staged_does_not_follow_the_training(tmp_path: Path) -> None:
    staging = Staging()
    trained = torch.ones(3)
    first = staging.copy([("weight", trained)])
    trained += 1
    assert first["weight"].tolist() == [1, 1, 1]
    again = staging.copy([("weight", trained)])
    assert again["weight"].tolist() == [2, 2, 2]
    # Staging holds the memory of one checkpoint, however many are written.
    assert again["weight"].data_ptr() == first["weight"].data_ptr()


def two_ranks(run: Path) -> list[Writer]:
    """Writers of two ranks, which exchange between two threads."""
    barrier = threading.Barrier(2)
    shares = [None, None]

    def exchange_of(rank: int) -> Callable[[Any], list[Any]]:
        def exchange(value: Any) -> list[Any]:
            shares[rank] = value
            barrier.wait(60)
            together = list(shares)
            barrier.wait(60)
            return together

        return exchange

    return [Writer(run, 2, rank=rank, ranks=2, exchange=exchange_of(rank)) for rank in range(2)]


def write_together(ranks: list[Writer], snapshots: list[Snapshot]) -> list[str | None]:
    """Writes a checkpoint. Returns the error of each rank."""
    for each, share in zip(ranks, snapshots, strict=True):
        each.begin(share)
    results = [each.wait() for each in ranks]
    return [result.error for result in results if result]


def test_ranks_write_a_tensor_together_and_one_fault_fails_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 writes the first rows of the weight, and rank 0 those of its moment."""
    ranks = two_ranks(tmp_path)
    weight = torch.randn(8, 1024)
    moment = torch.randn(8, 1024)
    shape = tuple(weight.shape)
    name = "model.embed_tokens.weight"
    of_weight = [Rows(name, shape, 5), Rows(name, shape, 0)]
    of_moment = [Rows(f"exp_avg/{name}", shape, 0), Rows(f"exp_avg/{name}", shape, 3)]
    norm = torch.ones(4)
    snapshots = [
        Snapshot(
            1,
            {"model.norm.weight": norm, of_weight[0]: weight[5:]},
            {of_moment[0]: moment[:3]},
            {},
            {"step": 1},
        ),
        Snapshot(1, {of_weight[1]: weight[:5]}, {of_moment[1]: moment[3:]}, {}),
    ]
    assert write_together(ranks, snapshots) == [None, None]
    saved = store.resolve(tmp_path)
    assert saved.manifest["files"].keys() >= {
        "model-00001-of-00002.safetensors",
        f"model-{name}.safetensors",
        f"optimizer-exp_avg.{name}.safetensors",
    }
    assert torch.equal(saved.weights()[name], weight)
    assert torch.equal(saved.weights()["model.norm.weight"], norm)
    assert torch.equal(saved.moments()[f"exp_avg/{name}"], moment)

    write = writer.write_rows

    def full(path: Path, rows: Rows, tensor: torch.Tensor) -> int:
        if rows in of_moment[1:]:
            raise OSError(28, "No space left on device")
        return write(path, rows, tensor)

    monkeypatch.setattr(writer, "write_rows", full)
    error = "rank 1: No space left on device"
    later = [replace(each, step=2) for each in snapshots]
    assert write_together(ranks, later) == [error, error]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def test_ranks_write_files_of_their_own_and_one_fault_fails_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs two ranks as two threads."""
    ranks = two_ranks(tmp_path)
    other = Snapshot(1, {"lm_head.weight": torch.ones(2)}, {}, {"cpu": torch.get_rng_state()})

    def write() -> list[str | None]:
        return write_together(ranks, [snapshot(1), other])

    assert write() == [None, None]
    saved = store.resolve(tmp_path)
    assert {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    } <= saved.manifest["files"].keys()
    assert sorted(saved.weights()) == ["lm_head.weight", "model.norm.weight"]

    def full(tensors: Any, path: Path, *_: Any) -> None:
        if "00002-of" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    monkeypatch.setattr(writer, "file_entry", lambda path: {})
    assert write() == ["rank 1: No space left on device"] * 2
    assert kept(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


small_disk = pytest.mark.parametrize("disk", ["8m"], indirect=True)


class At(Callback):
    """Calls functions after the given steps."""

    def __init__(self, actions: dict[int, Callable[[], Any]]) -> None:
        self.actions = actions

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.actions.get(row["step"], lambda: None)()


def trainer_with(values: dict[str, Any], actions: dict[int, Callable[[], Any]]) -> Trainer:
    trainer = build_trainer(check_inputs(build(values)), mesh.initialize())
    trainer.callbacks = [At(actions), *trainer.callbacks]
    return trainer


@small_disk
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    disk: Path,
    make_config: MakeConfig,
    train: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = train(make_config(run={"dir": str(tmp_path / "whole")}))
    values = make_config(run={"dir": str(disk / "run")})
    assert trainer_with(values, {3: lambda: fill(disk), 5: (disk / "filler").unlink}).run()
    assert "checkpoint of step 4 could not be written" in caplog.text
    assert "No space left on device" in caplog.text
    assert kept(disk / "run") == [6, 2]
    assert [row["loss"] for row in read_metrics(disk / "run" / "metrics.jsonl")] == [
        row["loss"] for row in whole
    ]


@small_disk
def test_rows_of_metrics_wait_for_room(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = MetricsFile(disk)
    nobody: Any = None  # MetricsFile does not use the trainer
    rows = [{"step": step, "note": "x" * 1000} for step in range(1, 21)]
    for row in rows:
        if row["step"] == 5:
            fill(disk)
        if row["step"] == 15:
            (disk / "filler").unlink()
        metrics.on_step(nobody, row)
        # The file holds whole rows only.
        written = read_metrics(metrics.path)
        assert written == rows[: len(written)]
    assert caplog.text.count("its rows wait in memory") == 1
    assert read_metrics(metrics.path) == rows


def test_a_disk_that_does_not_answer_holds_up_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = MetricsFile(tmp_path)
    nobody: Any = None  # MetricsFile does not use the trainer
    answers = threading.Event()
    answers.set()
    open_file = Path.open

    def open_late(path: Path, *arguments: Any, **options: Any) -> Any:
        answers.wait()
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_late)
    rows = [{"step": step} for step in range(1, 101)]
    for row in rows:
        if row["step"] == 5:
            answers.clear()
            began = time.monotonic()
        metrics.on_step(nobody, row)
    # One step waited a fifth of a second. The other 95 steps did not wait.
    assert time.monotonic() - began < 2
    answers.set()
    metrics.on_finish(nobody)
    assert read_metrics(metrics.path) == rows


@small_disk
def test_a_last_save_that_fails_alone(disk: Path, make_config: MakeConfig, train: Any) -> None:
    values = make_config(run={"dir": str(disk / "run")})
    with pytest.raises(
        RunError, match=r"checkpoint of step 6 could not be written: .*No space left"
    ) as raised:
        trainer_with(values, {5: lambda: fill(disk)}).run()
    assert not isinstance(raised.value, UnreachableError)
    assert kept(disk / "run") == [4, 2]
    (disk / "filler").unlink()
    assert len(train(values)) == 6


@small_disk
def test_two_saves_that_fail_end_the_run_long_before_its_last_step(
    disk: Path, make_config: MakeConfig, train: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One failed save does not end the run: the next save may succeed."""
    values = make_config(run={"dir": str(disk / "run")}, training={"steps": 40})
    trainer = trainer_with(values, {3: lambda: fill(disk)})
    with pytest.raises(
        UnreachableError, match=r"2 checkpoints in a row .*No space left on device.* same command"
    ):
        trainer.run()
    # The saves of steps 4 and 6 fail. The next save reports how a write ended.
    assert 6 < trainer.progress.step <= 8
    assert "checkpoint of step 4 could not be written" in caplog.text
    assert "checkpoint of step 6 could not be written" in caplog.text
    assert kept(disk / "run") == [2]
    (disk / "filler").unlink()
    assert len(train(values)) == 40


@small_disk
def test_a_save_between_two_that_fail(disk: Path, make_config: MakeConfig) -> None:
    values = make_config(run={"dir": str(disk / "run")}, training={"steps": 10})
    filler = disk / "filler"
    at = {3: lambda: fill(disk), 5: filler.unlink, 7: lambda: fill(disk), 9: filler.unlink}
    assert trainer_with(values, at).run()
    assert kept(disk / "run") == [10, 6]


@small_disk
def test_a_folder_that_turns_read_only(disk: Path, make_config: MakeConfig, train: Any) -> None:
    values = make_config(run={"dir": str(disk / "run")})
    folder = disk / "run" / "checkpoints"

    def hide() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True)

    try:
        with pytest.raises(UnreachableError, match=r"could not be written .*Read-only file system"):
            trainer_with(values, {3: hide}).run()
        values["run"]["dir"] = str(folder / "run")
        with pytest.raises(InputError, match="cannot be written: no permission"):
            check_inputs(build(values))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    values["run"]["dir"] = str(disk / "run")
    assert len(train(values)) == 6


def test_a_lock_names_its_holder_and_a_dead_ones_is_void(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = RunLock(tmp_path)
    with pytest.raises(
        InputError,
        match=rf"run.dir={tmp_path} is in use: process \d+ on \S+, since .*, trains in it",
    ):
        RunLock(tmp_path)
    words = (tmp_path / ".lock").read_text()
    first.release()
    # A killed process leaves its lock behind.
    (tmp_path / ".lock").write_text(words)
    with caplog.at_level(logging.INFO, "megaconsa"):
        RunLock(tmp_path).release()
    assert "ended without a word; its lock is void" in caplog.text


def test_what_was_passed_over_is_put_aside(make_config: MakeConfig, train: Any) -> None:
    """A damaged checkpoint must not count among those to keep.

    Whole ones would be removed for it.
    """
    values = make_config(training={"steps": 8})
    run = Path(values["run"]["dir"])
    trainer = trainer_with(values, {})
    trainer.callbacks = [*trainer.callbacks, At({5: trainer.request_stop})]
    assert not trainer.run()
    model = run / "checkpoints" / "step_6" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    train(values)
    assert kept(run) == [8, 6]
    assert (run / "checkpoints" / "step_6.damaged").is_dir()


def test_a_folder_that_ranks_do_not_share_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "VISIBLE_SECONDS", 1)

    def exchange(value: Any) -> list[Any]:
        elsewhere = ({"model-00002-of-00002.safetensors": {"bytes": 8, "xxh3_64": "0"}}, {}, None)
        return [value, elsewhere] if isinstance(value, tuple) else [value, None]

    of_run = Writer(tmp_path, keep=1, ranks=2, exchange=exchange)
    of_run.begin(snapshot(1))
    result = of_run.wait()
    assert result is not None
    assert "which rank 1 wrote; run.dir must be on a file system that all nodes share" in str(
        result.error
    )
    assert kept(tmp_path) == []
