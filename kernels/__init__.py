"""Kernels, one folder per operator: a plain reference beside the fast versions compared with it.

Import this package as `megaconsa.kernels`, never as top-level `kernels`: Hugging Face publishes a
package of that name. It imports only torch and triton, and FlashAttention where it is installed.
"""

from megaconsa.kernels.attention.backends import Backend, choose_backend, find_backend
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
    "find_backend",
    "hybrid_attention",
]
