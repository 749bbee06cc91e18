"""Whole tensors by canonical name, out of and into ranks that each hold a part of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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

    def gather(self, read: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name and whole fp32 tensor, on the CPU, of every weight: on the main rank. The others get nothing, but must run through it.

        read: this rank's fp32 part of a weight or of a moment of it; called on all data ranks together, over which ZeRO-1 shards it.
        """
        mesh = self.mesh
        for name, owner in self.owners.items():
            whole = None
            if mesh.pipeline_rank == owner:
                whole = self.sharding.join(name, mesh.tensor.parts(read(self.parameters[name])))
            if owner != 0 and mesh.data_rank == mesh.tensor.rank == 0:
                if whole is not None:
                    torch.distributed.send(whole.contiguous(), 0)
                elif mesh.is_main:
                    whole = torch.empty(self.shapes[name], device=mesh.device)
                    torch.distributed.recv(whole, mesh.topology.get_rank(pipe=owner, data=0, model=0))
            if mesh.is_main:
                assert whole is not None
                yield name, whole.cpu()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's fp32 part of a whole tensor; RuntimeError where its shape is not the weight's."""
        if whole.shape != self.shapes[name]:
            raise RuntimeError(f"{name} has shape {tuple(whole.shape)}, but the model needs {tuple(self.shapes[name])}")
        return self.sharding.split(name, whole).to(self.mesh.device, torch.float32)
