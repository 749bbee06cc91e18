"""Decides whether a job whose training failed is restarted.

A crash loop ends after some failures without a new checkpoint. slurm/lib.sh runs this module in the
job:

    python -m megaconsa.cluster.restarts JOB EXIT_CODE MOST CONFIG [section.field=value ...]

It prints one sentence. If there are nodes to avoid, it prints them on a second line. Exit code 0
means requeue, and 1 means give up. RUN/restarts.json keeps every failure.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from megaconsa import config as configuration
from megaconsa.checkpoint import store
from megaconsa.cluster.bad_nodes import suspects
from megaconsa.console import guarded
from megaconsa.errors import InputError
from megaconsa.files import replace_text
from megaconsa.reading import patiently, read_text

NAME = "restarts.json"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True)
class Failure:
    job: str
    """Slurm's job ID, with the task ID for an array: 12_3."""
    exit_code: int
    step: int
    """Step of the newest checkpoint, from which the next start would resume. 0 without one."""
    time: str


def record(run: Path, job: str, exit_code: int, most: int) -> tuple[bool, str]:
    """Adds a failure to RUN/restarts.json.

    job: only failures of this job count. Whoever submits a new job has looked at the earlier ones.
    most: failures in a row without a newer checkpoint after which the job is given up.
    Returns whether to restart, and a sentence with the reason.
    Raises InputError if the file holds something else.
    """
    path = run / NAME
    checkpoints = store.committed(run)
    step = int(checkpoints[0].name.removeprefix("step_")) if checkpoints else 0
    failures = [*read(path), Failure(job, exit_code, step, time.strftime(TIME_FORMAT))]
    text = json.dumps([asdict(failure) for failure in failures], indent=1) + "\n"
    patiently(lambda: replace_text(path, text), path)
    own = [failure for failure in failures if failure.job == job]
    row = 0
    reached = 0
    for failure in own:
        # The highest step counts. A damaged checkpoint that was put aside takes the run back, and
        # saving that step again is no progress.
        row = row + 1 if failure.step <= reached else 1
        reached = max(reached, failure.step)
    where = f"the checkpoint of step {reached}" if reached else "the start of the run"
    if row < most:
        return True, f"exit code {exit_code}, failure {row} of {most} since {where}"
    codes = ", ".join(str(failure.exit_code) for failure in own[-row:])
    return (
        False,
        f"given up: failed {row} times in a row since {where}, without a newer checkpoint "
        f"(exit codes {codes}); see {run}/failures",
    )


def read(path: Path) -> list[Failure]:
    """The failures so far, oldest first. The list is empty if there is no file.

    Raises InputError if the file holds something else.
    """
    try:
        return [Failure(**entry) for entry in json.loads(read_text(path))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}; remove it") from None


def _main(arguments: list[str]) -> int:
    job, exit_code, most, path, *overrides = arguments
    run = configuration.load(Path(path), overrides).run.dir
    earlier = read(run / NAME)
    again, sentence = record(run, job, int(exit_code), int(most))
    print(sentence)
    since = datetime.strptime(earlier[-1].time, TIME_FORMAT) if earlier else None
    if again and (nodes := suspects(run, since)):
        print(",".join(nodes))
    return 0 if again else 1


if __name__ == "__main__":
    guarded(lambda: sys.exit(_main(sys.argv[1:])))
