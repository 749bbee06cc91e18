"""How evenly work is spread over pipeline and tensor ranks, which wait for the busiest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaconsa.consa.allocation import FULL_WINDOW, Allocation
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import kv_head_flops
from megaconsa.parallel.stages import layer_costs
from megaconsa.planning.memory import Stages


@dataclass(frozen=True)
class TensorBalance:
    """How evenly attention is spread over the tensor ranks.

    The ranks wait for each other in every layer. While learning, all heads cost the same.
    """

    full_heads: list[int]
    """KV heads with full attention on each rank, over all layers."""
    imbalance: float
    """FLOPs of each layer's busiest rank over those of the mean rank, all layers together."""
    full_heads_unpermuted: list[int]
    """`full_heads` if the heads were in the model's order."""
    imbalance_unpermuted: float
    """`imbalance` if the heads were in the model's order."""


def tensor_balance(
    model_config: ModelConfig, allocation: Allocation | None, length: int, tensor: int
) -> TensorBalance:
    """Returns how evenly attention is spread over `tensor` ranks.

    allocation: None while learning. length: tokens of a sequence.
    """
    return TensorBalance(
        full_heads=_full_heads_by_rank(model_config, allocation, tensor, permuted=True),
        imbalance=_imbalance(model_config, allocation, length, tensor, permuted=True),
        full_heads_unpermuted=_full_heads_by_rank(model_config, allocation, tensor, permuted=False),
        imbalance_unpermuted=_imbalance(model_config, allocation, length, tensor, permuted=False),
    )


def busiest(costs: Sequence[float], ranks: Sequence[Stages]) -> float:
    """Returns the largest cost of a pipeline rank.

    costs: cost of each pipeline layer.
    ranks: the stages of each pipeline rank.
    """
    return max(sum(sum(costs[start:stop]) for start, stop in stages) for stages in ranks)


def costs_of_busiest(
    model_config: ModelConfig,
    allocation: Allocation | None,
    length: int,
    tensor: int,
    permuted: bool = True,
) -> list[float]:
    """Returns `layer_costs` as if every tensor rank had the work of the busiest one of each layer.

    permuted: heads are in the order that balances them, not in the model's order.
    """
    costs: list[float] = list(layer_costs(model_config, allocation, length))
    if allocation is None:
        return costs
    full_flops = kv_head_flops(model_config, FULL_WINDOW, [length])
    extra_flops = full_flops - kv_head_flops(model_config, allocation.window, [length])
    for layer in range(model_config.num_hidden_layers):
        heads = _full_heads(allocation, layer, tensor, permuted)
        # Pipeline layer 0 is the embedding.
        costs[1 + layer] += extra_flops * (max(heads) * tensor - sum(heads))
    return costs


def _imbalance(
    model_config: ModelConfig,
    allocation: Allocation | None,
    length: int,
    tensor: int,
    permuted: bool,
) -> float:
    mean = sum(layer_costs(model_config, allocation, length))
    return sum(costs_of_busiest(model_config, allocation, length, tensor, permuted)) / mean


def _full_heads_by_rank(
    model_config: ModelConfig, allocation: Allocation | None, tensor: int, permuted: bool
) -> list[int]:
    """Returns the full heads on each tensor rank, over all layers."""
    layers = model_config.num_hidden_layers
    if allocation is None:
        # While learning every head counts as full.
        return [layers * model_config.num_key_value_heads // tensor] * tensor
    counts = [_full_heads(allocation, layer, tensor, permuted) for layer in range(layers)]
    return [sum(of_rank) for of_rank in zip(*counts, strict=True)]


def _full_heads(allocation: Allocation, layer: int, tensor: int, permuted: bool) -> list[int]:
    """Returns the full heads of one layer on each tensor rank."""
    order = allocation.head_order(layer, tensor) if permuted else range(allocation.num_kv_heads)
    full = [allocation.full[layer][head] for head in order]
    each = len(full) // tensor
    return [sum(full[rank * each : (rank + 1) * each]) for rank in range(tensor)]
