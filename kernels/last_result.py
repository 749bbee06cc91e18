"""Results that all layers share, computed once for a micro-batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class _Last(NamedTuple):
    tensor: weakref.ref[Tensor]
    key: tuple[Any, ...]
    result: Any


def kept(function: Callable[..., Result]) -> Callable[..., Result]:
    """Makes a function return its last result again where it gets the same tensor again.

    function: takes a tensor, and then arguments that can be compared.

    The tensor must be the same object, and must not have been changed.
    """
    last: _Last | None = None

    def wrapped(tensor: Tensor, *arguments: Any) -> Result:
        nonlocal last
        # Dynamo cannot trace weak references. Inference tensors do not count their changes.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return function(tensor, *arguments)
        key = (tensor._version, *arguments)
        if last is None or last.tensor() is not tensor or last.key != key:
            last = _Last(weakref.ref(tensor), key, function(tensor, *arguments))
        result: Result = last.result
        return result

    return wrapped
