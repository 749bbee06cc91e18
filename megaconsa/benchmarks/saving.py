"""Times saving and restoring a training state, beside DeepSpeed's own save_checkpoint.

Both save the same engine.

    python -m megaconsa.benchmarks.saving configs/qwen3_0p6b_train.yaml \\
        run.dir=/fast/disk/speed model.init_from=null \\
        allocation.source=rule allocation.file=null

It runs in one process. It trains a step, saves three times, restores, and then calls DeepSpeed's
save. The first save allocates host memory that the later ones reuse. run.dir must not exist. It is
removed at the end.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaconsa.checkpoint import store
from megaconsa.config import load
from megaconsa.parallel import mesh
from megaconsa.training.callbacks.checkpointing import Checkpointing
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer


def seconds(function: Callable[[], Any]) -> float:
    """Returns the duration of a call, including the GPU work that it started, and no other."""
    _wait_for_gpu()
    started = time.monotonic()
    function()
    _wait_for_gpu()
    return time.monotonic() - started


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(config_path: Path, overrides: list[str]) -> None:
    config = load(config_path, overrides)
    assert not config.run.dir.exists(), f"{config.run.dir} exists"
    trainer = build_trainer(check_inputs(config), mesh.initialize())
    (checkpointing,) = [each for each in trainer.callbacks if isinstance(each, Checkpointing)]
    row = trainer.step()
    print(f"{'':24} stall s   write s")
    for number in (1, 2, 3):
        trainer.progress.step = number
        stall = seconds(lambda: checkpointing.save(trainer, row))
        result = checkpointing.writer.wait()
        assert result is not None
        assert result.error is None, result.error
        print(f"megaconsa, save {number:<8} {stall:8.2f}  {result.seconds:8.2f}")
        write_seconds = result.seconds
    saved = store.newest(config.run.dir)
    assert saved is not None
    size = saved.bytes / 2**30
    print(f"{size:.2f} GiB, {size / write_seconds:.2f} GiB/s with sync and checksums")
    print(f"checked in   {seconds(saved.faults):8.2f} s")

    def restore_state() -> None:
        trainer.engine.load_weights(saved.weights())
        trainer.engine.load_moments(saved.moments(), 1)

    restore = seconds(restore_state)
    print(f"restored in  {restore:8.2f} s")
    engine = trainer.engine.engine
    folder = config.run.dir / "deepspeed"
    theirs = seconds(lambda: engine.save_checkpoint(str(folder), tag="theirs"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**30
    print(f"DeepSpeed's save_checkpoint: {theirs:.2f} s, all of it a stall; {size:.2f} GiB")
    shutil.rmtree(config.run.dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
