"""Tensors that autograd does not save, but computes again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Place(NamedTuple):
    """What is saved instead of a tensor, or of a view of it."""

    which: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class RecomputedTensors:
    """Functions called inside `hooks()` save the places of some tensors, and not their elements.

    The backward pass computes all of the tensors at once, when it needs the first of them.
    """

    def __init__(
        self, tensors: Sequence[Tensor], compute: Callable[[], tuple[Tensor, ...]]
    ) -> None:
        """tensors: contiguous. They must live as long as the hooks are in use.

        compute: returns the same tensors again. It must not hold them.
        """
        # Autograd packs other Python objects than a function saves, and views. All of them share
        # the storage.
        self._storages = [_address(tensor) for tensor in tensors]
        self._compute = compute
        self._tensors: tuple[Tensor, ...] = ()
        self._saved = 0
        self._handed_out = 0

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Place:
        address = _address(tensor)
        if address not in self._storages:
            # A function's own result would hold the graph through its gradient function, and the
            # graph holds what is packed.
            return tensor.detach()
        self._saved += 1
        which = self._storages.index(address)
        return Place(which, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Tensor | Place) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not self._tensors:
            self._tensors = self._compute()
        tensor = self._tensors[packed.which].as_strided(packed.shape, packed.strides, packed.offset)
        self._handed_out += 1
        # All functions have what they saved. A graph that is retained would keep the tensors.
        if self._handed_out == self._saved:
            self._tensors = ()
            self._handed_out = 0
        return tensor


def _address(tensor: Tensor) -> int:
    """Where a tensor's storage begins."""
    return tensor.untyped_storage().data_ptr()
