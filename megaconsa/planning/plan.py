"""What a configuration will cost, from shapes alone: parameters, memory, FLOPs, KV cache, time. It needs no GPU and no data.

With several GPUs it also says what their ranks wait for: the pipeline's bubble, stages and tensor ranks of unequal cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megaconsa.config import Config, PipelineSchedule
from megaconsa.consa.allocation import FULL_WINDOW, Allocation
from megaconsa.errors import InputError
from megaconsa.model.budget import Budget
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import (
    block_parameters,
    kv_cache_bytes,
    kv_head_flops,
    parameter_count,
    peak_flops,
    training_flops,
)
from megaconsa.model.loss import CHUNK_BYTES
from megaconsa.parallel.stages import cut, layer_costs
from megaconsa.parallel.topology import Topology
from megaconsa.parallel.vocabulary import rows


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU when it keeps the most activations, which is about the peak; the same on every tensor and data rank."""

    weights: int
    gradients: int
    """fp32, accumulated over micro-batches, and in bf16 those of the present one; every data rank holds those of all its weights."""
    optimizer: int
    """fp32 master weights and Adam's two moments, sharded over the data ranks (ZeRO-1)."""
    activations: int
    activations_kept: int
    """Activations without checkpointing."""
    activations_checkpointed: int
    """Activations with checkpointing."""
    logits: int
    """Where the pipeline ends, what the fused cross-entropy needs: a chunk of logits, the gradients of the head and of its input."""
    total: int


@dataclass(frozen=True)
class PipelineRank:
    """What one rank of the pipeline holds and does."""

    layers: list[tuple[int, int]]
    """For each of its stages the first of the pipeline's layers and the one after the last: 0 embedding, 1 to L the model's
    layers, L + 1 final norm, L + 2 output head."""
    in_flight: list[int]
    """For each of its stages the micro-batches whose activations it keeps at the peak."""
    cost_share: float
    """Part of the model's FLOPs."""
    memory: Memory


@dataclass(frozen=True)
class TensorBalance:
    """How evenly attention lies over the tensor ranks, which wait for each other in every layer; while learning all heads cost alike."""

    full_heads: list[int]
    """KV heads with full attention on each rank, over all layers."""
    imbalance: float
    """FLOPs of each layer's busiest rank over those of the mean rank, all layers together."""
    full_heads_unpermuted: list[int]
    """The same had the heads stayed in the model's order."""
    imbalance_unpermuted: float


@dataclass(frozen=True)
class Cost:
    """What depends on the allocation."""

    flops_per_token: float
    """Forward and backward, one document a sequence."""
    attention_share: float
    """Part of the FLOPs that is attention's Q K^T and P V."""
    kv_cache_bytes_per_token: int
    """What one more token adds once the windows are full."""
    kv_cache_bytes: int
    """One sequence of `Plan.context` tokens."""


