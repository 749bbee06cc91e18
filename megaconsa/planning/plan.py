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
from megaconsa.model.flops import kv_cache_bytes, parameter_count, training_flops
from megaconsa.parallel.recomputation import Recomputation
from megaconsa.parallel.stages import layer_costs, stages_by_rank
from megaconsa.parallel.topology import Topology
from megaconsa.planning.assumptions import assumed_allocation
from megaconsa.planning.balance import TensorBalance, busiest, costs_of_busiest, tensor_balance
from megaconsa.planning.cards import find_card
from megaconsa.planning.memory import Memory, rank_memory
from megaconsa.planning.recomputation import choose_recomputation
from megaconsa.planning.speed import assumed_speed
from megaconsa.planning.traffic import Traffic, step_traffic

CHECKPOINT_BYTES = 12
"""Bytes of a checkpoint per parameter: an fp32 weight and two fp32 moments."""


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
    assumed: str | None
    """What is assumed about the allocation, if its file does not exist yet."""
    budget: Budget | None
    """The budget that the sparsity keeps, if one is configured."""
    parameters: int
    embedding_parameters: int
    matmul_parameters: int
    gpus: int
    tensor_ranks: int
    context_ranks: int
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
    memory_limit: int
    """The largest estimate in bytes that is expected to fit on the device."""
    recomputed: Recomputation
    traffic: Traffic
    """What a GPU of the pipeline rank that receives most gets in a step."""
    checkpoint_bytes: int
    """Bytes of one checkpoint: fp32 weights and Adam's moments."""
    context: int
    dense: Cost
    allocation: Cost
    """While learning, the cost at the target sparsity, which the finished table has."""
    tokens_per_step: int
    steps: int
    tokens: int
    device: str
    gigabytes: int
    """Memory of the device as on its datasheet."""
    peak_flops: float
    mfu: float
    """Share of the peak that a GPU reaches, without the bubble and the imbalances."""
    mfu_reasons: list[str]
    """The factors of an assumed MFU. Empty if it was given."""
    tokens_per_second: float
    """Tokens of all GPUs together, at `mfu` and `efficiency`. A learning run counts as dense."""
    seconds: float
    gpu_hours: float

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU is expected to have enough memory."""
        return self.memory.total <= self.memory_limit

    @property
    def num_layers(self) -> int:
        """The model's layers."""
        # The pipeline also has the embedding, the final norm and the output head.
        return max(stop for held in self.pipeline for _, stop in held.layers) - 3

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan for JSON.

        The stages of a pipeline rank list the model's layers, from the first to the one after the
        last, and whether the embedding and the output head belong to them. Logits are null on ranks
        without the head.
        """
        content = asdict(self)
        content["fits"] = self.fits
        for held, rank in zip(content["pipeline"], self.pipeline, strict=True):
            del held["layers"]
            held["stages"] = [_stage(bounds, self.num_layers) for bounds in rank.layers]
        for memory in (content["memory"], *(held["memory"] for held in content["pipeline"])):
            memory["logits"] = memory["logits"] or None
        return content


def _stage(bounds: tuple[int, int], num_layers: int) -> dict[str, Any]:
    """Describes a stage. bounds: its first pipeline layer, and the one after the last."""
    start, stop = bounds
    return {
        "layers": [max(start, 1) - 1, min(stop - 1, num_layers)],
        "embedding": start == 0,
        "head": stop == num_layers + 3,
    }


def make_plan(
    config: Config, gpus: int, device: str, mfu: float | None = None, context: int | None = None
) -> Plan:
    """Plans a run of `config`.

    gpus: number of devices, with one process on each.
    device: name of the GPU, for its bf16 peak and memory.
    mfu: share of that peak that a GPU reaches, without the bubble and the imbalances. None assumes
        one by topology and recomputation.
    context: tokens in the KV cache. None is the training length.

    Raises InputError for a device whose peak is unknown, an MFU outside (0, 1], GPUs or a batch
    that the ranks cannot share, an allocation that does not fit, and a memory budget that cannot be
    kept.
    """
    card = find_card(device)
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu:g} must lie between 0 and 1; 0.4 is common")
    model_config = config.to_model_config()
    training = config.training
    topology = Topology.of(config, gpus)
    allocation, assumed = assumed_allocation(config)
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
    recomputed = choose_recomputation(
        config, model_config, topology, layers, kernels=True, allocation=trained
    )
    pipeline: list[PipelineRank] = []
    received: list[Traffic] = []
    for rank, stages in enumerate(layers):
        in_flight = topology.in_flight(rank)
        pipeline_rank = PipelineRank(
            layers=stages,
            in_flight=list(in_flight),
            cost_share=busiest(costs, [stages]) / sum(costs),
            memory=rank_memory(
                config, model_config, topology, stages, in_flight, recomputed, trained
            ),
        )
        pipeline.append(pipeline_rank)
        weights = pipeline_rank.memory.weights
        whole = recomputed.whole
        traffic = step_traffic(config, model_config, topology, stages, weights, whole, trained)
        received.append(traffic)
    # Cost of the rank that is busiest on both axes, over the mean of all ranks.
    tensor_costs = costs_of_busiest(model_config, trained, length, topology.tensor)
    imbalance = busiest(tensor_costs, layers) * topology.pipeline / sum(costs)
    efficiency = (1 - topology.bubble) / imbalance
    flops_per_token = (dense if config.learning else hybrid).flops_per_token
    reasons: list[str] = []
    if mfu is None:
        speed = assumed_speed(
            topology,
            recomputed,
            model_config.num_hidden_layers,
            training.micro_batch,
            length,
            learning=config.learning,
        )
        mfu = speed.mfu
        reasons = speed.reasons
    tokens_per_second = gpus * card.peak_flops * mfu * efficiency / flops_per_token
    seconds = tokens_per_step * training.steps / tokens_per_second
    fullest = max(pipeline, key=lambda rank: rank.memory.total)
    source: str = config.allocation.source
    if config.allocation.source == "rule":
        source = config.allocation.rule
    return Plan(
        model=config.model_name,
        source=source,
        window=allocation.window,
        sparsity=allocation.sparsity,
        assumed=assumed,
        budget=config.allocation.budget(),
        parameters=count.total,
        embedding_parameters=count.embedding,
        matmul_parameters=count.matmul,
        gpus=gpus,
        tensor_ranks=topology.tensor,
        context_ranks=topology.context,
        pipeline_ranks=topology.pipeline,
        data_ranks=topology.data,
        schedule=topology.schedule,
        accumulation=topology.accumulation,
        bubble=topology.bubble,
        pipeline=pipeline,
        pipeline_imbalance=busiest(costs, layers) * topology.pipeline / sum(costs),
        tensor_balance=tensor_balance(model_config, trained, length, topology.tensor),
        efficiency=efficiency,
        memory=fullest.memory,
        memory_limit=card.limit_bytes,
        recomputed=recomputed,
        traffic=max(received, key=lambda traffic: traffic.total),
        checkpoint_bytes=CHECKPOINT_BYTES * count.total,
        context=context,
        dense=dense,
        allocation=hybrid,
        tokens_per_step=tokens_per_step,
        steps=training.steps,
        tokens=tokens_per_step * training.steps,
        device=device,
        gigabytes=card.gigabytes,
        peak_flops=card.peak_flops,
        mfu=mfu,
        mfu_reasons=reasons,
        tokens_per_second=tokens_per_second,
        seconds=seconds,
        gpu_hours=gpus * seconds / 3600,
    )


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
