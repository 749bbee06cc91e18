"""Makes the archive of runs that later versions must resume (see test_stored_runs.py).

Run once for each release:

    python -m tests.support.stored_runs

Writes tests/training/stored_runs/VERSION.tar.gz. It holds a data folder, a run of stage 1 and a run
of stage 2, both stopped halfway, and expected.json with the losses of all their steps.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megaconsa.config import build
from megaconsa.consa.rules import head_share
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.parallel import mesh
from megaconsa.reporting.metrics import read_metrics
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from tests.support import ROOT
from tests.support.interruptions import StopAfter

FOLDER = ROOT / "tests/training/stored_runs"
LICENSE = ROOT / "LICENSE"
"""A text that everybody may copy."""
STEPS = 8
STOPPED_AFTER = 4


def values(name: str, allocation: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"dir": name},
        "model": {
            "vocab_size": 512,
            "hidden_size": 4,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 2,
        },
        "attention": {"window": 4},
        "allocation": allocation,
        "gates": {"warmup_steps": 2},
        "training": {
            "steps": STEPS,
            "micro_batch": 2,
            "global_batch": 2,
            "sequence_length": 16,
            "learning_rate": 0.01,
            "precision": "fp32",
        },
        "data": {"path": "data"},
        "validation": {"sequences": 2},
        "checkpoint": {"keep": 1},
        "logging": {"tensorboard": False},
    }


def losses(name: str, allocation: dict[str, Any], *, stop: bool) -> list[float]:
    trainer = build_trainer(check_inputs(build(values(name, allocation))), mesh.initialize())
    if stop:
        trainer.callbacks = [*trainer.callbacks, StopAfter(STOPPED_AFTER)]
    trainer.run()
    return [row["loss"] for row in read_metrics(Path(name) / "metrics.jsonl")]


def make(out: Path) -> None:
    # The files of the runs contain this path.
    place = Path(tempfile.gettempdir()) / "megaconsa_stored_runs"
    place.mkdir()
    os.chdir(place)
    try:
        text = Path("text.jsonl")
        paragraphs = LICENSE.read_text().split("\n\n")
        lines = [json.dumps({"text": paragraph}) for paragraph in paragraphs]
        text.write_text("\n".join(lines))
        prepare(
            [str(text)],
            Path("data"),
            Options(sequence_length=16, validation_share=0.1),
            train_tokenizer=512,
        )
        text.unlink()
        head_share(2, 2, 4, 0.5).save(Path("table.json"))
        kinds = {"learn": {"source": "learn"}, "train": {"source": "file", "file": "table.json"}}
        expected = {
            name: losses(f"{name}_whole", allocation, stop=False)
            for name, allocation in kinds.items()
        }
        Path("expected.json").write_text(json.dumps(expected))
        for name, allocation in kinds.items():
            losses(name, allocation, stop=True)
        with tarfile.open(out, "w:gz") as archive:
            for name in ("data", "table.json", "expected.json", *kinds):
                archive.add(name)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    made = FOLDER / f"{version('megaconsa')}.tar.gz"
    if made.exists():
        sys.exit(f"{made} is there already: what a version wrote stays as it is")
    make(made)
