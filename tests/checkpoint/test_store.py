"""Checkpoints are committed whole or not at all, read back exactly, and skipped when damaged."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaconsa import run_folder
from megaconsa.checkpoint import store, writer
from megaconsa.checkpoint.writer import Snapshot, Writer
from megaconsa.consa import rules
from megaconsa.consa.constraint import Constraint
from megaconsa.consa.gates import GateBank, GateSettings
from megaconsa.errors import InputError
from megaconsa.model.config import ModelConfig

SHAPE = ModelConfig(7, 4, 6, 2, 2, 1, head_dim=2)
TABLE = rules.interleaved(2, 1, 16, 1)


def tensors(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments of a step.

    Some of the values would not survive a conversion to text or bf16.
    """
    weights = {
        "model.norm.weight": torch.tensor([step, 1 / 3, -0.0, 1e-42]),
        "model.embed_tokens.weight": torch.eye(7, 4) * step,
    }
    return weights, {
        f"{moment}/{name}": weight / 3
        for moment in ("exp_avg", "exp_avg_sq")
        for name, weight in weights.items()
    }


def save(run: Path, step: int, keep: int = 2, **changed: Any) -> Path:
    weights, moments = tensors(step)
    state = {
        "step": step,
        "tokens": 512 * step,
        "shape": asdict(SHAPE),
        "config": {"run": {"dir": str(run)}},
    }
    settings = {"gates": None, "allocation": TABLE} | changed
    of_run = Writer(run, keep)
    of_run.clean()
    of_run.begin(
        Snapshot(step, weights, moments, {"cpu": torch.get_rng_state()}, state, **settings)
    )
    result = of_run.wait()
    assert result is not None
    if result.error is not None:
        raise OSError(result.error)
    return run / run_folder.CHECKPOINTS / f"step_{step}"


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest_step(run: Path) -> int | None:
    checkpoint = store.newest(run)
    return checkpoint.step if checkpoint else None


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path == tmp_path / "checkpoints" / "step_12"
    checkpoint = store.newest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step, checkpoint.model_config) == (path, 12, SHAPE)
    assert checkpoint.state["tokens"] == 512 * 12
    assert {"megaconsa", "torch", "deepspeed"} <= checkpoint.state["versions"].keys()
    weights, moments = tensors(12)
    assert equal(checkpoint.weights(), weights)
    assert torch.equal(
        checkpoint.weights()["model.norm.weight"].signbit(), weights["model.norm.weight"].signbit()
    )
    assert equal(checkpoint.moments(), moments)
    assert checkpoint.weight_shapes() == {
        "model.norm.weight": (4,),
        "model.embed_tokens.weight": (7, 4),
    }
    assert checkpoint.allocation == TABLE
    assert checkpoint.gates() is None
    assert checkpoint.faults() == {}


