"""Measures what a start costs each rank: seconds, memory, descriptors and process groups.

    torchrun --nproc_per_node 16 -m megaconsa.benchmarks.starting configs/quickstart.yaml \\
        run.dir=/tmp/started training.global_batch=16 training.micro_batch=1

It builds the run, trains one step, and prints each figure's median over ranks and its largest.
run.dir must not exist. It is removed at the end.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from torch import distributed as dist

from megaconsa import config as configuration
from megaconsa.config import Config
from megaconsa.console import console, guarded
from megaconsa.errors import InputError
from megaconsa.parallel.launcher import is_main
from megaconsa.parallel.mesh import initialize
from megaconsa.parallel.world import join, leave
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer


@contextmanager
def counted_groups() -> Iterator[list[int]]:
    """Yields a list that gets the number of ranks of each group for which new_group is called."""
    sizes: list[int] = []
    original = dist.new_group

    def counting(ranks: Any = None, *arguments: Any, **settings: Any) -> Any:
        sizes.append(dist.get_world_size() if ranks is None else len(list(ranks)))
        return original(ranks, *arguments, **settings)

    dist.new_group = counting
    try:
        yield sizes
    finally:
        dist.new_group = original


def measure(config: Config) -> list[dict[str, float]]:
    """Starts the run on this rank and trains a step. Returns every rank's figures.

    Raises InputError if the run's folder exists.
    """
    figures: dict[str, float] = {}
    before = time.monotonic()

    def lap(name: str) -> None:
        nonlocal before
        now = time.monotonic()
        figures[name] = now - before
        before = now

    with counted_groups() as sizes:
        world = join()
        lap("seconds to join")
        world.from_main(lambda: _check_new(config.run.dir))
        inputs = check_inputs(config, world)
        lap("seconds to check inputs")
        mesh = initialize(config.parallel, world)
        lap("seconds to make groups")
        trainer = build_trainer(inputs, mesh)
        lap("seconds to build the run")
        for callback in trainer.callbacks:
            callback.on_start(trainer)
        trainer.step()
        lap("seconds of the first step")
    figures["calls of new_group"] = len(sizes)
    figures["calls for one rank"] = sizes.count(1)
    figures["open descriptors"] = len(os.listdir("/proc/self/fd"))
    figures["sockets"] = _sockets()
    figures["threads"] = len(os.listdir("/proc/self/task"))
    figures["own memory, MiB"] = _own_memory()
    trainer.completed = True
    for callback in reversed(trainer.callbacks):
        callback.on_finish(trainer)
    return world.exchange(figures)


def _sockets() -> int:
    """Number of this process's descriptors that are sockets."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor of the listing itself
            continue
        found += target.startswith("socket:")
    return found


def _own_memory() -> float:
    """MiB of memory that this process shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    kib = re.findall(r"^Private_\w+:\s+(\d+) kB$", text, re.MULTILINE)
    return sum(map(int, kib)) / 1024


def main() -> None:
    config = configuration.load(Path(sys.argv[1]), sys.argv[2:])
    every = measure(config)
    leave()
    if not is_main():
        return
    shutil.rmtree(config.run.dir)
    console.print(f"{f'{len(every)} ranks':<26} {'median':>10} {'largest':>10}")
    for name in every[0]:
        values = [figures[name] for figures in every]
        console.print(f"{name:<26} {median(values):10.2f} {max(values):10.2f}")


def _check_new(run: Path) -> None:
    if run.exists():
        raise InputError(f"run.dir={run} exists; name a folder that does not")


if __name__ == "__main__":
    guarded(main)
