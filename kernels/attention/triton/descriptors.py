"""Tensors as Hopper's tensor copy engine addresses them; on other GPUs Triton turns the descriptors into pointers."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor


def addressable(x: Tensor) -> Tensor:
    """x (B, S, heads, D), copied unless its rows are contiguous and its strides and its start multiples of 16 bytes."""
    size = x.element_size()
    strides = [
        stride for stride, extent in zip(x.stride()[:3], x.shape[:3], strict=True) if extent > 1
    ]
    if (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * size % 16 == 0 for stride in strides)
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def head_blocks(x: Tensor, tokens: int, block_d: int) -> TensorDescriptor:
    """Addressable x (B, S, heads, D) as (B, heads, S, D), in blocks of `tokens` rows of one head; zeros beyond its edges."""
    batch, length, heads, dim = x.shape
    rows, columns, planes = (
        stride if extent > 1 else dim
        for stride, extent in zip(x.stride()[:3], x.shape[:3], strict=True)
    )
    return TensorDescriptor(
        x, [batch, heads, length, dim], [rows, planes, columns, 1], [1, 1, tokens, block_d]
    )


def hopper_head_blocks(x: Tensor, tokens: int, block_d: int) -> GluonDescriptor:
    """`head_blocks` for Gluon, which wants to know how a block lies in shared memory."""
    plain = head_blocks(x, tokens, block_d)
    layout = gl.NVMMASharedLayout.get_default_for(
        plain.block_shape, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    )
    return GluonDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


def hopper_matrix_blocks(x: Tensor, rows: int, columns: int) -> GluonDescriptor:
    """A contiguous matrix of 4-byte numbers in blocks that lie in shared memory as they do in memory."""
    return GluonDescriptor(
        x, list(x.shape), list(x.stride()), [rows, columns], gl.NVMMASharedLayout(0, 32, 2)
    )
