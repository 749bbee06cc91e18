"""The space of a node's cache, used by several processes at once."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from megaconsa.data.cache_space import download_folder

PROCESSES = 4
TURNS = 300


def test_one_process_at_a_time_has_the_folder_of_a_download(tmp_path: Path) -> None:
    """The folder is made, locked and removed by each in turn, as fast as they can."""
    final = tmp_path / "folder" / "file"

    def work() -> None:
        for _ in range(TURNS):
            with download_folder(final) as part:
                # Nobody else writes here now, and nothing was left.
                (part / "mine").open("x").close()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    assert not list(final.parent.iterdir())
