"""Where the gradients of weights go.

Training in bf16 accumulates gradients in fp32. The engine gives each weight a buffer for that,
`main_grad`, of the shape of the weight. The products below add to it, so that a gradient is never
rounded to bf16 or copied. Without such a buffer they return the gradients to autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAIN_GRAD = "main_grad"
"""Name of a weight's attribute."""
LISTENER = "main_grad_listener"
"""Name of the attribute of a weight that holds a function, if something waits for its gradients."""


def main_grad(weight: Tensor) -> Tensor | None:
    """The fp32 buffer of a weight, or None if autograd keeps its gradient."""
    found: Tensor | None = getattr(weight, MAIN_GRAD, None)
    return found


def note_added(weight: Tensor) -> None:
    """Tells who waits for it that a backward pass has added to the `main_grad` of a weight."""
    listener: Callable[[Tensor], None] | None = getattr(weight, LISTENER, None)
    if listener is not None:
        listener(weight)


class Stack:
    """The weights of linear layers that get the same input, as one matrix."""

    def __init__(self, owner: nn.Module, *names: str) -> None:
        """owner: has the layers as attributes of these names."""
        self._owner = owner
        self._names = names
        self._places: tuple[int, ...] = ()
        self._views: tuple[Tensor | None, Tensor | None] = (None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        return Stack(copy.deepcopy(self._owner, memo), *self._names)

    @property
    def weights(self) -> list[Tensor]:
        return [getattr(self._owner, name).weight for name in self._names]

    def matrix(self) -> Tensor:
        """The weights below each other, (all rows, C), without a gradient.

        They are copied only if they are not neighbours in memory. DeepSpeed keeps all weights of a
        rank in one flat tensor, in the order of the modules.
        """
        weights = self.weights
        view = self._look(weights)[0]
        if view is None:
            return torch.cat([weight.detach() for weight in weights])
        return view

    def gradients(self, gradient: Tensor, x: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Computes the gradients of the weights.

        gradient: of the layers' results, which lie beside each other, (..., all rows).
        x: the layers' input, (..., C).
        wanted: whether each weight needs a gradient.

        Returns the values to return to autograd: None where there is no gradient, or where it was
        added to `main_grad`.
        """
        weights = self.weights
        if not any(wanted):
            return [None] * len(weights)
        columns = gradient.flatten(0, -2).T
        x = x.flatten(0, -2)
        total = self._look(weights)[1]
        if total is not None and all(wanted):
            add_product(total, columns, x)
            for weight in weights:
                note_added(weight)
            return [None] * len(weights)
        found: list[Tensor | None] = []
        parts = columns.split([len(weight) for weight in weights])
        for weight, part, is_wanted in zip(weights, parts, wanted, strict=True):
            found.append(_product_gradient(weight, part, x) if is_wanted else None)
        return found

    def _look(self, weights: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The weights and their buffers, each as one view of memory, or None."""
        buffers = [main_grad(weight) for weight in weights]
        places = tuple(0 if x is None else x.data_ptr() for x in (*weights, *buffers))
        if places != self._places:
            self._places = places
            found = [buffer for buffer in buffers if buffer is not None]
            whole = _neighbours(found) if len(found) == len(weights) else None
            self._views = _neighbours(weights), whole
        return self._views


def _product_gradient(weight: Tensor, columns: Tensor, x: Tensor) -> Tensor | None:
    """The product as the gradient of a weight, or None if it was added to `main_grad`."""
    buffer = main_grad(weight)
    if buffer is None:
        return columns @ x
    add_product(buffer, columns, x)
    note_added(weight)
    return None


def _neighbours(matrices: Sequence[Tensor]) -> Tensor | None:
    """Matrices (rows, C) as one view, or None if they are not neighbours in one storage."""
    first = matrices[0]
    end = first.data_ptr()
    rows = 0
    for matrix in matrices:
        if matrix.data_ptr() != end or not matrix.is_contiguous():
            return None
        end += matrix.numel() * matrix.element_size()
        rows += len(matrix)
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes total += a @ b in fp32, even where a and b are narrower."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a.float() @ b.float()


def add_gradient(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """Adds the gradient of a weight to its `main_grad`.

    Returns the value to return to autograd: None, or the gradient if the weight has no buffer.
    """
    buffer = main_grad(weight)
    if buffer is None:
        return gradient.to(weight.dtype)
    buffer += gradient
    note_added(weight)
    return None
