"""A learning run and a training run as the trainer would leave them, with made-up curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megaconsa import config

LAYERS = 12
HEADS = 8


def write_runs(folder: Path, steps: int = 300) -> None:
    """Writes data/dataset.json, learn/ and train/ under `folder`."""
    random = np.random.default_rng(0)
    log_alpha = (
        random.normal(0, 0.3, (LAYERS, HEADS)) + 5 * np.sin(np.linspace(-1.4, 3.6, LAYERS))[:, None]
    )
    log_alpha += random.normal(0, 2.5, (LAYERS, HEADS))
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "dataset.json").write_text(json.dumps({"unigram_entropy": 6.9}))
    learn = _run(folder, "learn", {"source": "learn", "scope": "per_layer", "sparsity": 0.5}, steps)
    _write_rows(
        learn,
        [
            _row(step, steps, random) | _gates(step, steps, log_alpha, random)
            for step in range(1, steps + 1)
        ],
    )
    probability = 1 / (1 + np.exp(-log_alpha - 1.6))
    errors = np.full((LAYERS, HEADS), 0.4)
    gates = {
        "step": steps,
        "scores": log_alpha.tolist(),
        "probability_full": probability.tolist(),
        "mean_gradient": log_alpha.tolist(),
        "standard_error": errors.tolist(),
    }
    (learn / "gates.json").write_text(json.dumps(gates))
    train = _run(
        folder, "train", {"source": "rule", "rule": "head-share", "sparsity": 0.5}, 3 * steps
    )
    _write_rows(train, [_row(step, 3 * steps, random, 4.1) for step in range(1, 3 * steps + 1)])


def _run(folder: Path, name: str, allocation: dict[str, Any], steps: int) -> Path:
    run = folder / name
    run.mkdir()
    settings = config.build(
        {
            "run": {"dir": str(run)},
            "model": {"preset": "small"},
            "attention": {"window": 256},
            "allocation": allocation,
            "training": {
                "steps": steps,
                "micro_batch": 4,
                "global_batch": 8,
                "sequence_length": 2048,
                "learning_rate": 1e-3,
            },
            "data": {"path": str(folder / "data")},
        }
    )
    (run / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    return run


def _write_rows(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(step: int, steps: int, random: np.random.Generator, start: float = 9.0) -> dict[str, Any]:
    loss = 3.0 + (start - 3.0) * float(np.exp(-6 * step / steps)) + float(random.normal(0, 0.06))
    row = {
        "step": step,
        "tokens": step * 16_384,
        "sequences": step * 32,
        "loss": loss,
        "learning_rate": 1e-3
        * min(1.0, step / (0.05 * steps))
        * 0.5
        * (1 + float(np.cos(np.pi * step / steps))),
        "grad_norm": float(np.exp(random.normal(0, 0.3)))
        * (1 + 4 * float(np.exp(-20 * step / steps))),
        "tokens_per_second": 118_000
        + float(random.normal(0, 2500))
        - (60_000 if step % 97 == 0 else 0),
        "mfu": 0.37 + float(random.normal(0, 0.005)),
        "step_seconds": 0.14,
        "data_seconds": 0.0006,
        "memory_gib": 31.4,
    }
    return row | ({"validation_loss": loss + 0.08} if step % (steps // 6) == 0 else {})


def _gates(
    step: int, steps: int, log_alpha: np.ndarray, random: np.random.Generator
) -> dict[str, Any]:
    done = min(1.0, 1.6 * step / steps)
    target = 0.5 * min(1.0, step / (0.3 * steps))
    layers = 1 - 1 / (1 + np.exp(-(done * log_alpha + (1 - done) * 2.5) - 1.6))
    expected = target * 0.98 + 0.03 * float(np.sin(12 * step / steps)) * float(
        np.exp(-3 * step / steps)
    )
    lam = 0.5 + done * np.linspace(-1, 2, LAYERS) + 0.3 * np.sin(10 * step / steps)
    return {
        "target_sparsity": target,
        "expected_sparsity": expected,
        "sampled_sparsity": expected + float(random.normal(0, 0.02)),
        "binarized_sparsity": 0.5,
        "threshold_sparsity": float(np.clip(expected * 1.1 - 0.12, 0, 1)),
        "layer_expected_sparsity": layers.mean(axis=1).tolist(),
        "multipliers": {"lambda": lam.tolist(), "phi": [10.0] * LAYERS},
        "decided_share": done**2 * 0.97,
        "split_agreement": done * 0.9,
        "separated_share": done * 0.7,
        "cut_margin": 0.02 + done * 0.6,
        "penalty": float(random.normal(0, 0.01)),
        "gate_grad_norm": float(np.exp(random.normal(-2, 0.4))),
    }
