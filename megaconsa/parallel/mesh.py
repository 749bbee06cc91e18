"""The axes of parallelism (pipeline, data, context, tensor): this rank's places and groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megaconsa.config import ParallelSection
from megaconsa.parallel.context_parallel import ContextParallel
from megaconsa.parallel.deepspeed.processes import process_grid, start_deepspeed
from megaconsa.parallel.process_groups import ProcessGroups, create
from megaconsa.parallel.tensor_parallel import TensorParallel
from megaconsa.parallel.world import World, join


@dataclass(frozen=True)
class Mesh:
    """This process's place: its rank in the world and on each axis.

    rank = ((pp_rank * dp_size + dp_rank) * cp.size + cp.rank) * tp.size + tp.rank

    The ranks of a tensor group are neighbours because they communicate most. The ranks of a
    pipeline are farthest apart because they communicate least.
    """

    world: World
    grid: Any
    """The same as DeepSpeed's ProcessTopology. Its axes are called pipe, data and model. Its data
    axis holds the context ranks of each data rank: they average their gradients likewise."""
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp: ContextParallel
    tp: TensorParallel
    groups: ProcessGroups
    """The groups of ranks on each axis."""

    @property
    def dp_cp_rank(self) -> int:
        """This rank's place among those that average their gradients."""
        return self.dp_rank * self.cp.size + self.cp.rank

    @property
    def dp_cp_size(self) -> int:
        """Number of ranks that average their gradients: data ranks times context ranks."""
        return self.dp_size * self.cp.size

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    @property
    def reads_data(self) -> bool:
        """Whether batches enter the pipeline here. All ranks of a tensor or context group read the
        same ones."""
        return self.pp_rank == 0

    @property
    def counts_data(self) -> bool:
        """Whether this rank counts its batches. Among the ranks that read the same ones, one
        does."""
        return self.reads_data and self.tp.rank == 0 and self.cp.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.world.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest value of any rank for each element, in place."""
        if self.world.size > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor

    def all_gather(self, *values: float) -> list[list[float]]:
        """Every rank's values, in the order of ranks, on every rank."""
        if self.world.size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        every = [torch.empty_like(own) for _ in range(self.world.size)]
        torch.distributed.all_gather(every, own)
        found: list[list[float]] = torch.stack(every).tolist()
        return found

    def all_reduce_sum(self, value: int) -> int:
        """The sum of all ranks' values, on every rank."""
        return self._all_reduced(value, torch.distributed.ReduceOp.SUM)

    def all_reduce_max(self, value: int) -> int:
        """The largest value of any rank, on every rank."""
        return self._all_reduced(value, torch.distributed.ReduceOp.MAX)

    def _all_reduced(self, value: int, operation: Any) -> int:
        if self.world.size == 1:
            # A value that came back from a GPU would have waited for everything queued there.
            return value
        tensor = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(tensor, operation)
        return int(tensor)


def initialize(parallel: ParallelSection = ParallelSection(), world: World | None = None) -> Mesh:
    """Divides the processes of the launch into ranks of each axis.

    parallel: ranks on each axis. The rest of the world is data parallel. Topology.of has checked
        that the world is divisible.
    world: joined here if it is None.
    """
    world = world or join()
    start_deepspeed(world)
    tensor = parallel.tensor
    context = parallel.context
    pipeline = parallel.pipeline
    dp_size = world.size // (tensor * context * pipeline)
    grid = process_grid(tensor, pipeline, dp_size * context)
    place = grid.get_coord(world.rank)
    dp_rank, cp_rank = divmod(place.data, context)
    groups = ProcessGroups(world)
    data_ranks = grid.get_axis_comm_lists("data")
    tensor_group = groups.divide(grid.get_axis_comm_lists("model"))
    groups.divide(grid.get_axis_comm_lists("pipe"))
    groups.divide(data_ranks)
    # DeepSpeed sums gradient norms over all ranks of a replica.
    groups.divide(grid.get_axis_list("data", replica) for replica in range(dp_size * context))
    context_group = None
    if context > 1:
        parts = []
        for ranks in data_ranks:
            parts += [ranks[first : first + context] for first in range(0, len(ranks), context)]
        # It is a group of its own even if the data axis has the same ranks, because attention
        # exchanges keys while gradients are averaged.
        context_group = create(parts, world.rank)
    return Mesh(
        world,
        grid,
        place.pipe,
        pipeline,
        dp_rank,
        dp_size,
        ContextParallel(cp_rank, context, context_group),
        TensorParallel(place.model, tensor, tensor_group, parallel.sequence and tensor > 1),
        groups,
    )
