"""Whole tensors by canonical name, out of and into ranks that each hold a part of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.sharding import Sharding


@dataclass(frozen=True)
class DistributedWeights:
    """The model's weights, and what belongs to each (Adam's moments), over all ranks."""

    parameters: Mapping[str, nn.Parameter]
    """This rank's parts by canonical name."""
    shapes: Mapping[str, torch.Size]
    """Whole shapes of all weights of the model."""
    owners: Mapping[str, int]
    """The pipeline rank that holds a weight; of a tied embedding on two of them, the first."""
    sharding: Sharding
    mesh: Mesh

    @cached_property
    def keepers(self) -> dict[str, tuple[int, int]]:
        """Of each weight the (data, tensor) rank that gets it whole, among those of its owner: all of them about as many bytes."""
        ranks = [
            (data, tensor)
            for data in range(self.mesh.data_ranks)
            for tensor in range(self.mesh.tensor.size)
        ]
        load = {(stage, rank): 0 for stage in range(self.mesh.pipeline_ranks) for rank in ranks}
        keepers = {}
        for name in sorted(self.shapes, key=lambda name: (-self.shapes[name].numel(), name)):
            lightest = min(ranks, key=lambda rank: load[self.owners[name], rank])
            load[self.owners[name], lightest] += self.shapes[name].numel()
            keepers[name] = lightest
        return keepers

    def gather(self, read: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name and whole fp32 tensor, on the device, of the weights that this rank keeps; over all ranks each weight once.

        Every rank must run through it. read: this rank's fp32 part of a weight or of a moment of it; called on all data ranks
        together, over which ZeRO-1 shards it.
        """
        mesh = self.mesh
        for name, owner in self.owners.items():
            if mesh.pipeline_rank == owner:
                parts = mesh.tensor.parts(read(self.parameters[name]))
                if self.keepers[name] == (mesh.data_rank, mesh.tensor.rank):
                    yield name, self.sharding.join(name, parts)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's fp32 part of a whole tensor; RuntimeError where its shape is not the weight's."""
        if whole.shape != self.shapes[name]:
            raise RuntimeError(
                f"{name} has shape {tuple(whole.shape)}, but the model needs {tuple(self.shapes[name])}"
            )
        return self.sharding.split(name, whole).to(self.mesh.device, torch.float32)
