"""Whether a job whose training failed is started again: a crash loop ends after some failures without a new checkpoint.

slurm/lib.sh asks, in the job: python -m megaconsa.cluster.restarts JOB EXIT_CODE MOST CONFIG [section.field=value ...]. It prints one
sentence, and a line with the nodes to be avoided if there are any; exit code 0 says to requeue, 1 to give up. RUN/restarts.json
keeps every failure.
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
    """Slurm's number of the job, of an array with the task's: 12_3."""
    exit_code: int
    step: int
    """Of the newest checkpoint, from which the next start would go on; 0 without one."""
    time: str


def record(run: Path, job: str, exit_code: int, most: int) -> tuple[bool, str]:
    """Adds a failure to RUN/restarts.json; whether to start again, and why, in a sentence.

    job: failures of earlier jobs do not count: whoever submits a new one has had a look.
    most: failures in a row without a newer checkpoint after which it is given up. Raises InputError where the file is not ours.
    """
    path = run / NAME
    checkpoints = store.committed(run)
    step = int(checkpoints[0].name.removeprefix("step_")) if checkpoints else 0
    failures = [*read(path), Failure(job, exit_code, step, time.strftime(TIME_FORMAT))]
    text = json.dumps([asdict(failure) for failure in failures], indent=1) + "\n"
    patiently(lambda: replace_text(path, text), path)
    own, row, reached = [failure for failure in failures if failure.job == job], 0, 0
    for failure in own:
        # A checkpoint that was put aside as damaged takes the run back, and saving it again is no progress.
        row, reached = (row + 1 if failure.step <= reached else 1), max(reached, failure.step)
    where = f"the checkpoint of step {reached}" if reached else "the start of the run"
    if row < most:
        return True, f"exit code {exit_code}, failure {row} of {most} since {where}"
    codes = ", ".join(str(failure.exit_code) for failure in own[-row:])
    return (
        False,
        f"given up: failed {row} times in a row since {where}, without a newer checkpoint (exit codes {codes}); see {run}/failures",
    )


def read(path: Path) -> list[Failure]:
    """The failures so far, oldest first; none where there is no file. Raises InputError where it holds something else."""
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
