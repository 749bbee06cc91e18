"""Banks of gates, and the small model that gives them gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint
from megaconsa.consa.gates import GateBank, GateSettings
from megaconsa.consa.sampled_gates import SampledGates

LAYERS = 3
HEADS = 4
SEQUENCES = 6
CONSTRAINT = Constraint(LAYERS, HEADS, 0.5)
CONSTRAINTS = [
    CONSTRAINT,
    Constraint(LAYERS, HEADS, 0.25, scope="global"),
    Constraint(LAYERS, HEADS, 2 / 3, granularity="layer", scope="global"),
]
SETTINGS = GateSettings(
    CONSTRAINT,
    8,
    "paper",
    learning_rate=0.15,
    initial=0.3,
    warmup_steps=3,
    seed=9,
    global_batch=SEQUENCES,
    steps=20,
)
KINDS = [replace(SETTINGS, constraint=constraint) for constraint in CONSTRAINTS]
VARIANTS = KINDS + [replace(kind, controller="evidence") for kind in KINDS]
Select = Callable[[int, Tensor], Tensor]


def name(settings: GateSettings) -> str:
    return f"{settings.constraint.granularity}-{settings.constraint.scope}-{settings.controller}"


variants = pytest.mark.parametrize("settings", VARIANTS, ids=name)
sampled = pytest.mark.parametrize("settings", KINDS, ids=name)


def loss(select: Select, sequences: Tensor, scale: float = 0.02) -> Tensor:
    """The loss of a small model.

    Each layer mixes the state of a sequence with its own weights and scales the result by the gates
    of the heads.
    """
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(LAYERS, HEADS, HEADS, generator=generator)
    state = torch.randn(SEQUENCES, HEADS, generator=generator)[sequences]
    for layer in range(LAYERS):
        state = state + torch.tanh(state @ mixing[layer]) * select(layer, sequences)
    return scale * state.square().sum()


def gates_of(bank: GateBank) -> Select:
    """Returns a function that selects gates of the bank, and checks their shape and precision."""

    def select(layer: int, sequences: Tensor) -> Tensor:
        windows, gate, closed = bank.select(layer, sequences)
        assert windows == (bank.settings.window,) * bank.constraint.num_kv_heads
        assert gate is not None
        assert gate.shape == (len(sequences), HEADS)
        assert gate.dtype == torch.float32
        # Every bank of these tests draws its gates on the CPU, where the host knows them.
        everywhere = bank.select(layer, torch.arange(SEQUENCES)).gate
        assert everywhere is not None
        assert closed == tuple((everywhere == 0).all(dim=0).tolist())
        return gate

    return select


def backward(bank: GateBank, micro_batches: Sequence[Sequence[int]], scale: float = 0.02) -> None:
    """Runs the backward pass of each micro-batch.

    Gradients accumulate in the leaves of the bank.
    """
    for sequences in micro_batches:
        loss(gates_of(bank), torch.tensor(sequences), scale).backward()


def spread(bank: GateBank) -> GateBank:
    """Gives each unit a different value, so that a mix-up of units shows."""
    if bank.settings.controller == "evidence":
        return bank
    log_alpha = sampler(bank).log_alpha
    with torch.no_grad():
        log_alpha += torch.linspace(-1, 1, log_alpha.numel()).reshape(log_alpha.shape)
    return bank


def sampler(bank: GateBank) -> SampledGates:
    assert isinstance(bank.gates, SampledGates)
    return bank.gates


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in state.items()}


def expected_sparsity(log_alpha: Tensor, settings: GateSettings) -> Tensor:
    """The formula of the method, one number per constraint."""
    closed = 1 - torch.sigmoid(log_alpha - (2 / 3) * math.log(0.1 / 1.1))
    return closed.mean(dim=1) if settings.constraint.scope == "per_layer" else closed.mean()[None]
