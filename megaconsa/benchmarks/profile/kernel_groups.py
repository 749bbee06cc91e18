"""Kernels by what they do, which their names tell."""

from __future__ import annotations

import re
from enum import StrEnum
from functools import cache


class Group(StrEnum):
    MATRIX_PRODUCTS = "matrix products"
    ATTENTION = "attention"
    NORMS = "norms"
    ROTARY = "rotary"
    SWIGLU = "swiglu"
    CROSS_ENTROPY = "cross-entropy"
    OPTIMIZER = "optimizer"
    ELEMENTWISE = "elementwise"
    REDUCTIONS = "reductions"
    INDEXING = "indexing"
    COMMUNICATION = "communication"
    COPIES = "copies and fills"
    OTHER = "other"


PATTERNS = (
    (Group.COMMUNICATION, r"^nccl"),
    (Group.OPTIMIZER, r"multi_tensor_apply|[Aa]dam"),
    # Before elementwise kernels: torch copies and fills with those.
    (Group.COPIES, r"^Mem(cpy|set)|copy_kernel|CatArrayBatchedCopy|FillFunctor"),
    # Before matrix products: FlashAttention's kernels have types of CUTLASS in their names.
    (Group.ATTENTION, r"^(hopper_)?(forward|backward|prepare|finish|bound|order)_kernel$"),
    (Group.ATTENTION, r"^(join|divide|add_gated)_kernel$"),
    (Group.ATTENTION, r"[Ff]lash|fmha|sdpa"),
    (Group.NORMS, r"layer_?norm|rms_?norm|GammaBeta|LayerNorm|RMSNorm"),
    (Group.ROTARY, r"^_rotate$|^normed_heads"),
    (Group.SWIGLU, r"^swiglu"),
    (Group.CROSS_ENTROPY, r"cross_entropy|[Ss]oft[Mm]ax|nll_loss"),
    (Group.MATRIX_PRODUCTS, r"gemm|nvjet|cutlass|splitK|gemv|xmma"),
    (Group.INDEXING, r"index_|index[A-Z]|[Ee]mbedding|gather|scatter|[Ss]ort"),
    (Group.ELEMENTWISE, r"elementwise"),
    (Group.REDUCTIONS, r"reduce_kernel|Reduce|Scan"),
)
"""The first pattern that is found in a kernel's name tells its group."""
COMPILED = tuple((group, re.compile(pattern)) for group, pattern in PATTERNS)


@cache
def group_of(name: str) -> Group:
    """The group of a kernel, a copy or a fill."""
    for group, pattern in COMPILED:
        if pattern.search(name):
            return group
    return Group.OTHER
