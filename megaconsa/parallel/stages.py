"""Where the pipeline is cut: the cost of each layer, and contiguous stages of nearly equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import forward_flops
from megaconsa.parallel.topology import Topology


def layer_costs(model_config: ModelConfig, allocation: Allocation | None, length: int) -> list[int]:
    """Forward FLOPs of each pipeline layer, for one sequence of `length` tokens in one document.

    The layers are the embedding, the blocks, the final norm, and the output head with its loss.
    Embedding and norm count as 0.

    allocation: None counts every head as full, as while learning.
    """
    *blocks, head = forward_flops(model_config, allocation, length, [length])
    return [0, *blocks, 0, head]


def stages_by_rank(costs: Sequence[int], topology: Topology) -> list[list[tuple[int, int]]]:
    """The stages of each pipeline rank: first layer, and the layer after the last.

    costs: cost of each layer, from `layer_costs`.

    Raises InputError as `cut` does.
    """
    bounds = cut(costs, topology.stages)
    stages = list(pairwise(bounds))
    return [[stages[s] for s in topology.stages_of(rank)] for rank in range(topology.pipeline)]


def cut(costs: Sequence[int], stages: int) -> list[int]:
    """Bounds of contiguous stages: stage s holds the layers bounds[s] to bounds[s + 1] - 1.

    The cut minimises the largest cost of a stage, then the second largest, and so on. Among equal
    cuts earlier stages get fewer layers, because 1F1B keeps more micro-batches in memory there.

    The embedding stays with the first block and the final norm with the head. So every stage holds
    weights of both optimizer groups, matrices and norms.

    costs: cost of each layer, from `layer_costs`.

    Raises InputError if there are more stages than blocks and the head can fill.
    """
    pieces = [costs[0] + costs[1], *costs[2:-2], costs[-2] + costs[-1]]
    if stages > len(pieces):
        raise InputError(
            f"{stages} pipeline stages are more than {len(pieces) - 1} layers and the output head "
            "can fill; lower parallel.pipeline"
        )
    until = list(accumulate(pieces, initial=0))
    # Dynamic programming over stages: for each end, the best cut of the pieces before it, as sorted
    # costs and bounds. The best cut up to a bound stays best whatever follows.
    best: dict[int, tuple[list[int], list[int]]] = {0: ([], [0])}
    for _ in range(stages):
        best = {
            end: min(
                (sorted([*parts, until[end] - until[start]], reverse=True), [*bounds, end])
                for start, (parts, bounds) in best.items()
                if start < end
            )
            for end in range(min(best) + 1, len(pieces) + 1)
        }
    _, bounds = best[len(pieces)]
    # From pieces to layers: the first piece is two layers, and so is the last.
    return [0, *(bound + 1 for bound in bounds[1:-1]), len(costs)]
