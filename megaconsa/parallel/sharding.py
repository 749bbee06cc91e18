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
from megaconsa.parallel.topology import vocabulary_rows
from megaconsa.tensor_files import Sliceable

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

    def split(self, name: str, whole: Sliceable, rows: range | None = None) -> Tensor:
        """This rank's part of a canonical weight, or of its moment.

        Nothing else of `whole` is read, and its rows are read in ascending order.

        rows: the rows of the part to return. None means all.
        """
        own_rows = self._own(name, 0, whole.shape[0])
        if rows is not None:
            own_rows = _within(own_rows, rows)
        own_columns: list[range] = []
        if len(whole.shape) > 1:
            own_columns = self._own(name, 1, whole.shape[1])
        found = {}
        for block in sorted(own_rows, key=lambda block: block.start):
            held = slice(min(block.start, whole.shape[0]), min(block.stop, whole.shape[0]))
            if not own_columns:
                found[block] = whole[held,]
                continue
            parts = [whole[held, slice(each.start, each.stop)] for each in own_columns]
            found[block] = torch.cat(parts, 1)
        part = torch.cat([found[block] for block in own_rows])
        padding = sum(len(block) for block in own_rows) - len(part)
        if padding:
            part = torch.cat((part, part.new_zeros(padding, *part.shape[1:])))
        return part

    def _own(self, name: str, dimension: int, size: int) -> list[range]:
        """The indices of one dimension of the whole weight that this rank holds.

        They are in the order of this rank's part. Indices from `size` on are padding.
        """
        kind = _kind(name)
        if DIVIDED.get(kind) != dimension:
            return [range(size)]
        if kind in BY_HEAD:
            width = size // self.model_config.num_key_value_heads
            heads = self.own_heads(_layer(name))
            return _joined([range(head * width, (head + 1) * width) for head in heads])
        count = vocabulary_rows(size, self.size)
        return [range(self.rank * count, (self.rank + 1) * count)]

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


def _within(blocks: list[range], rows: range) -> list[range]:
    """The blocks without what lies outside `rows`, which count along all blocks."""
    found = []
    begin = 0
    for block in blocks:
        own = block[max(rows.start - begin, 0) : max(rows.stop - begin, 0)]
        if own:
            found.append(own)
        begin += len(block)
    return found


def _joined(blocks: list[range]) -> list[range]:
    """The blocks, with those that follow each other as one, which is read at a time."""
    joined = blocks[:1]
    for block in blocks[1:]:
        if block.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, block.stop)
        else:
            joined.append(block)
    return joined


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
