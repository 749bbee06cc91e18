"""Whether the ranks of each tensor group, which talk in every layer, share a node."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from megaconsa.errors import InputError

logger = logging.getLogger(__name__)


def check_tensor_groups(tensor: int, hosts: Sequence[str]) -> None:
    """Raises InputError where another order of the ranks would give each group a node of its own;
    warns where the nodes are too small for that.

    tensor: ranks of a group, which are neighbours. hosts: the node of each rank.
    """
    for first in range(0, len(hosts), tensor):
        group = hosts[first : first + tensor]
        if len(set(group)) > 1:
            break
    else:
        return
    nodes = ", ".join(dict.fromkeys(group))
    said = f"ranks {first} to {first + tensor - 1} of a tensor group are on {nodes}"
    if any(ranks % tensor for ranks in Counter(hosts).values()):
        logger.warning(
            "parallel.tensor=%d does not divide the ranks of every node: %s, and wait for the network in every layer",
            tensor,
            said,
        )
        return
    raise InputError(
        f"parallel.tensor={tensor}: {said}; number the ranks node by node (srun --distribution=block, mpirun --map-by slot)"
    )
