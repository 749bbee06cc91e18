"""How the model's canonical weights lie over the ranks of a tensor group, and which KV heads a rank computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.model.attention import HeadSelector
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.vocabulary import rows

BY_HEAD = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
"""Dimension along which attention's weights are divided, whole KV-head groups (a KV head with its query heads) at a time."""
BY_COLUMN = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
BY_VOCABULARY = {"embed_tokens": 0, "lm_head": 0}
DIVIDED = BY_HEAD | BY_COLUMN | BY_VOCABULARY
"""Every other weight, the norms', stands whole on every rank."""


@dataclass(frozen=True)
class Sharding:
    """One rank's part of each weight.

    KV-head groups are dealt out so that each rank computes as equal a number of full heads as there can be, full ones first: the slowest
    rank sets the pace, and neighbours of a kind share a launch. Whatever leaves the engine is in the original order again.
    """

    config: ModelConfig
    allocation: Allocation | None
    """None while learning: the heads stay in order."""
    rank: int = 0
    size: int = 1

    def local_config(self) -> ModelConfig:
        """The shape of what one rank computes in a block."""
        return replace(
            self.config,
            num_attention_heads=self.config.num_attention_heads // self.size,
            num_key_value_heads=self.config.num_key_value_heads // self.size,
            intermediate_size=self.config.intermediate_size // self.size,
        )

    @cached_property
    def head_orders(self) -> tuple[tuple[int, ...], ...]:
        """Each layer's KV heads as they stand over the ranks, rank 0's first."""
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        if self.allocation is None:
            return (tuple(range(heads)),) * layers
        return tuple(self.allocation.head_order(layer, self.size) for layer in range(layers))

    def own_heads(self, layer: int) -> tuple[int, ...]:
        """Original indices of the KV heads that this rank computes."""
        count = self.config.num_key_value_heads // self.size
        return self.head_orders[layer][self.rank * count : (self.rank + 1) * count]

    def split(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a canonical weight (or of a moment of it)."""
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
            groups = whole.unflatten(dimension, (self.config.num_key_value_heads, -1))
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
            return whole[: self.config.vocab_size]
        if kind in BY_HEAD and (order := self.head_orders[_layer(name)]) != tuple(
            range(len(order))
        ):
            original = torch.tensor(order, device=whole.device).argsort()
            groups = whole.unflatten(dimension, (self.config.num_key_value_heads, -1))
            return groups.index_select(dimension, original).flatten(dimension, dimension + 1)
        return whole


def is_divided(name: str) -> bool:
    """Whether each rank holds another part of the weight."""
    return _kind(name) in DIVIDED


def sums_over_heads(name: str) -> bool:
    """Whether a whole weight meets only this rank's heads, so that its gradient is one part of a sum: the norms of q and k."""
    return _kind(name) in ("q_norm", "k_norm")


@dataclass(frozen=True)
class OwnHeads:
    """The windows and gates of a layer, those of this rank's heads only."""

    heads: HeadSelector
    sharding: Sharding

    def select(self, layer: int, sequences: Tensor) -> tuple[int | tuple[int, ...], Tensor | None]:
        window, gate = self.heads.select(layer, sequences)
        own = self.sharding.own_heads(layer)
        if isinstance(window, tuple):
            window = tuple(window[head] for head in own)
        # Gates are there while learning only, and then the heads are in order.
        return window, gate if gate is None else gate[:, own[0] : own[-1] + 1]


def _kind(name: str) -> str:
    """`q_proj` of `model.layers.2.self_attn.q_proj.weight`."""
    return name.split(".")[-2]


def _layer(name: str) -> int:
    return int(name.split(".")[2])