@pytest.mark.parametrize("controller", ["evidence", "paper"])
def test_gates_go_through_a_checkpoint_exactly(controller: Any, tmp_path: Path) -> None:
    settings = GateSettings(Constraint(2, 4, 0.5), 8, controller)
    bank = GateBank(settings)
    restored = GateBank(settings)
    for step in range(3):
        bank.sample(step)
        bank.update()
    save(tmp_path, 3, gates=bank.state(), allocation=None)
    checkpoint = store.resolve(tmp_path)
    assert checkpoint.allocation is None
    gates = checkpoint.gates()
    assert gates is not None
    restored.load_state(gates)
    assert equal(restored.state(), bank.state())
    for each in (bank, restored):
        each.sample(3)
    assert bank.update() == restored.update()


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    bank = GateBank(GateSettings(Constraint(2, 4, 0.5), 8))
    path = save(tmp_path, 1, gates=bank.state())
    names = {file.name for file in path.iterdir()}
    assert names == {
        "model.safetensors",
        "optimizer.safetensors",
        "gates.safetensors",
        "random.safetensors",
        "allocation.json",
        "state.json",
        "manifest.json",
    }
    for file in path.glob("*.json"):
        json.loads(file.read_text())
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert kept(tmp_path) == ["step_10", "step_100"]
    assert newest_step(tmp_path) == 100
    save(tmp_path, 101, keep=1)
    assert kept(tmp_path) == ["step_101"]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 5, allocation=None)
    save(tmp_path, 5)
    assert store.resolve(tmp_path).allocation == TABLE
    assert kept(tmp_path) == ["step_5"]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the pause before the second look at damage."""
    monkeypatch.setattr(store, "SECOND_LOOK_SECONDS", 0.0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


DAMAGES: list[Callable[[Path], None]] = [truncate, flip_a_byte, Path.unlink]
FILES = ["model.safetensors", "optimizer.safetensors", "allocation.json", "state.json"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_one_is_passed_over(
    file: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "checkpoints" / "step_2"
    damage(path / file)
    with caplog.at_level(logging.WARNING, logger="megaconsa.checkpoint"):
        assert newest_step(tmp_path) == 1
        assert store.resolve(tmp_path).step == 1
    assert f"checkpoint {path} is passed over" in caplog.text
    with pytest.raises(InputError, match="step_2"):
        store.resolve(path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", None),
        ("manifest.json", ""),
        ("manifest.json", "{}"),
        ("manifest.json", "[]"),
        ("manifest.json", '{"version": 1, "files": {"model.safetensors": {}}}'),
        ("state.json", None),
        ("state.json", "[]"),
    ],
)
def test_a_checkpoint_without_its_descriptions_is_passed_over(
    file: str, content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "checkpoints" / "step_2" / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert newest_step(tmp_path) == 1
    assert "step_2 is passed over" in caplog.text
    with pytest.raises(InputError):
        store.resolve(path.parent)


@pytest.mark.parametrize(
    "name",
    ["../step_1/model.safetensors", "model.safetensors/../../step_1/model.safetensors", ".."],
)
def test_a_manifest_names_files_of_its_own_folder_only(name: str, tmp_path: Path) -> None:
    """A checkpoint from somebody else must not make us read tensors from other folders."""
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "checkpoints" / "step_2" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["model.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"which is no file of the checkpoint's folder"):
        store.resolve(path.parent)


def test_no_flipped_byte_of_the_manifest_stops_a_resume(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "checkpoints" / "step_2" / "manifest.json"
    whole = path.read_bytes()
    failed = {}
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        try:
            assert newest_step(tmp_path) in (1, 2)
        except Exception as error:
            failed[index] = repr(error)
    assert not failed


def test_all_damaged_is_refused_not_a_fresh_start(tmp_path: Path) -> None:
    assert store.newest(tmp_path) is None
    with pytest.raises(InputError, match="holds no usable checkpoint"):
        store.resolve(tmp_path)
    path = save(tmp_path, 1)
    truncate(path / "model.safetensors")
    for read in (store.newest, store.resolve):
        with pytest.raises(InputError, match="none of the 1 checkpoints"):
            read(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_one_does_not_push_out_whole_ones(keep: int, tmp_path: Path) -> None:
    """A run that resumed before a damaged checkpoint saves earlier steps than that one.

    These saves are what the run can resume from.
    """
    for step in (1, 2, 9):
        save(tmp_path, step, keep=3)
    truncate(tmp_path / "checkpoints" / "step_9" / "model.safetensors")
    assert newest_step(tmp_path) == 2
    save(tmp_path, 3, keep=keep)
    assert newest_step(tmp_path) == 3
    shutil.rmtree(tmp_path / "checkpoints" / "step_3")
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == (["step_2", "step_9"] if keep == 2 else ["step_9"])


def test_what_a_dead_save_left_does_not_get_into_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".step_2.tmp"
    leftover.mkdir(parents=True)
    (leftover / "gates.safetensors").write_bytes(b"torn")
    assert store.newest(tmp_path) is None
    assert not (save(tmp_path, 2) / "gates.safetensors").exists()


def test_everything_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync = writer.sync
    rename = Path.rename
    monkeypatch.setattr(writer, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (events.append(f"-> {to.name}"), rename(path, to))
    )
    names = {path.name for path in save(tmp_path, 2).iterdir()}
    named = events.index("-> step_2")
    assert names | {".step_2.tmp"} <= set(events[:named])
    assert events[named + 1 :] == ["checkpoints"]


def test_foreign_folders_are_neither_read_nor_removed(tmp_path: Path) -> None:
    foreign = ["step_", "step_1.bak", "step_5.bak", "step_x7", "old_step_9", "best"]
    for name in foreign:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert store.newest(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert kept(tmp_path) == sorted([*foreign, "step_3"])
    assert newest_step(tmp_path) == 3


def test_resolve_takes_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    assert store.resolve(tmp_path).step == 2
    assert store.resolve(tmp_path / "checkpoints" / "step_1").step == 1


def test_resolve_names_what_is_not_there(tmp_path: Path) -> None:
    assert store.newest(tmp_path / "nowhere") is None
    with pytest.raises(
        InputError, match="nowhere is neither a run folder nor a checkpoint: it does not exist"
    ):
        store.resolve(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no usable checkpoint"):
        store.resolve(tmp_path)


def test_a_damaged_checkpoint_that_is_named_is_refused_not_replaced(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "checkpoints" / "step_2"
    flip_a_byte(path / "optimizer.safetensors")
    with pytest.raises(
        InputError, match=r"damaged: .*step_2/optimizer\.safetensors does not match its checksum"
    ):
        store.resolve(path)
    truncate(path / "optimizer.safetensors")
    with pytest.raises(InputError, match=r"optimizer\.safetensors has \d+ bytes instead of \d+"):
        store.resolve(path)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match=r"optimizer\.safetensors is missing"):
        store.resolve(path)
