"""Where the gradients of weights go.

Training in bf16 accumulates gradients in fp32. The engine gives each weight a buffer for that,
`main_grad`, of the shape of the weight. The products below add to it, so that a gradient is never
rounded to bf16 or copied. Without such a buffer they return the gradients to autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAIN_GRAD = "main_grad"
"""Name of a weight's attribute."""


def main_grad(weight: Tensor) -> Tensor | None:
    """The fp32 buffer of a weight, or None if autograd keeps its gradient."""
    found: Tensor | None = getattr(weight, MAIN_GRAD, None)
    return found


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices (rows, C) below each other, copied only if they are not neighbours in memory.

    DeepSpeed keeps the weights of a rank in one flat tensor, in the order of the modules.
    """
    view = _neighbours(matrices)
    if view is None:
        return torch.cat([matrix.detach() for matrix in matrices])
    return view


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


def matrix_gradients(weights: Sequence[Tensor], gradient: Tensor, x: Tensor) -> list[Tensor | None]:
    """The gradients of weights that were multiplied with the same x.

    weights: of shape (rows, C). Their results lie beside each other.
    gradient: of the results, (..., all rows).
    x: (..., C).

    Returns what autograd takes for each weight: None where the gradient went to `main_grad`.
    """
    columns = gradient.flatten(0, -2).T
    x = x.flatten(0, -2)
    sizes = [len(weight) for weight in weights]
    buffers = [buffer for weight in weights if (buffer := main_grad(weight)) is not None]
    if len(buffers) < len(weights):
        return list((columns @ x).split(sizes))
    total = _neighbours(buffers)
    if total is not None:
        add_product(total, columns, x)
    else:
        for buffer, part in zip(buffers, columns.split(sizes), strict=True):
            add_product(buffer, part, x)
    return [None] * len(weights)


def own_gradient(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """Takes the gradient of a weight as it is.

    Returns what autograd takes for the weight: None where the gradient went to `main_grad`.
    """
    buffer = main_grad(weight)
    if buffer is None:
        return gradient.to(weight.dtype)
    buffer += gradient
    return None
