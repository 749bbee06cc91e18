"""Kernels by operator. In each folder the plain truth lies beside the fast versions that are compared with it.

Imported as `megaconsa.kernels`, never as top-level `kernels`: Hugging Face publishes a package of that name. Imports torch and
triton only, FlashAttention where it is installed.
"""

from megaconsa.kernels.attention.backends import Backend, choose_backend
from megaconsa.kernels.attention.hybrid_attention import hybrid_attention
from megaconsa.kernels.attention.problem import Problem
from megaconsa.kernels.decode.decode_attention import decode_attention
from megaconsa.kernels.decode.kv_cache import KVCache

__all__ = [
    "Backend",
    "KVCache",
    "Problem",
    "choose_backend",
    "decode_attention",
    "hybrid_attention",
]
