"""Whole tensors are spread evenly over ranks, and a rank's fragment of one is read alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaconsa.consa.allocation import Allocation
from megaconsa.model.config import PRESETS, ModelConfig
from megaconsa.model.qwen3 import weight_shapes
from megaconsa.parallel.gathered_weights import DistributedWeights
from megaconsa.parallel.sharding import Sharding

SHAPE = ModelConfig(61, 24, 40, 1, 8, 4, head_dim=6, tie_word_embeddings=False)
PREFIXES = ("", "exp_avg/", "exp_avg_sq/")


@pytest.mark.parametrize(
    ("model", "ranks", "pipeline", "most"),
    [
        ("qwen3-8b", 64, 1, 1.1),
        ("qwen3-8b", 16, 4, 1.1),
        ("qwen3-8b", 1024, 1, 2.0),
        # Weights other than the embedding have up to 2.5 mean shares, and less than 64 MiB.
        ("qwen3-1.7b", 1024, 1, 2.6),
        ("qwen3-0.6b", 1024, 1, 2.6),
    ],
)
def test_no_rank_writes_much_more_than_the_mean(
    model: str, ranks: int, pipeline: int, most: float
) -> None:
    """An embedding is larger than a mean share, so several ranks write it."""
    shapes = weight_shapes(PRESETS[model])
    owners = {name: number * pipeline // len(shapes) for number, name in enumerate(shapes)}
    mesh: Any = SimpleNamespace(dp_cp_size=ranks, pp_size=pipeline, tp=SimpleNamespace(size=1))
    sharding = Sharding(PRESETS[model], None)
    keepers = DistributedWeights({}, shapes, owners, sharding, mesh, PREFIXES).keepers
    assert len(keepers) == 3 * len(shapes)
    for stage in range(pipeline):
        load = dict.fromkeys(range(ranks), 0)
        for name in (name for name in shapes if owners[name] == stage):
            rows, *inner = shapes[name]
            for prefix in PREFIXES:
                written = []
                for (rank, _), block in keepers[prefix + name]:
                    load[rank] += len(block) * math.prod(inner)
                    written += block
                assert written == list(range(rows))
        mean = sum(load.values()) / ranks
        assert max(load.values()) <= most * mean


class Watched:
    """A tensor that counts the elements that are read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self.elements = 0

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        found = self.tensor[index]
        self.elements += found.numel()
        return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fragments_make_the_part_and_read_their_rows_alone(size: int) -> None:
    """Heads change their order, and the last rank's rows of the vocabulary are padded."""
    table = Allocation(4, ((False, True, False, True),))
    for name, shape in weight_shapes(SHAPE).items():
        whole = torch.rand(shape)
        for rank in range(size):
            sharding = Sharding(SHAPE, table, rank, size)
            part = sharding.split(name, whole)
            width = part[0].numel()
            parameters = {name: nn.Parameter(part)}
            mesh: Any = None
            weights = DistributedWeights(parameters, {}, {}, sharding, mesh, PREFIXES)
            middle = part.numel() * 2 // 3
            for elements in (range(middle), range(middle, part.numel())):
                watched = Watched(whole)
                fragment = weights.fragment(name, watched, elements)
                assert torch.equal(fragment, part.flatten()[elements.start : elements.stop])
                assert watched.elements <= len(elements) + 2 * width
