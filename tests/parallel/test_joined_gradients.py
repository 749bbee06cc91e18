"""Gradients of many weights as few tensors, for the norm and for clipping."""

from __future__ import annotations

import torch

from megaconsa.parallel.deepspeed.flat_views import joined


def test_neighbours_become_one_view() -> None:
    flat = torch.arange(10.0)
    parts = list(flat.split([3, 2, 4, 1]))
    (whole,) = joined(parts)
    assert torch.equal(whole, flat)
    whole.mul_(2)
    assert torch.equal(parts[1], torch.tensor([6.0, 8.0]))


def test_what_is_left_out_stays_out() -> None:
    flat = torch.arange(10.0)
    first, _, third, fourth = flat.split([3, 2, 4, 1])
    found = joined([first, third, fourth])
    assert [view.tolist() for view in found] == [[0.0, 1.0, 2.0], [5.0, 6.0, 7.0, 8.0, 9.0]]


def test_groups_of_parameters_stay_apart() -> None:
    matrices, norms = torch.arange(4.0), torch.arange(3.0)
    found = joined([*matrices.split(2), *norms.split([1, 2])])
    assert [len(view) for view in found] == [4, 3]
    assert joined([]) == []
