"""Kills training with SIGKILL, resumes it, and compares it with a run that was never killed.

python -m tests.support.kill_trials --trials 100

A random trial is a run of 40 steps that saves after every second step. It is killed one to three
times, at random moments from start-up to the end.
The forced moments are a longer run that is killed inside its saves, at every moment in turn:
before, during and after each file, around the renames, and while an old checkpoint is removed.
After each kill, every checkpoint must match its manifest, and every committed checkpoint must still
be there. At the end, metrics and checkpoint must equal those of the run that was never killed, bit
for bit.
"""

from __future__ import annotations

import argparse
import inspect
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import distributed as dist

from megaconsa.checkpoint import store, writer
from megaconsa.consa.allocation import Allocation
from megaconsa.parallel.launcher import VARIABLES
from megaconsa.reporting.metrics import computed, read_metrics
from megaconsa.train import train

STEPS = 40
EVERY = 2
KEEP = 2


class Killed(AssertionError):
    """What a kill destroyed or changed."""


@dataclass
class Moments:
    """Records what one save of a process does, and can kill the process at one of these moments.

    The moment to kill at is `at`, an index into `seen`. With None the process survives and `seen`
    lists all moments.
    """

    save: int
    """The save to record, counted from 1."""
    at: int | None = None
    seen: list[str] = field(default_factory=list)
    begun: int = 0

    def pass_by(self, moment: str) -> None:
        if self.begun == self.save:
            self.seen.append(moment)
            if len(self.seen) - 1 == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(
        self, function: Callable[..., Any], path_of: Callable[..., Path], torn: bool = True
    ) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            name = f"{function.__name__} {path_of(*arguments).name}"
            self.pass_by(f"before {name}")
            result = function(*arguments, **named)
            if torn:
                path = path_of(*arguments)
                content = path.read_bytes()
                # A killed write leaves the first part of a file.
                path.write_bytes(content[: len(content) // 2])
                self.pass_by(f"during {name}")
                path.write_bytes(content)
            self.pass_by(f"after {name}")
            return result

        return wrapped

    def install(self) -> None:
        """Patches the functions that a save calls, for the rest of the process."""
        begin = writer.Writer.begin

        def counted(*arguments: Any) -> None:
            self.begun += 1
            begin(*arguments)

        patch.object(writer.Writer, "begin", counted).start()

        def first(path: Path, *_: Any) -> Path:
            return path

        def second(_: Any, path: Path, *__: Any) -> Path:
            return path

        for target, name, path_of, torn in (
            (writer, "save_file", second, True),
            (writer, "write_json", first, True),
            (Allocation, "save", second, True),
            (Path, "rename", first, False),
            (writer.shutil, "rmtree", first, False),
        ):
            patch.object(target, name, self.around(getattr(target, name), path_of, torn)).start()


def start(config: Path, moments: Moments | None = None, record: Path | None = None) -> int:
    """Starts training in a fork of this process and returns the child's process ID.

    A fork is fast because this process has already imported what is slow to import.
    """
    assert not dist.is_initialized(), (
        "a test before this one left a process group, which a copy of the process cannot leave"
    )
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        os.dup2(os.open(config.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        for name in VARIABLES:
            os.environ.pop(name, None)
        if moments is not None:
            moments.install()
        code = train(config, [])
        if record is not None and moments is not None:
            record.write_text("\n".join(moments.seen))
    finally:
        os._exit(code)


def finish(config: Path) -> None:
    """Trains to the end."""
    _, status = os.waitpid(start(config), 0)
    if status != 0:
        raise Killed(
            f"the run did not continue (status {status}): "
            f"{config.with_suffix('.log').read_text()[-2000:]}"
        )


def committed(run: Path) -> set[str]:
    return {path.name for path in store.committed(run)}


def check_whole(run: Path, before: set[str]) -> int:
    """Returns the step of the newest checkpoint.

    before: names of the checkpoints that were committed before the kill.
    Raises Killed if a checkpoint is damaged or if the newest one is older than the newest one in
    `before`.
    """
    for path in store.committed(run):
        if faults := store.read(path).faults():
            raise Killed(faults[0])
    steps = sorted(int(name.removeprefix("step_")) for name in committed(run))
    newest_before = max((int(name.removeprefix("step_")) for name in before), default=0)
    newest = steps[-1] if steps else 0
    if newest < newest_before:
        raise Killed(f"step_{newest_before} is lost, the newest is step_{newest}")
    return newest


def compare(run: Path, reference: Path) -> None:
    def rows(folder: Path) -> list[dict[str, Any]]:
        return computed(read_metrics(folder / "metrics.jsonl"))

    if rows(run) != rows(reference):
        raise Killed("metrics differ from those of the run that was never killed")
    ours = store.newest(run)
    theirs = store.newest(reference)
    assert ours is not None
    assert theirs is not None
    for path in theirs.path.glob("*.safetensors"):
        if (ours.path / path.name).read_bytes() != path.read_bytes():
            raise Killed(f"{path.name} differs from that of the run that was never killed")


def configure(values: dict[str, Any], folder: Path, name: str, steps: int) -> Path:
    values = values | {
        "run": {"dir": str(folder / name)},
        "training": values["training"] | {"steps": steps},
        "checkpoint": {"every": EVERY, "keep": KEEP},
        # With one worker, which must not outlive the killed run and keep its lock.
        "data": values["data"] | {"workers": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def random_trials(
    values: dict[str, Any], folder: Path, trials: int, seed: int, say: Callable[[str], None] = print
) -> int:
    """Kills runs at random moments.

    Returns how many of the trials lost something or differ.
    """
    draw = random.Random(seed)
    reference = configure(values, folder, "reference", STEPS)
    started = time.monotonic()
    finish(reference)
    length = time.monotonic() - started
    failed = 0
    for number in range(trials):
        config = configure(values, folder, f"trial_{number}", STEPS)
        run = folder / f"trial_{number}"
        found = []
        try:
            for _ in range(draw.randint(1, 3)):
                child = start(config)
                moment = draw.uniform(0, length)
                begun = time.monotonic()
                before = committed(run)
                time.sleep(moment)
                before |= committed(run)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                found.append(f"{time.monotonic() - begun:.2f} s, step {check_whole(run, before)}")
            finish(config)
            compare(run, folder / "reference")
            say(f"trial {number}: killed after {'; '.join(found)}: equal")
        except Killed as error:
            failed += 1
            say(f"trial {number}: killed after {'; '.join(found)}: {error}")
        shutil.rmtree(run, ignore_errors=True)
    say(f"{failed} of {trials} trials lost or differing")
    return failed


def forced_moments(values: dict[str, Any], folder: Path, say: Callable[[str], None] = print) -> int:
    """Kills one run at every moment of a save, each time in the next save.

    Returns at how many moments something was lost or differs.
    """
    # The first save that removes an old checkpoint. All later saves do the same.
    saves = KEEP + 1
    watched = configure(values, folder, "watched", saves * EVERY)
    _, status = os.waitpid(start(watched, Moments(saves), folder / "moments.txt"), 0)
    assert status == 0, watched.with_suffix(".log").read_text()
    moments = (folder / "moments.txt").read_text().splitlines()
    steps = (saves + len(moments)) * EVERY
    finish(configure(values, folder, "forced_reference", steps))
    config = configure(values, folder, "forced", steps)
    run = folder / "forced"
    failed = 0
    for number, moment in enumerate(moments):
        before = committed(run)
        _, status = os.waitpid(start(config, Moments(1 if before else saves, number)), 0)
        try:
            if status != signal.SIGKILL:
                raise Killed(
                    f"it was not killed (status {status}): "
                    f"{config.with_suffix('.log').read_text()[-1000:]}"
                )
            say(f"killed {moment}: newest is step {check_whole(run, before)}")
        except Killed as error:
            failed += 1
            say(f"killed {moment}: {error}")
    try:
        finish(config)
        compare(run, folder / "forced_reference")
    except Killed as error:
        failed += 1
        say(str(error))
    say(f"{failed} of {len(moments)} moments inside a save lost or differing")
    return failed


def main() -> None:
    from megaconsa.data.preparation_options import Options
    from megaconsa.data.prepare import prepare

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [str(module.__file__) for module in (argparse, inspect, tarfile, typing)]
        options = Options(sequence_length=64, validation_share=0.1)
        prepare(sources, folder / "data", options, train_tokenizer=512)
        values = {
            "model": {
                "preset": "tiny",
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 64,
                "head_dim": 8,
            },
            "attention": {"window": 8},
            "allocation": {"source": "learn"},
            "gates": {"warmup_steps": 2},
            "training": {
                "micro_batch": 2,
                "global_batch": 4,
                "sequence_length": 64,
                "learning_rate": 3e-3,
            },
            "data": {"path": str(folder / "data")},
            "validation": {"sequences": 4},
            "logging": {"tensorboard": False},
        }
        failed = random_trials(values, folder, arguments.trials, arguments.seed) + forced_moments(
            values, folder
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
