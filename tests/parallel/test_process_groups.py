"""Process groups of a mesh: each rank creates few, shares them with DeepSpeed, and connects to few.

The ranks are gloo processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from megaconsa.benchmarks.starting import counted_groups, measure
from megaconsa.config import build
from megaconsa.parallel.process_groups import ProcessGroups, create
from megaconsa.parallel.world import join
from tests.support.forked_ranks import run_forked


def total(group: Any, rank: int) -> float:
    """The sum of the ranks' numbers over a group."""
    own = torch.tensor(float(rank))
    dist.all_reduce(own, group=group)
    return own.item()


def check_divisions() -> None:
    """Divides six ranks in several ways."""
    world = join()
    groups = ProcessGroups(world)
    rank = world.rank
    halves = [[0, 2, 4], [1, 3, 5]]
    with counted_groups() as sizes:
        everyone = groups.divide([list(range(6))])
        half = groups.divide(halves)
        assert groups.divide(halves) is half
        alone = groups.divide([each] for each in range(6))
        # As of a pipeline whose first rank holds a tied embedding alone: [0] exists already.
        others = groups.divide([[0], [1, 2, 3, 4, 5]])
        again = create(halves, rank)
    assert sizes == [6, 3, 1, 1 if rank == 0 else 5, 3]
    assert total(others, rank) == (0 if rank == 0 else 15)
    assert everyone is not dist.group.WORLD
    assert total(everyone, rank) == 15
    assert total(half, rank) == [6, 9][rank % 2]
    assert total(again, rank) == [6, 9][rank % 2]
    assert again is not half
    assert total(alone, rank) == rank
    assert groups.find(halves[rank % 2]) is half
    assert groups.find(halves[1 - rank % 2]) is dist.GroupMember.NON_GROUP_MEMBER
    assert groups.find([rank]) is alone
    assert groups.find([0, 1]) is None
    # Rank 0 serves the store. If it ended first, the others could not connect any more.
    world.exchange(None)


def test_each_rank_creates_its_own_group_of_a_division() -> None:
    run_forked(6, check_divisions)


def check_start(values: dict[str, Any], groups: int, alone: int, sockets: int) -> None:
    for figures in measure(build(values)):
        assert figures["calls of new_group"] == groups
        assert figures["calls for one rank"] == alone
        assert figures["sockets"] <= sockets, figures


@pytest.mark.parametrize(
    ("parallel", "groups", "alone"),
    [
        pytest.param({}, 2, 1, id="data"),
        pytest.param(
            {"tensor": 2, "pipeline": 2}, 4, 0, id="tensor-pipeline-data", marks=pytest.mark.slow
        ),
        pytest.param({"context": 2}, 3, 1, id="context", marks=pytest.mark.slow),
        # A tied embedding adds the first and last ranks of each pipeline.
        pytest.param({"pipeline": 4}, 4, 1, id="pipeline", marks=pytest.mark.slow),
    ],
)
def test_a_start_creates_one_group_an_axis(
    make_config: Callable[..., dict[str, Any]],
    tmp_path: Path,
    parallel: dict[str, int],
    groups: int,
    alone: int,
) -> None:
    """DeepSpeed alone would create 26 groups on 8 data ranks."""
    values = make_config(parallel=parallel, training={"micro_batch": 1, "global_batch": 16})
    beside = 2  # for background exchanges and for noticing lost ranks
    run_forked(8, check_start, values, groups + beside, alone, 30)
