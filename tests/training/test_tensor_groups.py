"""The ranks of a tensor group are on one node wherever this is possible."""

from __future__ import annotations

import logging

import pytest

from megaconsa.errors import InputError
from megaconsa.training.tensor_groups import check_tensor_groups


def test_groups_on_one_node_each(caplog: pytest.LogCaptureFixture) -> None:
    check_tensor_groups(2, ["a", "a", "b", "b"])
    check_tensor_groups(2, ["a", "a", "a", "a", "b", "b"])
    check_tensor_groups(1, ["a", "b", "a", "b"])
    assert caplog.text == ""


def test_ranks_dealt_out_in_turn_are_refused() -> None:
    with pytest.raises(InputError) as refused:
        check_tensor_groups(2, ["a", "a", "b", "c", "b", "c"])
    assert str(refused.value) == (
        "parallel.tensor=2: ranks 2 to 3 of a tensor group are on b, c; number the ranks node by "
        "node (srun --distribution=block, mpirun --map-by slot)"
    )


def test_nodes_that_are_too_small_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_tensor_groups(2, ["a", "b"])
    assert "parallel.tensor=2 does not divide the ranks of every node: ranks 0 to 1 " in caplog.text
