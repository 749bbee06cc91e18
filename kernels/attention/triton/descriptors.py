"""Tensor descriptors: how Hopper's tensor copy engine addresses tensors.

On other GPUs Triton turns the descriptors into pointers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor


def addressable(x: Tensor) -> Tensor:
    """x (B, S, heads, D) itself if a descriptor can address it, else a contiguous copy.

    A descriptor needs contiguous rows, and a start and strides that are multiples of 16 bytes.
    """
    size = x.element_size()
    outer = zip(x.stride()[:3], x.shape[:3], strict=True)
    strides = [stride for stride, extent in outer if extent > 1]
    strides_fit = all(stride > 0 and stride * size % 16 == 0 for stride in strides)
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and strides_fit:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def head_blocks(x: Tensor, tokens: int, block_d: int) -> TensorDescriptor:
    """Addressable x (B, S, heads, D) as (B, heads, S, D), in blocks of `tokens` rows of one head.

    Loads beyond the edges give zeros.
    """
    batch, length, heads, dim = x.shape
    # The stride of a dimension of extent 1 may be anything, so it is replaced by one that fits.
    outer = zip(x.stride()[:3], x.shape[:3], strict=True)
    per_batch, per_token, per_head = (stride if extent > 1 else dim for stride, extent in outer)
    shape = [batch, heads, length, dim]
    strides = [per_batch, per_head, per_token, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, tokens, block_d])


def hopper_head_blocks(x: Tensor, tokens: int, block_d: int) -> GluonDescriptor:
    """`head_blocks` for Gluon, which must know the layout of a block in shared memory."""
    plain = head_blocks(x, tokens, block_d)
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(plain.block_shape, dtype)
    return GluonDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


def hopper_matrix_blocks(x: Tensor, rows: int, columns: int) -> GluonDescriptor:
    """A contiguous matrix of 4-byte numbers, in blocks with the same layout in shared memory."""
    unswizzled = gl.NVMMASharedLayout(0, 32, 2)
    return GluonDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], unswizzled)
