"""Ranks check a checkpoint together. Each file is read once, and all ranks decide alike."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.checkpoint.writer import Snapshot, Writer
from megaconsa.errors import InputError, UnreachableError
from megaconsa.parallel.world import Refusal, World
from megaconsa.training import checkpoint_check

RANKS = 4


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread of this process."""

    values: list[Any] = field(default_factory=list)
    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(RANKS))

    def exchange(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meeting.wait(30)
        found = list(self.values)
        self.meeting.wait(30)
        return found

    def refuse(self, refusal: Refusal) -> NoReturn:
        raise refusal


def by_all_ranks(function: Callable[[World], Any]) -> list[Any]:
    """Returns what each rank returns or raises."""
    values = [None] * RANKS
    meeting = threading.Barrier(RANKS)

    def one(rank: int) -> Any:
        world = ThreadWorld(rank, RANKS, torch.device("cpu"), None, "", values, meeting)
        try:
            return function(world)
        except (InputError, UnreachableError) as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(one, range(RANKS)))


def save(run: Path, step: int) -> None:
    """Writes a checkpoint of all ranks, whose files differ in size."""

    def write(world: World) -> str | None:
        weights = {f"model.layers.{world.rank}.weight": torch.rand(1000 * (world.rank + 1))}
        moments = {f"exp_avg/{name}": weight for name, weight in weights.items()}
        state = {"step": step} if world.is_main else None
        writer = Writer(run, 5, rank=world.rank, ranks=RANKS, exchange=world.exchange)
        writer.begin(Snapshot(step, weights, moments, {}, state))
        result = writer.wait()
        assert result is not None
        return result.error

    assert by_all_ranks(write) == [None] * RANKS


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "SECOND_LOOK_SECONDS", 0.0)
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose checksums are computed, as they are."""
    names: list[str] = []
    checksum = store.checksum

    def counting(path: Path, *arguments: Any) -> str:
        names.append(path.name)
        return checksum(path, *arguments)

    monkeypatch.setattr(store, "checksum", counting)
    return names


def test_each_file_is_read_by_one_rank(run: Path, read: list[str]) -> None:
    results = by_all_ranks(lambda world: checkpoint_check.newest(run, world))
    assert [checkpoint.step for _, checkpoint in results] == [2] * RANKS
    assert sorted(read) == sorted(results[0][1].manifest["files"])


def test_shares_are_balanced(run: Path) -> None:
    checkpoint = store.read(store.committed(run)[0])
    shares = [checkpoint.share(rank, RANKS) for rank in range(RANKS)]
    assert sorted(name for own in shares for name in own) == sorted(checkpoint.manifest["files"])
    loads = [sum(checkpoint.manifest["files"][name]["bytes"] for name in own) for own in shares]
    assert max(loads) <= 1.2 * sum(loads) / RANKS


def test_damage_in_any_share_counts_on_all_ranks(run: Path, read: list[str]) -> None:
    damaged = store.committed(run)[0]
    for rank in range(RANKS):
        path = damaged / f"optimizer-{rank + 1:05}-of-{RANKS:05}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        results = by_all_ranks(lambda world: checkpoint_check.newest(run, world))
        assert [checkpoint.step for _, checkpoint in results] == [1] * RANKS
        results = by_all_ranks(lambda world: checkpoint_check.resolve(damaged, world))
        assert [str(error) for error in results] == [
            f"checkpoint is damaged: {path} does not match its checksum"
        ] * RANKS
        path.write_bytes(whole)


def test_a_damaged_manifest_and_no_usable_checkpoint(run: Path) -> None:
    for path in store.committed(run):
        (path / store.MANIFEST).write_text("{")
    results = by_all_ranks(lambda world: checkpoint_check.newest(run, world))
    assert all("none of the 2 checkpoints" in str(error) for error in results)


def test_a_rank_that_reads_wrong_bytes_damages_no_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would otherwise rename a checkpoint that is intact."""
    faults = Checkpoint.faults

    def of_a_bad_node(self: Checkpoint, *, names: Any) -> dict[str, str]:
        if isinstance(names, list) and names == self.share(2, RANKS):
            return {names[0]: "wrong"}
        return faults(self, names=names)

    monkeypatch.setattr(Checkpoint, "faults", of_a_bad_node)
    results = by_all_ranks(lambda world: checkpoint_check.newest(run, world))
    assert all(isinstance(error, UnreachableError) for error in results)
    assert all("rank 2 of 4 finds" in str(error) for error in results)


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert (
        by_all_ranks(lambda world: checkpoint_check.newest(tmp_path, world)) == [([], None)] * RANKS
    )
    results = by_all_ranks(lambda world: checkpoint_check.resolve(tmp_path, world))
    assert all("holds no usable checkpoint" in str(error) for error in results)
    results = by_all_ranks(lambda world: checkpoint_check.resolve(tmp_path / "x", world))
    assert all("does not exist" in str(error) for error in results)
