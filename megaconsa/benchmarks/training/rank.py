"""One rank of `megaconsa bench-training`: a run's steps, without validation, checkpoints or logs.

On GPUs it then traces one step more, to see what the GPU waits for.

The tool starts it as

    python -m megaconsa.benchmarks.training.rank CONFIG OUT [section.field=value ...]

It writes the rows of metrics to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

from megaconsa.benchmarks.profile.analysis import analyse
from megaconsa.benchmarks.profile.names import TRACE
from megaconsa.benchmarks.profile.recording import record
from megaconsa.benchmarks.profile.trace import read_trace
from megaconsa.benchmarks.short_run_rank import work_as_rank
from megaconsa.console import guarded
from megaconsa.files import replace_text
from megaconsa.training.trainer import Trainer


def main(config_path: Path, out: Path, overrides: list[str]) -> None:
    def work(trainer: Trainer) -> None:
        rows = [trainer.step() for _ in range(trainer.training.steps)]
        mesh = trainer.mesh
        memory = torch.tensor(rows[-1]["memory_gib"], device=mesh.device)
        torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MAX)
        result = {"rows": rows, "memory_gib": float(memory), "device": mesh.device.type}
        if mesh.device.type == "cuda":
            result |= waiting_shares(trainer)
        if mesh.is_main:
            replace_text(out, json.dumps(result))

    work_as_rank(config_path, out, overrides, work)


def waiting_shares(trainer: Trainer) -> dict[str, float]:
    """Shares of a traced step, as means over all ranks, in which the GPU does not compute."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / TRACE
        record(trainer, 1, path)
        found = analyse(read_trace(path))
    assert found.device is not None
    own = [found.device.communicating_ms / found.step_ms, found.device.idle_ms / found.step_ms]
    of_ranks = trainer.mesh.all_gather(*own)
    communicating, idle = (fmean(values) for values in zip(*of_ranks, strict=True))
    return {"communicating": communicating, "idle": idle}


if __name__ == "__main__":
    guarded(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
