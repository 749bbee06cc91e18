"""Which layers are recomputed in the backward pass, so that a run keeps a memory budget."""

from __future__ import annotations

from collections.abc import Sequence

from megaconsa.config import Config
from megaconsa.errors import InputError
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.topology import Topology
from megaconsa.planning.memory import Stages, rank_memory


def recomputed_layers(
    config: Config, model_config: ModelConfig, topology: Topology, stages: Sequence[Stages]
) -> frozenset[int]:
    """The model's layers, from 0, that are recomputed.

    All are with training.activation_checkpointing, and none without a budget. With
    training.memory_gib each pipeline rank recomputes as few as keep its estimate below the budget,
    the first of its stages.

    stages: those of each pipeline rank.

    Raises InputError if a rank exceeds the budget even where all its layers are recomputed.
    """
    training = config.training
    if training.activation_checkpointing:
        return frozenset(range(model_config.num_hidden_layers))
    if training.memory_gib is None:
        return frozenset()
    chosen: set[int] = set()
    for rank, own in enumerate(stages):
        in_flight = topology.in_flight(rank)
        # Where more micro-batches are in memory, a recomputed layer saves more.
        order = sorted(zip(in_flight, own, strict=True), key=lambda stage: -stage[0])
        layers: list[int] = []
        for _, (start, stop) in order:
            layers += range(max(start, 1) - 1, min(stop - 1, model_config.num_hidden_layers))
        for count in range(len(layers) + 1):
            recomputed = layers[:count]
            memory = rank_memory(config, model_config, topology, own, in_flight, recomputed)
            if memory.total <= training.memory_gib * 2**30:
                chosen.update(recomputed)
                break
        else:
            raise InputError(
                f"training.memory_gib={training.memory_gib:g} is too little: pipeline rank {rank} "
                f"takes {memory.total / 2**30:.1f} GiB with all layers recomputed; lower "
                "training.micro_batch, use more ranks, or raise it"
            )
    return frozenset(chosen)
