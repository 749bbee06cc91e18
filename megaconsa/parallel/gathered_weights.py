"""Whole tensors by canonical name, gathered from ranks and divided among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.sharding import Sharding
from megaconsa.tensor_files import Sliceable


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
    def keepers(self) -> dict[str, tuple[int, int]]:
        """The rank that gathers each weight and each moment: its places on the data axis, which
        includes context ranks, and on the tensor axis.

        Ranks are chosen to balance bytes. A weight and its moments may go to different ranks,
        because an embedding is larger than a rank's mean share of a large model.
        """
        ranks = [
            (data, tensor)
            for data in range(self.mesh.dp_cp_size)
            for tensor in range(self.mesh.tp.size)
        ]
        load = {(stage, rank): 0 for stage in range(self.mesh.pp_size) for rank in ranks}
        keepers = {}
        for name in sorted(self.shapes, key=lambda name: (-self.shapes[name].numel(), name)):
            for prefix in self.prefixes:
                lightest = min(ranks, key=lambda rank: load[self.owners[name], rank])
                load[self.owners[name], lightest] += self.shapes[name].numel()
                keepers[prefix + name] = lightest
        return keepers

    def gather(
        self, read: Callable[[nn.Parameter], Tensor], prefix: str
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and whole fp32 tensor, on the device, of each weight or moment that this
        rank keeps.

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
            if self.keepers[prefix + name] == (mesh.dp_cp_rank, mesh.tp.rank):
                yield prefix + name, self.sharding.join(name, parts)

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