@dataclass(frozen=True)
class Plan:
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
    """Micro-batches a data rank runs for each step."""
    bubble: float
    """Share of a step in which the pipeline fills or drains."""
    pipeline: list[PipelineRank]
    """By pipeline rank."""
    pipeline_imbalance: float
    """FLOPs of the busiest pipeline rank over those of the mean one."""
    tensor_balance: TensorBalance
    efficiency: float
    """Share of a step in which the mean GPU computes: what the bubble and both imbalances leave."""
    memory: Memory
    """Of the fullest pipeline rank."""
    context: int
    dense: Cost
    allocation: Cost
    """While learning: at the target sparsity, which the finished table has."""
    tokens_per_step: int
    steps: int
    tokens: int
    device: str
    peak_flops: float
    mfu: float
    """Share of the peak while a GPU has work."""
    tokens_per_second: float
    """Of all GPUs together, at `mfu` and `efficiency`; a learning run is reckoned as dense."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    config: Config, gpus: int, device: str, mfu: float, context: int | None = None
) -> Plan:
    """Reckons a run of `config` on `gpus` devices, one process each, at `mfu`.

    context: tokens of the KV cache; None is the training length. Raises InputError for a device whose peak is unknown, an MFU outside
    (0, 1], GPUs or a batch that the ranks cannot share, and an allocation that does not fit.
    """
    peak = peak_flops(device)
    if peak is None:
        raise InputError(
            f"--device {device} is no GPU whose bf16 peak is known; use for example a100, h100, h200 or b200"
        )
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu:g} must lie between 0 and 1; 0.4 is common")
    shape, training = config.shape(), config.training
    topology = Topology.of(config, gpus)
    allocation = planned_allocation(config)
    trained = None if config.learning else allocation
    length = training.sequence_length
    context = length if context is None else context
    dense = _cost(shape, None, length, context)
    hybrid = _cost(shape, allocation, length, context)
    count = parameter_count(shape)
    tokens_per_step = training.global_batch * length
    costs = layer_costs(shape, trained, length)
    bounds = cut(costs, topology.stages)
    layers = [
        [(bounds[stage], bounds[stage + 1]) for stage in topology.stages_of(rank)]
        for rank in range(topology.pipeline)
    ]
    pipeline = [
        PipelineRank(
            layers=held,
            in_flight=list(topology.in_flight(rank)),
            cost_share=_busiest(costs, [held]) / sum(costs),
            memory=_memory(config, shape, topology, held, topology.in_flight(rank)),
        )
        for rank, held in enumerate(layers)
    ]
    tensor_costs = _costs_of_busiest(shape, trained, length, topology.tensor)
    busiest = _busiest(tensor_costs, layers) * topology.pipeline / sum(costs)
    efficiency = (1 - topology.bubble) / busiest
    tokens_per_second = (
        gpus * peak * mfu * efficiency / (dense if config.learning else hybrid).flops_per_token
    )
    return Plan(
        model=config.model.preset,
        source=config.allocation.source
        if config.allocation.source != "rule"
        else config.allocation.rule,
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
        pipeline_imbalance=_busiest(costs, layers) * topology.pipeline / sum(costs),
        tensor_balance=_tensor_balance(shape, trained, length, topology.tensor),
        efficiency=efficiency,
        memory=max((rank.memory for rank in pipeline), key=lambda memory: memory.total),
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
    """The allocation of a run; while learning some table of the final sparsity, on which alone FLOPs and cache depend."""
    fixed = config.fixed_allocation()
    if fixed is not None:
        return fixed
    constraint = config.constraint()
    return Allocation.from_scores(
        torch.zeros(constraint.shape), constraint, config.attention.window
    )


def activation_values(
    model: ModelConfig, learning: bool, tensor: int = 1, sequence: bool = False
) -> int:
    """Values that one layer keeps of one token for the backward pass, on each of `tensor` ranks.

    Inputs of the two norms and their outputs (4 hidden); q and k before their norms and after rotation, v and the attention's
    output (3 of the queries' width, 3 of the keys'); gate before and after silu, up, and the product (4 intermediate).
    The gated kernel also keeps the difference of its two outputs (one queries' width). Tensor ranks divide all but the residual
    stream; with `sequence` the inputs of the norms too, whose outputs are gathered before they are kept.
    """
    queries, keys = (
        model.num_attention_heads * model.head_dim,
        model.num_key_value_heads * model.head_dim,
    )
    divided = (4 if learning else 3) * queries + 3 * keys + 4 * model.intermediate_size
    return 2 * residual_values(model, tensor, sequence) + 2 * model.hidden_size + divided // tensor


def residual_values(model: ModelConfig, tensor: int = 1, sequence: bool = False) -> int:
    """Values of one token's residual stream on each of `tensor` ranks; with `sequence` each holds a stretch of the tokens."""
    return -(-model.hidden_size // tensor) if sequence else model.hidden_size


def _cost(model: ModelConfig, allocation: Allocation | None, length: int, context: int) -> Cost:
    flops = training_flops(model, allocation, length, [length])
    linear = 6 * parameter_count(model).matmul * length
    cache = kv_cache_bytes(model, allocation, context)
    # A context at which every window is full, whatever the one asked for.
    long = max(context, allocation.window if allocation else 0)
    growth = kv_cache_bytes(model, allocation, long + 1) - kv_cache_bytes(model, allocation, long)
    return Cost(flops / length, 1 - linear / flops, growth, cache)


def _busiest(costs: Sequence[float], layers: Sequence[Sequence[tuple[int, int]]]) -> float:
    """Largest cost of a pipeline rank; layers: of each rank the bounds of its stages."""
    return max(sum(sum(costs[start:stop]) for start, stop in held) for held in layers)


def _costs_of_busiest(
    shape: ModelConfig,
    allocation: Allocation | None,
    length: int,
    tensor: int,
    permuted: bool = True,
) -> list[float]:
    """`layer_costs` as if every tensor rank had as much to do as the busiest one of each layer."""
    costs: list[float] = list(layer_costs(shape, allocation, length))
    if allocation is not None:
        full, windowed = (
            kv_head_flops(shape, window, [length]) for window in (FULL_WINDOW, allocation.window)
        )
        for layer in range(shape.num_hidden_layers):
            heads = _full_heads(allocation, layer, tensor, permuted)
            costs[1 + layer] += (full - windowed) * (max(heads) * tensor - sum(heads))
    return costs


def _full_heads(allocation: Allocation, layer: int, tensor: int, permuted: bool) -> list[int]:
    """Full heads of one layer on each tensor rank."""
    order = allocation.head_order(layer, tensor) if permuted else range(allocation.num_kv_heads)
    full = [allocation.full[layer][head] for head in order]
    each = len(full) // tensor
    return [sum(full[rank * each : (rank + 1) * each]) for rank in range(tensor)]


def _tensor_balance(
    shape: ModelConfig, allocation: Allocation | None, length: int, tensor: int
) -> TensorBalance:
    mean = sum(layer_costs(shape, allocation, length))
    layers = range(shape.num_hidden_layers)
    counts, imbalances = [], []
    for permuted in (True, False):
        if allocation is None:
            counts.append([shape.num_hidden_layers * shape.num_key_value_heads // tensor] * tensor)
        else:
            heads = [_full_heads(allocation, layer, tensor, permuted) for layer in layers]
            counts.append([sum(of_rank) for of_rank in zip(*heads, strict=True)])
        imbalances.append(
            sum(_costs_of_busiest(shape, allocation, length, tensor, permuted)) / mean
        )
    return TensorBalance(counts[0], imbalances[0], counts[1], imbalances[1])


def _memory(
    config: Config,
    shape: ModelConfig,
    topology: Topology,
    layers: Sequence[tuple[int, int]],
    in_flight: Sequence[int],
) -> Memory:
    """Of the pipeline rank that holds these stages, given by their bounds, with so many micro-batches in flight in each."""
    training = config.training
    divided = topology.tensor, config.parallel.sequence and topology.tensor > 1
    value = 4 if training.precision == "fp32" else 2
    weights = _weights(shape, layers, topology.tensor)
    tokens = training.micro_batch * training.sequence_length
    layer = value * tokens * activation_values(shape, config.learning, *divided)
    inputs = value * tokens * residual_values(shape, *divided)
    blocks = [
        len(range(max(start, 1), min(stop, shape.num_hidden_layers + 1))) for start, stop in layers
    ]
    held = sum(count * passes for count, passes in zip(blocks, in_flight, strict=True))
    kept, checkpointed = held * layer, held * inputs + (layer if held else 0)
    parts = {
        "weights": value * weights,
        "gradients": (4 + (value if value == 2 else 0)) * weights,
        "optimizer": -(-12 * weights // topology.data),
        "activations": checkpointed if training.activation_checkpointing else kept,
        "logits": _logit_bytes(shape, tokens, value, topology.tensor)
        if layers[-1][1] == shape.num_hidden_layers + 3
        else 0,
    }
    return Memory(
        **parts,
        activations_kept=kept,
        activations_checkpointed=checkpointed,
        total=sum(parts.values()),
    )


def _weights(shape: ModelConfig, layers: Sequence[tuple[int, int]], tensor: int) -> int:
    """Weights on one tensor rank of these stages. A tied embedding counts once where both its places are on this rank."""
    linear, norms = block_parameters(shape)
    embedding = rows(shape.vocab_size, tensor) * shape.hidden_size
    of_layer = [
        embedding,
        *[linear // tensor + norms] * shape.num_hidden_layers,
        shape.hidden_size,
        embedding,
    ]
    held = [layer for start, stop in layers for layer in range(start, stop)]
    both = shape.tie_word_embeddings and held[0] == 0 and held[-1] == len(of_layer) - 1
    return sum(of_layer[layer] for layer in held) - both * embedding


def _logit_bytes(shape: ModelConfig, tokens: int, value: int, tensor: int) -> int:
    """A chunk of logits, the head's gradient in fp32 and again in the weights' precision, and the gradient of the hidden states."""
    vocabulary = rows(shape.vocab_size, tensor)
    chunk = value * min(tokens, max(1, CHUNK_BYTES // (value * vocabulary))) * vocabulary
    return chunk + (4 + value) * vocabulary * shape.hidden_size + value * tokens * shape.hidden_size
