"""How the sparsity moves over a whole run, and which units are chosen, on an objective without a model.

Each unit has a fixed benefit of being open; its gradient reaches the bank as a model's would, one per sequence, under noise as large
as the largest benefit. Per-layer and global heads in the shape of Qwen3-0.6B, and whole layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megaconsa.consa.gates import GateBank, GateSettings

STEPS, WARMUP, SEQUENCES = 400, 150, 4
NOISE = 1.0
"""Standard deviation over the sequences, where benefits lie in (0, 1)."""
LOSS_SCALE = 1e-3
"""Makes the gradient's norm that of real runs, far below the clipping."""

PER_LAYER = GateSettings(28, 8, 8, 0.5, warmup_steps=WARMUP, global_batch=SEQUENCES, steps=STEPS)
GLOBAL = replace(PER_LAYER, scope="global")
LAYERS = replace(GLOBAL, num_layers=12, granularity="layer")
SHAPES = [pytest.param(settings, id=f"{settings.granularity}-{settings.scope}") for settings in (PER_LAYER, GLOBAL, LAYERS)]


@dataclass
class Course:
    excess: float
    """Largest amount by which a constraint's expected sparsity passed the target of its step."""
    miss: float
    """Largest distance of a constraint's expected sparsity from the target at the end."""
    decided: float
    overlap: float
    """Share of the units kept full that are among the most beneficial ones of their constraint."""
    correlation: float
    """Of the ranks of benefit and log_alpha within a constraint."""


def run(settings: GateSettings) -> Course:
    generator = torch.Generator().manual_seed(0)
    bank = GateBank(settings)
    benefit = torch.rand(settings.num_layers, settings.units, generator=generator)
    excess = 0.0
    for step in range(settings.steps):
        bank.sample(step)
        noise = NOISE * torch.randn(settings.num_layers, SEQUENCES, settings.units, generator=generator)
        # Into the leaves, where a backward pass would leave it: 28 small ones a step would be most of the test's time.
        for leaf, gradient in zip(bank._leaves, (-LOSS_SCALE / SEQUENCES) * (benefit[:, None] + noise), strict=True):
            leaf.grad = gradient
        metrics = bank.update()
        expected = metrics["layer_expected_sparsity"] if settings.per_layer else [metrics["expected_sparsity"]]
        excess = max(excess, max(expected) - metrics["target_sparsity"])

    rows = benefit if settings.per_layer else benefit.reshape(1, -1)
    log_alpha = bank.log_alpha.detach().reshape(rows.shape)
    full = bank.full()[:, : settings.units].reshape(rows.shape)
    kept = int(full[0].sum())
    best = torch.zeros_like(full).scatter(1, rows.argsort(dim=1, descending=True)[:, :kept], True)
    return Course(
        excess,
        max(abs(value - settings.sparsity) for value in expected),
        metrics["decided_share"],
        float((full & best).sum() / best.sum()),
        float(torch.corrcoef(torch.stack([ranks(rows).flatten(), ranks(log_alpha).flatten()]))[0, 1]),
    )


def ranks(rows: Tensor) -> Tensor:
    return rows.argsort(dim=1).argsort(dim=1).double()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("settings", SHAPES)
def test_damped_follows_the_target_decides_and_keeps_the_beneficial(settings: GateSettings, sparsity: float) -> None:
    """Over four seeds: excess at most 0.017, miss 0.009, decided 0.75 and more, correlation 0.5 and more, of heads 0.7.

    With half of the noise a layer's miss at 0.75 reaches 0.014 in some seeds.
    """
    course = run(replace(settings, sparsity=sparsity))
    assert course.excess <= 0.05
    assert course.miss <= 0.01
    assert course.decided >= 0.6
    assert course.correlation >= 0.45
    if settings.granularity == "kv_head":  # of 12 layers, three that stay full are too few to count
        chance = 1 - sparsity
        assert course.overlap >= chance + 0.5 * (1 - chance)  # at least half of the way from chance to perfect


@pytest.mark.parametrize("settings", SHAPES[:2])
def test_paper_overshoots_while_the_target_rises(settings: GateSettings) -> None:
    """It passes the target by 0.33 to 0.42 during the warm-up, then comes back and ends on it.

    In as many steps, per layer, it also tells heads apart less well: correlation 0.5 where damped has 0.8 and more, and no unit
    decided. That depends on noise and learning rate, so it is not asserted.
    """
    course = run(replace(settings, controller="paper"))
    assert course.excess >= 0.2
    assert course.miss <= 0.05
