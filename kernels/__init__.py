"""Hybrid attention: full, sliding-window and gated KV heads behind one entry point, `hybrid_attention`.

Imported as `megaconsa.kernels`, never as top-level `kernels`: Hugging Face publishes a package of that name. Imports torch and
triton only, FlashAttention where it is installed. `reference` is the slow truth; every other backend is tested against it.
"""

from megaconsa.kernels.attention import hybrid_attention
from megaconsa.kernels.backends import Backend, Problem, choose_backend
from megaconsa.kernels.decode import decode_attention
from megaconsa.kernels.kv_cache import KVCache

__all__ = ["Backend", "KVCache", "Problem", "choose_backend", "decode_attention", "hybrid_attention"]
