"""How weights are divided over a tensor group, and which KV heads each rank computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.head_selector import HeadSelector
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.vocabulary import rows

BY_HEAD = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
"""Dimension along which attention's weights are divided, in units of a KV head with its query
heads."""
BY_COLUMN = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
BY_VOCABULARY = {"embed_tokens": 0, "lm_head": 0}
DIVIDED = BY_HEAD | BY_COLUMN | BY_VOCABULARY
"""All other weights, those of norms, are whole on every rank."""


@dataclass(frozen=True)
class Sharding:
    """One rank's part of each weight.

    KV heads are dealt out so that every rank computes nearly the same number of full heads, because
    the slowest rank sets the pace. Full heads come first on each rank, because neighbours of one
    kind share a kernel launch. Everything that leaves the engine is in the original order again.
    """

    model_config: ModelConfig
    allocation: Allocation | None
    """None while learning. The heads then keep their order."""
    rank: int = 0
    size: int = 1

    def local_config(self) -> ModelConfig:
        """The model configuration of one rank's part of a block."""
        return replace(
            self.model_config,
            num_attention_heads=self.model_config.num_attention_heads // self.size,
            num_key_value_heads=self.model_config.num_key_value_heads // self.size,
            intermediate_size=self.model_config.intermediate_size // self.size,
        )

    @cached_property
    def head_orders(self) -> tuple[tuple[int, ...], ...]:
        """KV heads of each layer in the order of ranks, those of rank 0 first."""
        layers = self.model_config.num_hidden_layers
        heads = self.model_config.num_key_value_heads
        if self.allocation is None:
            return (tuple(range(heads)),) * layers
        return tuple(self.allocation.head_order(layer, self.size) for layer in range(layers))

    def own_heads(self, layer: int) -> tuple[int, ...]:
        """Original indices of the KV heads that this rank computes."""
        count = self.model_config.num_key_value_heads // self.size
        return self.head_orders[layer][self.rank * count : (self.rank + 1) * count]

    def split(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a canonical weight, or of its moment."""
        kind = _kind(name)
        if kind not in DIVIDED:
            return whole
        dimension = DIVIDED[kind]
        if kind in BY_VOCABULARY:
            count = rows(len(whole), self.size)
            padding = whole.new_zeros(count * self.size - len(whole), whole.shape[1])
            return torch.cat((whole, padding))[self.rank * count : (self.rank + 1) * count]
        if kind in BY_HEAD:
            own = torch.tensor(self.own_heads(_layer(name)), device=whole.device)
            groups = whole.unflatten(dimension, (self.model_config.num_key_value_heads, -1))
            return groups.index_select(dimension, own).flatten(dimension, dimension + 1)
        return whole.chunk(self.size, dimension)[self.rank]

    def join(self, name: str, parts: list[Tensor]) -> Tensor:
        """The canonical weight from all ranks' parts."""
        kind = _kind(name)
        if kind not in DIVIDED:
            return parts[0]
        dimension = DIVIDED[kind]
        whole = torch.cat(parts, dimension) if len(parts) > 1 else parts[0]
        if kind in BY_VOCABULARY:
            return whole[: self.model_config.vocab_size]
        if kind not in BY_HEAD:
            return whole
        order = self.head_orders[_layer(name)]
        if order == tuple(range(len(order))):
            return whole
        original = torch.tensor(order, device=whole.device).argsort()
        groups = whole.unflatten(dimension, (self.model_config.num_key_value_heads, -1))
        return groups.index_select(dimension, original).flatten(dimension, dimension + 1)


def is_divided(name: str) -> bool:
    """Whether each tensor rank holds a different part of the weight."""
    return _kind(name) in DIVIDED


def sums_over_heads(name: str) -> bool:
    """Whether the weight is whole on every rank, but its gradient comes from the rank's own heads
    only.

    The gradient must then be summed over the tensor group. This holds for the norms of q and k.
    """
    return _kind(name) in ("q_norm", "k_norm")


@dataclass(frozen=True)
class OwnHeads:
    """Selects the windows and gates of this rank's heads."""

    heads: HeadSelector
    sharding: Sharding

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        # While learning, the heads are in order.
        own = self.sharding.own_heads(layer)
        return self.heads.select(layer, sequences).of_heads(own)


def _kind(name: str) -> str:
    """`q_proj` of `model.layers.2.self_attn.q_proj.weight`."""
    return name.split(".")[-2]


def _layer(name: str) -> int:
    return int(name.split(".")[2])
