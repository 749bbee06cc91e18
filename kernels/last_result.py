"""Results that all layers share, computed once for a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Result = TypeVar("Result")


class _Last(NamedTuple):
    storage: StorageWeakRef
    """Of the tensor. Its address cannot be used again while this exists."""
    key: tuple[Any, ...]
    result: Any


def remember_last(function: Callable[..., Result]) -> Callable[..., Result]:
    """Makes a function return its last result where it gets the same elements again.

    function: takes a tensor, and then arguments that can be compared.

    The elements must be in the same memory, as after `detach`, and unchanged. Changes by torch's
    operators are noticed, but not those through `.data`, NumPy or a kernel.
    """
    last: _Last | None = None

    def wrapped(tensor: Tensor, *arguments: Any) -> Result:
        nonlocal last
        if torch.compiler.is_compiling():
            # Dynamo cannot trace what follows.
            return function(tensor, *arguments)
        if torch.is_inference_mode_enabled() or tensor.is_inference():
            # Inference tensors do not count their changes.
            return function(tensor, *arguments)
        storage = StorageWeakRef(tensor.untyped_storage())
        place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage.cdata, tensor._version, *place, *arguments)
        # Another thread may replace it meanwhile.
        found = last
        if found is None or found.key != key:
            found = _Last(storage, key, function(tensor, *arguments))
            last = found
        result: Result = found.result
        return result

    return wrapped
