"""Hopper instructions that Gluon renamed between Triton 3.6 and 3.9, or does not wrap."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@builtin
def add_tile(descriptor, coordinates, source, _semantic=None):
    """Add a tile in shared memory to global memory.

    The copy engine adds integers and floats atomically.
    """
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)
