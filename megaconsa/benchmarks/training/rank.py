"""One rank of `megaconsa bench-training`: a run's steps, without validation, checkpoints or logs.

The tool starts it as

    python -m megaconsa.benchmarks.training.rank CONFIG OUT [section.field=value ...]

It writes the rows of metrics to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megaconsa.benchmarks.short_run_rank import work_as_rank
from megaconsa.console import guarded
from megaconsa.files import replace_text
from megaconsa.training.trainer import Trainer


def main(config_path: Path, out: Path, overrides: list[str]) -> None:
    def work(trainer: Trainer) -> None:
        rows = [trainer.step() for _ in range(trainer.training.steps)]
        device = trainer.mesh.device
        memory = torch.tensor(rows[-1]["memory_gib"], device=device)
        torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MAX)
        if trainer.mesh.is_main:
            result = {"rows": rows, "memory_gib": float(memory), "device": device.type}
            replace_text(out, json.dumps(result))

    work_as_rank(config_path, out, overrides, work)


if __name__ == "__main__":
    guarded(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
