"""Where the pipeline is cut: what each of its layers costs, and the contiguous stages whose costs are the most level."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import forward_flops


def layer_costs(model: ModelConfig, allocation: Allocation | None, length: int) -> list[int]:
    """Forward FLOPs of one sequence of `length` tokens, one document, for each layer of the pipeline.

    The layers are the embedding, the blocks, the final norm and the output head with its loss; lookup and norm count as 0.
    allocation: None counts every head as full, as while learning.
    """
    *blocks, head = forward_flops(model, allocation, length, [length])
    return [0, *blocks, 0, head]


def cut(costs: Sequence[int], stages: int) -> list[int]:
    """Bounds of contiguous stages, stages + 1 entries: stage s holds the layers bounds[s] up to, not including, bounds[s + 1].

    costs: of each layer, as from `layer_costs`. The largest cost of a stage is as small as can be; among such cuts the second largest
    is, and so on; among equals earlier stages have fewer layers, because 1F1B keeps most micro-batches there. The embedding
    stays with the first block and the final norm with the head, so that every stage holds weights of both optimizer groups, matrices
    and norms. Raises InputError where there are more stages than pieces to make them of.
    """
    pieces = [costs[0] + costs[1], *costs[2:-2], costs[-2] + costs[-1]]
    if stages > len(pieces):
        raise InputError(
            f"{stages} pipeline stages are more than {len(pieces) - 1} layers and the output head can fill; lower parallel.pipeline"
        )
    until = list(accumulate(pieces, initial=0))
    # The best cut of the first pieces, up to each end, into one stage more each time: costs from the largest, and bounds. What is
    # best up to a bound stays best whatever follows, so that each end needs to remember one cut only.
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
