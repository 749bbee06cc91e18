"""What a GPU receives from others in one step, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaconsa.config import Config
from megaconsa.consa.allocation import Allocation
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.topology import Topology
from megaconsa.planning.memory import (
    Stages,
    block_weights,
    full_heads_by_layer,
    received_keys,
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU of a pipeline rank receives in one step."""

    data: int
    """Sums of gradients in fp32, and the new weights, from other data and context ranks."""
    tensor: int
    """Hidden states: two gathers and two sums in each layer, forward and backward."""
    context_gather: int
    """Keys and values for heads with full attention, and their gradients."""
    context_halo: int
    """The keys and values before each chunk for windowed heads, and their gradients."""
    pipeline: int
    """Hidden states from the stage before, and gradients from the stage after."""

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.data + self.tensor + self.context_gather + self.context_halo + self.pipeline


def step_traffic(
    config: Config,
    model_config: ModelConfig,
    topology: Topology,
    stages: Stages,
    weight_bytes: int,
    recomputed_layers: Sequence[int],
    allocation: Allocation | None,
) -> Traffic:
    """Returns the traffic of the pipeline rank that holds these stages.

    weight_bytes: bytes of its weights.
    recomputed_layers: layers that are recomputed whole. Their forward pass communicates again.
    allocation: None while learning.
    """
    training = config.training
    value = 4 if training.precision == "fp32" else 2  # bytes
    tensor = topology.tensor
    averaging = topology.data * topology.context
    tokens = training.micro_batch * training.sequence_length // topology.context
    hidden = value * tokens * model_config.hidden_size
    weights = weight_bytes // value
    # Each rank receives what the n - 1 others hold: gradients in fp32, then weights.
    gradients = weights
    if topology.shard == "gradients":
        # Those of the blocks are summed for each micro-batch.
        in_blocks = block_weights(model_config, stages, tensor)
        gradients += (topology.accumulation - 1) * in_blocks
    data = (4 * gradients + value * weights) * (averaging - 1) // averaging
    full_heads = full_heads_by_layer(model_config, allocation)
    passes = 0
    gathered = 0
    halo = 0
    boundaries = 0
    for start, stop in stages:
        for block in range(max(start, 1), min(stop, model_config.num_hidden_layers + 1)):
            # Forward and backward, and forward once more where a layer is recomputed.
            times = 3 if block - 1 in recomputed_layers else 2
            passes += times
            count = full_heads[block - 1]
            full, windowed = received_keys(config, model_config, topology, count)
            gathered += times * value * full
            halo += times * value * windowed
        # Hidden states unless it is the first stage, and gradients unless it is the last.
        boundaries += int(start > 0) + int(stop < model_config.num_hidden_layers + 3)
    accumulation = topology.accumulation
    return Traffic(
        data=data,
        tensor=accumulation * passes * 4 * hidden * (tensor - 1) // tensor,
        context_gather=accumulation * gathered,
        context_halo=accumulation * halo,
        pipeline=accumulation * boundaries * hidden,
    )
