"""Files that cannot be read for a while."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from megaconsa import reading
from megaconsa.console import guarded
from megaconsa.errors import UnreachableError
from megaconsa.exit_codes import LOST
from tests.support.disks import OUT_OF_REACH

pytestmark = pytest.mark.usefixtures("impatient")


def test_a_file_that_comes_back_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.symlink_to(OUT_OF_REACH)
    later = tmp_path / "later"
    later.write_text("content")
    threading.Timer(0.5, lambda: later.replace(file)).start()
    assert reading.read_text(file) == "content"


def test_one_that_stays_away_ends_with_the_code_that_requeues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.symlink_to(OUT_OF_REACH)
    with pytest.raises(SystemExit) as end:
        guarded(lambda: reading.read_bytes(file))
    assert end.value.code == LOST
    said = capsys.readouterr().err
    assert said == (
        f"error: {file} could not be read for 1 s (Input/output error); "
        "the same command continues once its storage answers again\n"
    )


def test_an_answer_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FileNotFoundError):
        reading.read_text(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        reading.read_bytes(tmp_path)
    assert not caplog.records


def test_a_folder_that_was_there_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("content")
    away = folder.rename(tmp_path / "away")
    threading.Timer(0.5, lambda: away.rename(folder)).start()
    assert reading.read_text(folder / "file", within=folder) == "content"
    with pytest.raises(FileNotFoundError):
        reading.read_text(folder / "another", within=folder)
    folder.rename(away)
    with pytest.raises(UnreachableError):
        reading.read_text(folder / "file", within=folder)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_errors_of_file_servers(number: int) -> None:
    attempts = []

    def read() -> str:
        attempts.append(number)
        if len(attempts) < 3:
            raise OSError(number, "no answer")
        return "content"

    assert reading.patiently(read, "a file") == "content"

    def never() -> str:
        raise OSError(number, "no answer")

    with pytest.raises(UnreachableError, match="a file could not be read"):
        reading.patiently(never, "a file")
