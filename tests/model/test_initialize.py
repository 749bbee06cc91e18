"""Slices of initial weights have the values of the whole, and take memory for themselves only."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaconsa.model import initialize
from megaconsa.model.config import ModelConfig
from megaconsa.model.initialize import InitialWeight, initial_weight

SHAPE = ModelConfig(61, 24, 40, 3, 6, 2, head_dim=8)


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (7, 17), (40, 24), (61, 31)])
@pytest.mark.parametrize("piece", [16, 48, 1 << 20])
def test_initial_weights_are_drawn_in_pieces_as_at_once(
    size: tuple[int, int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes slices in ascending order, and then an earlier one."""
    monkeypatch.setattr(initialize, "PIECE", piece)
    name = "model.layers.1.mlp.up_proj.weight"
    seed = int.from_bytes(hashlib.sha256(f"3:{name}".encode()).digest()[:8], "little") >> 1
    whole = torch.empty(size).normal_(
        0.0, SHAPE.initializer_range, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(initial_weight(name, torch.Size(size), SHAPE, 3), whole)
    slices = InitialWeight(name, torch.Size(size), SHAPE, 3)
    for first, last in [(0, 1), (1, 3), (size[0] - 1, size[0]), (1, 2), (2, 2)]:
        columns = slice(1, size[1] - 1)
        assert torch.equal(slices[slice(first, last), columns], whole[first:last, columns])


def test_a_slice_of_initial_weights_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows before it are drawn, but never all at once."""
    largest = 0
    empty = torch.empty

    def watched(size: Any, **settings: Any) -> Tensor:
        nonlocal largest
        found = empty(size, **settings)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(initialize, "PIECE", 256)
    monkeypatch.setattr(torch, "empty", watched)
    shape = torch.Size((1000, 64))
    weight = InitialWeight("model.embed_tokens.weight", shape, SHAPE, 0)
    assert weight[slice(900, 910), slice(0, 64)].shape == (10, 64)
    assert largest == 640


def test_modules_without_default_weights() -> None:
    with initialize.without_defaults():
        torch.manual_seed(3)
        expected = torch.get_rng_state()
        nn.Linear(4, 5)
        nn.Embedding(4, 5)
        # Nothing was drawn.
        assert torch.equal(torch.get_rng_state(), expected)
    nn.Linear(4, 5)
    assert not torch.equal(torch.get_rng_state(), expected)
