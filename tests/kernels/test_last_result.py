"""Results that are kept for the tensor of a micro-batch."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from megaconsa.kernels.last_result import remember_last


class Counted:
    """A function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, factor: int) -> Tensor:
        self.calls += 1
        return x * factor


def test_the_same_tensor_is_computed_once() -> None:
    counted = Counted()
    function = remember_last(counted)
    x = torch.arange(3)
    assert function(x, 2) is function(x, 2)
    assert counted.calls == 1
    assert torch.equal(function(x, 3), x * 3)
    assert torch.equal(function(x.clone(), 3), x * 3)
    assert counted.calls == 3


def test_a_changed_tensor_is_computed_again() -> None:
    function = remember_last(Counted())
    x = torch.arange(3)
    function(x, 2)
    x += 1
    assert torch.equal(function(x, 2), x * 2)


def test_no_result_of_inference_mode_reaches_autograd() -> None:
    function = remember_last(Counted())
    x = torch.ones(3)
    with torch.inference_mode():
        function(x, 2)
    weight = torch.ones(3, requires_grad=True)
    (function(x, 2) * weight).sum().backward()
    assert weight.grad is not None


def test_a_detached_tensor_is_the_same() -> None:
    """Recomputed layers get detached tensors."""
    counted = Counted()
    function = remember_last(counted)
    x = torch.arange(3)
    assert function(x.detach(), 2) is function(x, 2)
    assert torch.equal(function(x[1:], 2), x[1:] * 2)
    assert torch.equal(function(x.view(torch.float64), 2), x.view(torch.float64) * 2)
    assert counted.calls == 3


def test_inference_tensors_outside_their_mode() -> None:
    function = remember_last(Counted())
    with torch.inference_mode():
        x = torch.ones(3)
    assert torch.equal(function(x, 2), x * 2)


def test_memory_that_is_used_again_is_another_tensor() -> None:
    function = remember_last(Counted())
    for value in range(50):
        x = torch.full((1000,), value)
        assert torch.equal(function(x, 2), x * 2)
        del x


def test_the_tensor_itself_is_not_kept() -> None:
    function = remember_last(Counted())
    x = torch.ones(3)
    gone = weakref.ref(x)
    function(x, 2)
    del x
    gc.collect()
    assert gone() is None
    assert torch.equal(function(torch.zeros(3), 2), torch.zeros(3))
