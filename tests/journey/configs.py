"""The configurations that the user writes: a tiny model, trained in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LENGTH = 128
VOCABULARY = 512
WINDOW = 16
STEPS = 24

MODEL = {
    "preset": "tiny",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 8,
}
TRAINING = {
    "steps": STEPS,
    "micro_batch": 2,
    "global_batch": 4,
    "sequence_length": LENGTH,
    "learning_rate": 0.01,
    "warmup_steps": 2,
}
SHARED = {
    "attention": {"window": WINDOW},
    "training": TRAINING,
    "data": {"path": "data"},
    "validation": {"every": 8, "sequences": 4},
    "checkpoint": {"every": 8},
}


def write_configs(folder: Path) -> None:
    """Writes learn.yaml, train.yaml, dense.yaml and study.yaml."""
    learn = {
        "run": {"dir": "runs/learn"},
        "model": MODEL,
        "allocation": {"source": "learn", "sparsity": 0.5},
        "gates": {"warmup_steps": 4},
    }
    train = {
        "run": {"dir": "runs/train"},
        "model": MODEL | {"init_from": "runs/learn"},
        "allocation": {"source": "file", "file": "runs/allocation.json"},
    }
    dense = {
        "run": {"dir": "runs/dense"},
        "model": MODEL,
        "allocation": {"source": "rule", "rule": "dense"},
    }
    for name, values in {"learn": learn, "train": train, "dense": dense}.items():
        _write(folder / f"{name}.yaml", SHARED | values)
    study = {
        "config": "dense.yaml",
        "start": {"training.steps": 6},
        "learn": {"training.steps": 6, "gates.warmup_steps": 2},
        "train": {"training.steps": 4, "training.warmup_steps": 0},
        "sparsities": [0.5],
        "seeds": [0],
        "arms": {"dense": {"rule": "dense"}, "random": {"rule": "random", "draws": [0]}},
    }
    _write(folder / "study.yaml", study)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
