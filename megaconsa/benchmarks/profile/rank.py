"""One rank of `megaconsa profile`: trains a few steps and records some of them.

The tool starts it as

    python -m megaconsa.benchmarks.profile.rank CONFIG OUT STEPS [section.field=value ...]

STEPS is how many steps are traced. Each rank writes its trace and its memory snapshot to a folder
beside OUT. The main rank writes OUT.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch

from megaconsa.benchmarks.profile.names import (
    EXTRA_STEPS,
    MEMORY,
    TRACE,
    rank_folder,
)
from megaconsa.benchmarks.profile.recording import record
from megaconsa.benchmarks.short_run_rank import work_as_rank
from megaconsa.console import guarded
from megaconsa.files import replace_text
from megaconsa.training.trainer import Trainer

MEMORY_EVENTS = 200_000
"""Allocations and frees that a snapshot holds at most. The oldest are dropped."""


def main(config_path: Path, out: Path, steps: int, overrides: list[str]) -> None:
    work_as_rank(config_path, out, overrides, partial(_profile, out, steps))


def _profile(out: Path, steps: int, trainer: Trainer) -> None:
    on_gpu = trainer.mesh.device.type == "cuda"
    skipped = trainer.training.steps - steps - EXTRA_STEPS
    rows = [trainer.step() for _ in range(skipped)]
    folder = out.parent / rank_folder(trainer.mesh.world.rank)
    folder.mkdir(parents=True)
    record(trainer, steps, folder / TRACE)
    if on_gpu:
        _snapshot(trainer, folder / MEMORY)
    if trainer.mesh.is_main:
        device = torch.cuda.get_device_name(trainer.mesh.device) if on_gpu else "cpu"
        result = {
            "device": device,
            "torch": torch.__version__,
            # The first step compiles kernels.
            "step_ms_without_profiler": 1000
            * median(row["step_seconds"] for row in rows[1:] or rows),
        }
        replace_text(out, json.dumps(result))


def _snapshot(trainer: Trainer, path: Path) -> None:
    """Writes the allocations of one step, with the Python stack of each.

    This step is not traced, because recording stacks slows the host down.
    """
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)
    trainer.step()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


if __name__ == "__main__":
    guarded(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
