"""Where the gradients of weights go.

Training in bf16 accumulates gradients in fp32. The engine gives each weight a buffer for that,
`main_grad`, of the shape of the weight. The products below add to it, so that a gradient is never
rounded to bf16 or copied. Without such a buffer they return the gradients to autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAIN_GRAD = "main_grad"
"""Name of a weight's attribute."""


def main_grad(weight: Tensor) -> Tensor | None:
    """The fp32 buffer of a weight, or None if autograd keeps its gradient."""
    found: Tensor | None = getattr(weight, MAIN_GRAD, None)
    return found


class Stack:
    """The weights of linear layers that get the same input, as one matrix."""

    def __init__(self, *layers: nn.Linear) -> None:
        self.layers = layers
        self._places: tuple[int, ...] = ()
        self._views: tuple[Tensor | None, Tensor | None] = (None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        return Stack(*copy.deepcopy(self.layers, memo))

    @property
    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]

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

    def gradients(self, gradient: Tensor, x: Tensor) -> list[Tensor | None]:
        """The gradients of the weights.

        gradient: of the layers' results, which lie beside each other, (..., all rows).
        x: the layers' input, (..., C).

        Returns what autograd takes for each weight: None where the gradient went to `main_grad`.
        """
        weights = self.weights
        columns = gradient.flatten(0, -2).T
        x = x.flatten(0, -2)
        total = self._look(weights)[1]
        if total is not None:
            add_product(total, columns, x)
            return [None] * len(weights)
        sizes = [len(weight) for weight in weights]
        if any(main_grad(weight) is None for weight in weights):
            return list((columns @ x).split(sizes))
        for weight, part in zip(weights, columns.split(sizes), strict=True):
            buffer = main_grad(weight)
            assert buffer is not None
            add_product(buffer, part, x)
        return [None] * len(weights)

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


def own_gradient(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """Takes the gradient of a weight as it is.

    Returns what autograd takes for the weight: None where the gradient went to `main_grad`.
    """
    buffer = main_grad(weight)
    if buffer is None:
        return gradient.to(weight.dtype)
    buffer += gradient
    return None
