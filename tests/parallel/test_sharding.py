"""Shards of weights and heads join to the whole, in the original order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megaconsa.consa.allocation import Allocation
from megaconsa.model.config import ModelConfig
from megaconsa.model.qwen3 import weight_shapes
from megaconsa.parallel.sharding import OwnHeads, Sharding, is_divided

SHAPE = ModelConfig(61, 24, 40, 3, 8, 4, head_dim=6, tie_word_embeddings=False)
TABLE = Allocation(
    4, ((True, True, False, False), (False, True, True, True), (False, False, False, True))
)


@pytest.mark.parametrize("allocation", [None, TABLE], ids=["learning", "allocated"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_join_to_the_whole(size: int, allocation: Allocation | None) -> None:
    for name, shape in weight_shapes(SHAPE).items():
        whole = torch.rand(shape)
        parts = [Sharding(SHAPE, allocation, rank, size).split(name, whole) for rank in range(size)]
        assert all(part.shape == parts[0].shape for part in parts)
        assert (parts[0].numel() < whole.numel()) == (size > 1 and is_divided(name))
        assert torch.equal(Sharding(SHAPE, allocation, 0, size).join(name, parts), whole)


def test_every_rank_computes_as_many_full_heads() -> None:
    for layer, full in ((0, (1, 1)), (1, (1, 2)), (2, (0, 1))):
        windows = []
        for rank in range(2):
            own, gate, _ = OwnHeads(TABLE, Sharding(SHAPE, TABLE, rank, 2)).select(
                layer, torch.tensor([0])
            )
            assert isinstance(own, tuple)
            assert gate is None
            assert list(own) == sorted(own, reverse=True)  # full heads first
            windows.append(sum(window != TABLE.window for window in own))
        assert sorted(windows) == sorted(full)


def test_a_head_moves_with_its_queries() -> None:
    """Query and output weights move with their KV head.

    The rows of q_proj and the columns of o_proj belong to the KV head whose rows of k_proj are at
    the same place.
    """
    sharding = Sharding(SHAPE, TABLE, 0, 2)
    own = sharding.own_heads(0)
    heads = torch.arange(SHAPE.num_key_value_heads).repeat_interleave(SHAPE.head_dim)
    queries = heads.repeat_interleave(SHAPE.queries_per_kv_head)
    expected = torch.tensor(own).repeat_interleave(SHAPE.head_dim)
    prefix = "model.layers.0.self_attn."
    assert torch.equal(sharding.split(prefix + "k_proj.weight", heads[:, None])[:, 0], expected)
    both = expected.repeat_interleave(SHAPE.queries_per_kv_head)
    assert torch.equal(sharding.split(prefix + "q_proj.weight", queries[:, None])[:, 0], both)
    assert torch.equal(sharding.split(prefix + "o_proj.weight", queries[None])[0], both)


def test_tied_head_has_no_weight_of_its_own() -> None:
    assert "lm_head.weight" not in weight_shapes(replace(SHAPE, tie_word_embeddings=True))
