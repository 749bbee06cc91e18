"""What is recomputed in the backward pass, so that a run keeps a memory budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megaconsa.config import Config
from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.recomputation import Recomputation
from megaconsa.parallel.topology import Topology
from megaconsa.planning.memory import Stages, rank_memory

BACKENDS = ("auto", "triton", "flash")
"""Attention backends that save q and k themselves. Others may save copies, which stay."""


def choose_recomputation(
    config: Config,
    model_config: ModelConfig,
    topology: Topology,
    stages: Sequence[Stages],
    *,
    kernels: bool,
    allocation: Allocation | None = None,
) -> Recomputation:
    """Chooses the layers of which something is recomputed.

    All layers are recomputed with training.activation_checkpointing, and nothing is without a
    budget. With training.memory_gib each pipeline rank recomputes as little as keeps its estimate
    below the budget: first q and k of as few layers as that takes. If those of all its layers are
    not enough, it also recomputes as few layers whole as that takes. The first layers of its stages
    come first.

    stages: those of each pipeline rank.
    kernels: whether blocks run by the kernels of a GPU. Other blocks cannot recompute q and k
        alone.
    allocation: as `rank_memory` takes it.

    Raises InputError if a rank exceeds the budget even where all its layers are recomputed.
    """
    training = config.training
    can_recompute_heads = kernels and config.attention.backend in BACKENDS
    if training.activation_checkpointing:
        return Recomputation(whole=tuple(range(model_config.num_hidden_layers)))
    if training.memory_gib is None:
        return Recomputation()
    heads: list[int] = []
    whole: list[int] = []
    for rank, own in enumerate(stages):
        in_flight = topology.in_flight(rank)
        # Where more micro-batches are in memory, a recomputed layer saves more.
        order = sorted(zip(in_flight, own, strict=True), key=lambda stage: -stage[0])
        layers: list[int] = []
        for _, (start, stop) in order:
            layers += range(max(start, 1) - 1, min(stop - 1, model_config.num_hidden_layers))
        for choice in _choices(layers, can_recompute_heads):
            memory = rank_memory(config, model_config, topology, own, in_flight, choice, allocation)
            if memory.total <= training.memory_gib * 2**30:
                heads += choice.heads
                whole += choice.whole
                break
        else:
            least = math.ceil(memory.total / 2**30)
            raise InputError(
                f"training.memory_gib={training.memory_gib:g} is too little: pipeline rank {rank} "
                f"takes {memory.total / 2**30:.1f} GiB with all layers recomputed; lower "
                f"training.micro_batch, use more ranks, or raise it to {least}"
            )
    return Recomputation(tuple(sorted(heads)), tuple(sorted(whole)))


def _choices(layers: Sequence[int], can_recompute_heads: bool) -> Iterator[Recomputation]:
    """What a rank with these layers can recompute, from nothing to everything."""
    with_heads = tuple(layers) if can_recompute_heads else ()
    for count in range(len(with_heads) + 1):
        yield Recomputation(heads=with_heads[:count])
    for count in range(1, len(layers) + 1):
        yield Recomputation(heads=with_heads[count:], whole=tuple(layers[:count]))
