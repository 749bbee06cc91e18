"""Process groups of the ranks on each axis. Each rank creates only its own, and none twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import distributed as dist
from torch.distributed import GroupMember

from megaconsa.parallel.world import World


class ProcessGroups:
    """The groups that this rank has created, by their ranks.

    torch.distributed expects every rank to call new_group for every group. On n ranks, that is n
    calls for an axis of one rank. Here each rank makes one call for an axis, with the ranks of its
    own group. All ranks make it together. So NCCL splits its communicator once for an axis, into
    all groups at a time.

    The group of all ranks is never used for an axis. Gradients and weights are exchanged over data
    ranks in the background, and agreements of all ranks would wait for this traffic.
    """

    def __init__(self, world: World) -> None:
        self._rank = world.rank
        self._everyone = tuple(range(world.size))
        self._own: dict[tuple[int, ...], Any] = {}
        self._known: set[tuple[int, ...]] = set()

    def divide(self, lists: Iterable[Sequence[int]]) -> Any:
        """Returns this rank's group of a division of all ranks.

        A division whose groups all exist is not created again. All ranks must call this with the
        same lists.

        lists: the ranks of each group. Every rank is in one of them.
        """
        divided = [tuple(ranks) for ranks in lists]
        own = _of(divided, self._rank)
        if not self._known.issuperset(divided):
            # All ranks must create their groups, also those that have theirs already.
            group = create(divided, self._rank)
            self._own.setdefault(own, group)
            self._known.update(divided)
        return self._own[own]

    def find(self, ranks: Iterable[int]) -> Any:
        """Returns what new_group would return for these ranks, or None if `divide` never got them.

        All ranks always have a group, that of torch.distributed.

        Like new_group, it returns GroupMember.NON_GROUP_MEMBER if this rank is not among them.
        """
        asked = tuple(ranks)
        if asked not in self._known:
            return dist.group.WORLD if asked == self._everyone else None
        return self._own[asked] if self._rank in asked else GroupMember.NON_GROUP_MEMBER


def create(lists: Sequence[Sequence[int]], rank: int) -> Any:
    """Creates the groups of a division of all ranks, and returns that of `rank`.

    All ranks must call this together with the same lists. Every rank must be in one of them: NCCL
    needs all ranks when it splits its communicator, and torch names a group by the number of
    groups that a rank has created before.
    """
    own = _of(lists, rank)
    # With this option, a rank does not have to call new_group for the groups that it is not in.
    return dist.new_group(list(own), use_local_synchronization=True)


def _of(lists: Sequence[Sequence[int]], rank: int) -> tuple[int, ...]:
    """The list with this rank."""
    return next(tuple(ranks) for ranks in lists if rank in ranks)
