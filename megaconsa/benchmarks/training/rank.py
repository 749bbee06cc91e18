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

from megaconsa import config as configuration
from megaconsa.console import guarded
from megaconsa.errors import InputError
from megaconsa.files import replace_text
from megaconsa.parallel.mesh import initialize
from megaconsa.parallel.world import join, leave
from megaconsa.training import failures
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer


def main(config_path: Path, out: Path, overrides: list[str]) -> None:
    config = configuration.load(config_path, overrides)
    world = join()
    try:
        inputs = check_inputs(config, world)
        mesh = initialize(
            config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence, world
        )
        trainer = build_trainer(inputs, mesh)
        rows = [trainer.step() for _ in range(config.training.steps)]
        memory = torch.tensor(rows[-1]["memory_gib"], device=mesh.device)
        torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MAX)
    except InputError:
        raise  # All ranks agreed on this refusal.
    except Exception as error:
        sys.exit(failures.end(error, out.parent, world, None))
    leave()
    if mesh.is_main:
        result = {"rows": rows, "memory_gib": float(memory), "device": mesh.device.type}
        replace_text(out, json.dumps(result))


if __name__ == "__main__":
    guarded(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
