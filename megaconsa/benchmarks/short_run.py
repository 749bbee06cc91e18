"""A few steps of a run in new processes: what the tools that measure training have in common.

megaconsa.benchmarks.short_run_rank is what each of the processes does.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from megaconsa import run_folder
from megaconsa.cluster.bad_nodes import FIRST
from megaconsa.consa.gate_settings import CLOSING_SHARE
from megaconsa.errors import RunError


def schedule_fields(steps: int) -> list[str]:
    """Fields with which a configuration trains only so many optimizer steps."""
    return [
        f"training.steps={steps}",
        "training.warmup_steps=0",
        "training.decay_steps=0",
        "training.schedule=cosine",
        # The run's own warm-up may be longer than these steps.
        f"gates.warmup_steps={math.floor((1 - CLOSING_SHARE) * steps)}",
        # The controller `paper` could not reach its target in so few steps at the usual rate.
        "gates.learning_rate=2",
    ]


def run_processes(
    module: str, config: Path, out: Path, arguments: list[str], processes: int
) -> dict[str, Any]:
    """Trains in new processes on this machine and returns what they measured.

    module: what each process runs, with `config`, `out` and `arguments` on its command line.
    out: JSON file that the processes write their result to.

    Raises RunError with the error of the rank that failed first.
    """
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    command = [*launcher, "-m", module, str(config), str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = out.parent.glob(f"{run_folder.FAILURES}/*/{FIRST}")
        said = [path.read_text() for path in first]
        if not said:
            said = [done.stderr[-3000:]]
        raise RunError(f"{processes} processes failed:\n{said[0]}")
    return _read(out)


def run_alone(module: str, config: Path, out: Path, arguments: list[str]) -> dict[str, Any]:
    """Does the same as `run_processes` in one process, without a launcher.

    Raises RunError with the end of what the process wrote to stderr.
    """
    command = [sys.executable, "-m", module, str(config), str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(done.stderr[-3000:])
    return _read(out)


def _read(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(out.read_text())
    return result
