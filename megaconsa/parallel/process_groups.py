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
    """

    def __init__(self, world: World) -> None:
        """It knows the group of all ranks."""
        everyone = tuple(range(world.size))
        self._rank = world.rank
        self._own: dict[tuple[int, ...], Any] = {everyone: dist.group.WORLD}
        self._known = {everyone}

    def divide(self, lists: Iterable[Sequence[int]]) -> Any:
        """Returns this rank's group among groups that do not overlap, or None if it is in none.

        Groups that exist already are not created again. Then all of `lists` must exist. All ranks
        must call this with the same lists.

        lists: the ranks of each group.
        """
        divided = [tuple(ranks) for ranks in lists]
        own = _of(divided, self._rank)
        if divided[0] not in self._known:
            self._own[own] = create(divided, self._rank)
            self._known.update(divided)
        return self._own.get(own)

    def find(self, ranks: Iterable[int]) -> Any:
        """Returns what new_group would return for these ranks, or None if `divide` never got them.

        Like new_group, it returns GroupMember.NON_GROUP_MEMBER if this rank is not among them.
        """
        asked = tuple(ranks)
        if asked not in self._known:
            return None
        return self._own[asked] if self._rank in asked else GroupMember.NON_GROUP_MEMBER


def create(lists: Sequence[Sequence[int]], rank: int) -> Any:
    """Creates groups that do not overlap, and returns that of `rank`, or None if it is in none.

    All ranks must call this together with the same lists.
    """
    own = _of(lists, rank)
    if not own:
        # NCCL needs every rank when it splits its communicator.
        dist.new_group(list(lists[0]))
        return None
    # With this option, a rank does not have to call new_group for the groups that it is not in.
    return dist.new_group(list(own), use_local_synchronization=True)


def _of(lists: Sequence[Sequence[int]], rank: int) -> tuple[int, ...]:
    """The list with this rank, or an empty one."""
    return next((tuple(ranks) for ranks in lists if rank in ranks), ())
