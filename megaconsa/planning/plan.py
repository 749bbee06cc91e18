"""What a configuration will cost, from shapes alone: parameters, memory, FLOPs, KV cache and time.

A plan needs no GPU and no data. It also says what the ranks of several GPUs wait for: the bubble of
the pipeline, and stages and tensor ranks of unequal cost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megaconsa.config import Config, PipelineSchedule
from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.model.budget import Budget
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import kv_cache_bytes, parameter_count, peak_flops, training_flops
from megaconsa.parallel.recomputation import Recomputation
from megaconsa.parallel.stages import layer_costs, stages_by_rank
from megaconsa.parallel.topology import Topology
from megaconsa.planning.assumptions import even_allocation
from megaconsa.planning.balance import TensorBalance, busiest, costs_of_busiest, tensor_balance
from megaconsa.planning.memory import Memory, rank_memory
from megaconsa.planning.recomputation import choose_recomputation


@dataclass(frozen=True)
class PipelineRank:
    """What one rank of the pipeline holds and does."""

    layers: list[tuple[int, int]]
    """Each of its stages: the first of the pipeline's layers, and the one after the last.

    Layer 0 is the embedding, 1 to L are the model's layers, L + 1 is the final norm, and L + 2 is
    the output head.
    """
    in_flight: list[int]
    """Micro-batches whose activations it keeps at the peak, for each of its stages."""
    cost_share: float
    """Share of the model's FLOPs."""
    memory: Memory


@dataclass(frozen=True)
class Cost:
    """The costs that depend on the allocation."""

    flops_per_token: float
    """Forward and backward FLOPs. A sequence is one document."""
    attention_share: float
    """Share of the FLOPs that is attention's Q K^T and P V."""
    kv_cache_bytes_per_token: int
    """Bytes that one more token adds once the windows are full."""
    kv_cache_bytes: int
    """Bytes of one sequence of `Plan.context` tokens."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    model: str
    source: str
    window: int
    sparsity: float
    budget: Budget | None
    """The budget that the sparsity keeps, if one is configured."""
    parameters: int
    embedding_parameters: int
    matmul_parameters: int
    gpus: int
    tensor_ranks: int
    pipeline_ranks: int
    data_ranks: int
    schedule: PipelineSchedule
    accumulation: int
    """Micro-batches that a data rank runs in each step."""
    bubble: float
    """Share of a step in which the pipeline fills or drains."""
    pipeline: list[PipelineRank]
    """By pipeline rank."""
    pipeline_imbalance: float
    """FLOPs of the busiest pipeline rank over those of the mean one."""
    tensor_balance: TensorBalance
    efficiency: float
    """Share of a step in which the mean GPU computes, after the bubble and both imbalances."""
    memory: Memory
    """Memory of the fullest pipeline rank."""
    recomputed: Recomputation
    context: int
    dense: Cost
    allocation: Cost
    """While learning, the cost at the target sparsity, which the finished table has."""
    tokens_per_step: int
    steps: int
    tokens: int
    device: str
    peak_flops: float
    mfu: float
    """Share of the peak that a GPU reaches while it has work."""
    tokens_per_second: float
    """Tokens of all GPUs together, at `mfu` and `efficiency`. A learning run counts as dense."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan for JSON."""
        return asdict(self)


