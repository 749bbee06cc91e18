"""Weights are gathered over data ranks in the order in which the next forward pass needs them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megaconsa.parallel.deepspeed import flat_buckets
from megaconsa.parallel.deepspeed.weight_gathering import WeightGathering
from megaconsa.parallel.world import join
from tests.support.forked_ranks import run_forked

RANKS = 2
WIDTH = 4
LAYERS = 5
BUCKET = 12
"""Elements. A layer's matrix of 16 elements has parts in two buckets or more."""


def head(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return x @ module.weight.T


def model() -> tuple[SimpleNamespace, list[nn.Parameter]]:
    """A pipeline module of linear layers and a head that is tied to the first, and its weights."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False).bfloat16() for _ in range(LAYERS)]
    functions = [*layers, partial(head, layers[0])]
    return SimpleNamespace(forward_funcs=functions), [layer.weight for layer in layers]


def optimizer(weights: list[nn.Parameter], rank: int) -> SimpleNamespace:
    """What the gathering reads of DeepSpeed's optimizer.

    The last layer's weight is a group of its own. The others lie in memory in the reverse order of
    the forward pass.
    """
    groups: list[list[nn.Parameter]] = [weights[-2::-1], weights[-1:]]
    flats = []
    for group in groups:
        flat = torch.cat([weight.detach().flatten() for weight in group])
        begin = 0
        for weight in group:
            weight.data = flat[begin : begin + weight.numel()].view(weight.shape)
            begin += weight.numel()
        flats.append(flat)
    partitions = [list(flat.chunk(RANKS)) for flat in flats]
    return SimpleNamespace(
        bf16_groups=groups,
        bf16_groups_flat=flats,
        bf16_partitioned_groups=partitions,
        fp32_groups_flat_partition=[parts[rank].float() for parts in partitions],
        real_dp_process_group=[dist.group.WORLD] * len(groups),
    )


def expected(weights: list[Tensor], x: Tensor) -> Tensor:
    for weight in weights:
        x = x @ weight.T
    return x


def check() -> None:
    """One rank of a test."""
    join()
    with (
        patch.object(flat_buckets, "BUCKET_ELEMENTS", BUCKET),
        patch.object(flat_buckets, "SMALL_GROUP", WIDTH * WIDTH),
        torch.no_grad(),
    ):
        gather(dist.get_rank())


def gather(rank: int) -> None:
    pipeline, weights = model()
    parts = optimizer(weights, rank)
    gathering = WeightGathering(parts, pipeline, nullcontext)
    calls = len(gathering._sends)
    assert calls > LAYERS
    before = [weight.clone() for weight in weights]
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    for step in range(1, 4):
        for master in parts.fp32_groups_flat_partition:
            master += 1
        gathering.start()
        left = [len(gathering._works)]
        found = x
        for layer in pipeline.forward_funcs:
            found = layer(found)
            left.append(len(gathering._works))
        # Each layer waits for its own weights, and the head for none: the first layer did.
        assert left[0] == calls
        assert left == sorted(left, reverse=True)
        assert len(set(left)) == LAYERS + 1
        assert left[LAYERS] == left[LAYERS + 1] == 0
        updated = [(weight.float() + step).bfloat16() for weight in before]
        for weight, wanted in zip(weights, updated, strict=True):
            torch.testing.assert_close(weight.data, wanted, atol=0.02, rtol=0)
        torch.testing.assert_close(found, expected([*weights, weights[0]], x))
        everywhere = [torch.empty_like(found) for _ in range(RANKS)]
        dist.all_gather(everywhere, found)
        assert torch.equal(everywhere[0], everywhere[1])
    # A step that follows without a forward pass waits for the last one.
    gathering.start()
    gathering.start()
    gathering.finish()
    assert not gathering._works


def test_each_layer_waits_for_its_own_weights() -> None:
    run_forked(RANKS, check)
