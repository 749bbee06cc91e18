"""A checkpoint that cannot be read at the moment is not damaged."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.errors import InputError, UnreachableError
from tests.support.disks import OUT_OF_REACH

MakeConfig = Callable[..., dict[str, Any]]


pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECOND_LOOK_SECONDS", 0.0)


@pytest.fixture
def run(make_config: MakeConfig, train: Any) -> Path:
    """A run with two checkpoints."""
    values = make_config(training={"steps": 4}, checkpoint={"every": 2})
    train(values)
    return Path(values["run"]["dir"])


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / run_folder.CHECKPOINTS).iterdir())


@pytest.mark.parametrize("file", ["state.json", store.MANIFEST])
def test_one_that_comes_back_is_the_newest(run: Path, file: str) -> None:
    path = run / run_folder.CHECKPOINTS / "step_4" / file
    aside = path.rename(run / "aside")
    path.symlink_to(OUT_OF_REACH)
    threading.Timer(0.5, lambda: aside.replace(path)).start()
    newest = store.newest(run)
    assert newest is not None
    assert newest.step == 4


def test_one_that_stays_away_is_left_alone(run: Path, make_config: MakeConfig, train: Any) -> None:
    path = run / run_folder.CHECKPOINTS / "step_4" / "state.json"
    aside = path.rename(run / "aside")
    path.symlink_to(OUT_OF_REACH)
    with pytest.raises(UnreachableError, match=r"state.json could not be read for 1 s"):
        train(make_config(training={"steps": 4}, checkpoint={"every": 2}, run={"dir": str(run)}))
    aside.replace(path)
    assert names(run) == ["step_2", "step_4"]


def test_a_stale_handle_while_checksums_are_made(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.checksum
    failures = iter([errno.ESTALE, errno.EIO, errno.ETIMEDOUT])

    def checksum(path: Path, advance: Callable[[int], None]) -> str:
        for number in failures:
            raise OSError(number, "no answer")
        return real(path, advance)

    monkeypatch.setattr(store, "checksum", checksum)
    newest = store.newest(run)
    assert newest is not None
    assert newest.step == 4
    assert next(failures, None) is None


def test_a_stale_handle_when_tensors_are_opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors would report this error as a missing file."""
    newest = store.resolve(run)
    real = Path.open
    failures = iter([errno.ESTALE, errno.EIO])

    def stale(path: Path, *arguments: Any) -> Any:
        for number in failures:
            raise OSError(number, "no answer")
        return real(path, *arguments)

    monkeypatch.setattr(Path, "open", stale)
    assert list(newest.weights())
    assert next(failures, None) is None


def test_damage_is_what_is_wrong_twice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.checksum
    wrong: dict[Path, int] = {}

    def checksum(path: Path, advance: Callable[[int], None]) -> str:
        wrong[path] = wrong.get(path, 0) + 1
        return "wrong" if wrong[path] == 1 else real(path, advance)

    monkeypatch.setattr(store, "checksum", checksum)
    newest = store.newest(run)
    assert newest is not None
    assert newest.step == 4
    monkeypatch.undo()
    model = newest.path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\xff")
    older = store.newest(run)
    assert older is not None
    assert older.step == 2


def test_a_checkpoint_of_a_later_format_is_refused_and_left_alone(
    run: Path, make_config: MakeConfig, train: Any
) -> None:
    path = run / run_folder.CHECKPOINTS / "step_4" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"version": store.FORMAT_VERSION + 1}))
    with pytest.raises(InputError, match="has format version 2, but this megaconsa reads 1"):
        train(make_config(training={"steps": 4}, checkpoint={"every": 2}, run={"dir": str(run)}))
    assert names(run) == ["step_2", "step_4"]