def make_plan(
    config: Config, gpus: int, device: str, mfu: float, context: int | None = None
) -> Plan:
    """Plans a run of `config`.

    gpus: number of devices, with one process on each.
    device: name of the GPU, for its bf16 peak.
    mfu: share of that peak that a GPU reaches while it has work.
    context: tokens in the KV cache. None is the training length.

    Raises InputError for a device whose peak is unknown, an MFU outside (0, 1], GPUs or a batch
    that the ranks cannot share, an allocation that does not fit, and a memory budget that cannot be
    kept.
    """
    peak = peak_flops(device)
    if peak is None:
        raise InputError(
            f"--device {device} is no GPU whose bf16 peak is known; "
            "use for example a100, h100, h200 or b200"
        )
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu:g} must lie between 0 and 1; 0.4 is common")
    model_config = config.to_model_config()
    training = config.training
    topology = Topology.of(config, gpus)
    allocation = planned_allocation(config)
    # While learning, all heads compute full attention.
    trained = None if config.learning else allocation
    length = training.sequence_length
    context = length if context is None else context
    dense = _cost(model_config, None, length, context)
    hybrid = _cost(model_config, allocation, length, context)
    count = parameter_count(model_config)
    tokens_per_step = training.global_batch * length
    costs = layer_costs(model_config, trained, length)
    layers = stages_by_rank(costs, topology)
    recomputed = choose_recomputation(config, model_config, topology, layers, kernels=True)
    pipeline: list[PipelineRank] = []
    for rank, stages in enumerate(layers):
        in_flight = topology.in_flight(rank)
        pipeline_rank = PipelineRank(
            layers=stages,
            in_flight=list(in_flight),
            cost_share=busiest(costs, [stages]) / sum(costs),
            memory=rank_memory(config, model_config, topology, stages, in_flight, recomputed),
        )
        pipeline.append(pipeline_rank)
    # Cost of the rank that is busiest on both axes, over the mean of all ranks.
    tensor_costs = costs_of_busiest(model_config, trained, length, topology.tensor)
    imbalance = busiest(tensor_costs, layers) * topology.pipeline / sum(costs)
    efficiency = (1 - topology.bubble) / imbalance
    flops_per_token = (dense if config.learning else hybrid).flops_per_token
    tokens_per_second = gpus * peak * mfu * efficiency / flops_per_token
    source: str = config.allocation.source
    if config.allocation.source == "rule":
        source = config.allocation.rule
    return Plan(
        model=config.model.preset,
        source=source,
        window=allocation.window,
        sparsity=allocation.sparsity,
        budget=config.allocation.budget(),
        parameters=count.total,
        embedding_parameters=count.embedding,
        matmul_parameters=count.matmul,
        gpus=gpus,
        tensor_ranks=topology.tensor,
        pipeline_ranks=topology.pipeline,
        data_ranks=topology.data,
        schedule=topology.schedule,
        accumulation=topology.accumulation,
        bubble=topology.bubble,
        pipeline=pipeline,
        pipeline_imbalance=busiest(costs, layers) * topology.pipeline / sum(costs),
        tensor_balance=tensor_balance(model_config, trained, length, topology.tensor),
        efficiency=efficiency,
        memory=max((rank.memory for rank in pipeline), key=lambda memory: memory.total),
        recomputed=recomputed,
        context=context,
        dense=dense,
        allocation=hybrid,
        tokens_per_step=tokens_per_step,
        steps=training.steps,
        tokens=tokens_per_step * training.steps,
        device=device,
        peak_flops=peak,
        mfu=mfu,
        tokens_per_second=tokens_per_second,
        seconds=tokens_per_step * training.steps / tokens_per_second,
    )


def planned_allocation(config: Config) -> Allocation:
    """Returns the allocation of a run.

    While learning, it returns some table of the final sparsity. FLOPs and cache depend on nothing
    else.
    """
    fixed = config.fixed_allocation()
    if fixed is not None:
        return fixed
    constraint = config.constraint()
    return even_allocation(constraint, config.attention.window)


def _cost(
    model_config: ModelConfig, allocation: Allocation | None, length: int, context: int
) -> Cost:
    flops = training_flops(model_config, allocation, length, [length])
    linear_flops = 6 * parameter_count(model_config).matmul * length
    # A context in which every window is full, even if the requested one is shorter.
    long = max(context, allocation.window if allocation else 0)
    longer = kv_cache_bytes(model_config, allocation, long + 1)
    return Cost(
        flops_per_token=flops / length,
        attention_share=1 - linear_flops / flops,
        kv_cache_bytes_per_token=longer - kv_cache_bytes(model_config, allocation, long),
        kv_cache_bytes=kv_cache_bytes(model_config, allocation, context),
    )
