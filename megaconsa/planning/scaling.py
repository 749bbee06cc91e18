"""How a run would scale to many GPUs: a simulation from a measured MFU and the rates of links.

The work of a GPU takes as long as its FLOPs at the MFU of one GPU. The bytes that it receives
(`traffic.py`) take as long as the slowest link between the ranks of an axis allows. Nothing here
was measured on many GPUs. Time that the host needs to launch kernels and collectives, congestion of
the network, and slow or failing nodes come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaconsa.config import Config, build
from megaconsa.errors import InputError
from megaconsa.parallel.topology import Topology
from megaconsa.planning.changes import topologies
from megaconsa.planning.plan import Plan
from megaconsa.planning.speed import assumed_speed

GPUS_OF_A_NODE = 8
NODE_BYTES = 360e9
"""Bytes/s that a GPU receives inside a node: 80 % of NVLink 4 in one direction."""
NETWORK_BYTES = 40e9
"""Bytes/s that a GPU receives from other nodes: 80 % of 400 Gb/s for each GPU."""


@dataclass(frozen=True)
class Scaled:
    """A plan, and how long a step would take."""

    plan: Plan
    micro_batch: int
    """Sequences."""
    compute: float
    """Seconds in which the mean GPU computes, in one step."""
    idle: float
    """Seconds in which it waits for the pipeline to fill and drain, and for busier ranks."""
    data: float
    """Seconds of gradients and weights that no pass hides."""
    tensor: float
    context: float
    pipeline: float
    efficiency: float
    """Tokens/s of a GPU over those of one GPU alone."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        waits = self.idle + self.data + self.tensor + self.context + self.pipeline
        return self.compute + waits

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of each GPU."""
        return self.plan.tokens_per_step / self.seconds / self.plan.gpus


def scale(config: Config, plan: Plan, counts: Sequence[int], mfu: float | None) -> list[Scaled]:
    """Returns the fastest topology that fits, for each number of GPUs.

    The global batch stays the same.

    plan: of the configuration on any number of GPUs.
    mfu: of one GPU. None assumes the one that `make_plan` would assume.

    Raises InputError if no topology fits, or none can divide the global batch.
    """
    return [_fastest(config, plan, count, mfu) for count in counts]


def _fastest(config: Config, plan: Plan, gpus: int, mfu: float | None) -> Scaled:
    data = config.to_dict()
    # The topology is looked for, so the configuration's own need not work on so many GPUs.
    data["parallel"] |= {"tensor": 1, "context": 1, "pipeline": 1, "schedule": "1f1b"}
    free = build(data)
    possible = topologies(free, plan, mfu, gpus)
    fitting = [simulate(free, each, mfu) for each in possible if each.fits]
    if not fitting:
        why = "no topology can divide" if not possible else "no topology fits that divides"
        raise InputError(
            f"--scale {gpus}: {why} training.global_batch={config.training.global_batch}; "
            "raise training.global_batch, or lower the number of GPUs"
        )
    return max(fitting, key=lambda each: each.tokens_per_second)


def simulate(config: Config, plan: Plan, mfu: float | None) -> Scaled:
    """Returns how long the parts of a step of a plan would take."""
    training = config.training
    if mfu is None:
        mfu = assumed_speed(
            Topology(1, 1, 1, 1),
            plan.recomputed,
            plan.num_layers,
            training.micro_batch,
            training.sequence_length,
            learning=config.learning,
        ).mfu
    cost = plan.dense if config.learning else plan.allocation
    alone = plan.peak_flops * mfu / cost.flops_per_token
    compute = plan.tokens_per_step / alone / plan.gpus
    inner = plan.tensor_ranks * plan.context_ranks
    averaged = inner * plan.data_ranks
    traffic = plan.traffic
    tensor = traffic.tensor / _rate(plan.tensor_ranks)
    context = (traffic.context_gather + traffic.context_halo) / _rate(inner)
    pipeline = traffic.pipeline / _rate(plan.gpus)
    # All stages wait alike for exchanges inside passes, so these stretch the bubble too.
    idle = (compute + tensor + context) * (1 / plan.efficiency - 1)
    # Gradients travel under the last backward pass, weights under the first forward pass. Together
    # these are one micro-batch.
    hidden = (compute + tensor + context) / plan.accumulation
    data = max(0.0, traffic.data / _rate(averaged) - hidden)
    waits = idle + data + tensor + context + pipeline
    return Scaled(
        plan,
        training.micro_batch,
        compute,
        idle,
        data,
        tensor,
        context,
        pipeline,
        efficiency=compute / (compute + waits),
    )


def _rate(neighbours: int) -> float:
    """Bytes/s between ranks of which so many are next to each other."""
    return NODE_BYTES if neighbours <= GPUS_OF_A_NODE else NETWORK_BYTES
