"""Check that the ranks of each tensor group share a node.

They communicate in every layer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from megaconsa.errors import InputError

logger = logging.getLogger(__name__)


def check_tensor_groups(tensor: int, hosts: Sequence[str]) -> None:
    """Checks that no tensor group spans several nodes.

    tensor: ranks per group. The ranks of a group are consecutive.
    hosts: the node of each rank.
    Raises InputError if another order of the ranks would place each group on one node. Logs a
    warning if the nodes are too small for that.
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
            "parallel.tensor=%d does not divide the ranks of every node: %s, "
            "and wait for the network in every layer",
            tensor,
            said,
        )
        return
    raise InputError(
        f"parallel.tensor={tensor}: {said}; number the ranks node by node "
        "(srun --distribution=block, mpirun --map-by slot)"
    )
