"""Whole tensors by canonical name, gathered from ranks and divided among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.sharding import Sharding
from megaconsa.tensor_files import Rows, Sliceable, aligned_rows

SMALLEST_DIVIDED = 1 << 24
"""Elements (64 MiB) of the smallest tensor that several ranks may write."""


@dataclass(frozen=True)
class DistributedWeights:
    """The model's weights over all ranks, and Adam's moments, which are divided alike."""

    parameters: Mapping[str, nn.Parameter]
    """This rank's parts by canonical name."""
    shapes: Mapping[str, torch.Size]
    """Whole shapes of all weights of the model."""
    owners: Mapping[str, int]
    """The pipeline rank that holds each weight. A tied embedding is on two ranks, and this is the
    first of them."""
    sharding: Sharding
    mesh: Mesh
    prefixes: tuple[str, ...]
    """What a checkpoint's names of weights and of each moment begin with."""

    @cached_property
    def keepers(self) -> dict[str, list[tuple[tuple[int, int], range]]]:
        """The ranks that gather each weight and each moment, each with the rows it gathers.

        A rank is named by its places on the data axis, which includes context ranks, and on the
        tensor axis. Mostly one rank gathers all rows. Several do if the tensor is large and takes
        more than a rank's mean share of its stage, as an embedding does on hundreds of ranks.

        Ranks are chosen to balance bytes. A weight and its moments may go to different ranks.
        """
        ranks = [
            (data, tensor)
            for data in range(self.mesh.dp_cp_size)
            for tensor in range(self.mesh.tp.size)
        ]
        share = dict.fromkeys(range(self.mesh.pp_size), 0.0)
        for name, shape in self.shapes.items():
            share[self.owners[name]] += len(self.prefixes) * shape.numel() / len(ranks)
        load = {(stage, rank): 0 for stage in range(self.mesh.pp_size) for rank in ranks}
        keepers: dict[str, list[tuple[tuple[int, int], range]]] = {}
        for name in sorted(self.shapes, key=lambda name: (-self.shapes[name].numel(), name)):
            stage = self.owners[name]
            shape = self.shapes[name]
            for prefix in self.prefixes:
                keepers[prefix + name] = []
                for rows in _divided(shape, share[stage]):
                    lightest = min(ranks, key=lambda rank: load[stage, rank])
                    load[stage, lightest] += len(rows) * shape[1:].numel()
                    keepers[prefix + name].append((lightest, rows))
        return keepers

    def gather(
        self, read: Callable[[nn.Parameter], Tensor], prefix: str
    ) -> Iterator[tuple[str | Rows, Tensor]]:
        """Yields the name and whole fp32 tensor, on the device, of each weight or moment that this
        rank keeps, or Rows and its rows if several ranks keep it.

        Each is yielded on exactly one rank. Every rank must exhaust the iterator, because it runs
        collectives.

        read: returns this rank's fp32 part of a weight, or of its moment. All data ranks call it
            together, because ZeRO-1 shards the part over them.
        prefix: the one of `prefixes` that belongs to what is read.
        """
        mesh = self.mesh
        for name, owner in self.owners.items():
            if mesh.pp_rank != owner:
                continue
            parts = mesh.tp.all_gather(read(self.parameters[name]))
            key = prefix + name
            keepers = self.keepers[key]
            own = [rows for rank, rows in keepers if rank == (mesh.dp_cp_rank, mesh.tp.rank)]
            if not own:
                continue
            whole = self.sharding.join(name, parts)
            if len(keepers) == 1:
                yield key, whole
                continue
            for rows in own:
                yield Rows(key, tuple(whole.shape), rows.start), whole[rows.start : rows.stop]

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raises RuntimeError if a whole tensor's shape is not the weight's."""
        needed = self.shapes[name]
        if tuple(shape) != needed:
            raise RuntimeError(
                f"{name} has shape {tuple(shape)}, but the model needs {tuple(needed)}"
            )

    def fragment(self, name: str, whole: Sliceable, elements: range) -> Tensor:
        """Some elements of this rank's part of a whole tensor, counted in the flattened part.

        Reads only the rows that hold them.
        """
        width = self.parameters[name].shape[1:].numel()
        first = elements.start // width
        last = -(-elements.stop // width)
        rows = self.sharding.split(name, whole, range(first, last))
        begin = elements.start - first * width
        return rows.flatten()[begin : begin + len(elements)]


def _divided(shape: torch.Size, share: float) -> list[range]:
    """The rows of a weight in blocks of about `share` elements each. Small weights stay whole."""
    rows = shape[0]
    if shape.numel() < max(SMALLEST_DIVIDED, share):
        return [range(rows)]
    step = aligned_rows(shape, share / shape[1:].numel())
    return [range(first, min(first + step, rows)) for first in range(0, rows, step)]
