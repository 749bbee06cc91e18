"""The peers of `bench-attention`, which are other libraries' attention.

They are FlashAttention 4, cuDNN and FlashAttention 2 through torch's SDPA, and FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megaconsa.benchmarks.attention.cases import Shape
from megaconsa.benchmarks.attention.contestants import Attention, Contestant, OurBackend, Peer
from megaconsa.benchmarks.attention.documents import document_bounds

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's mask: (row, head, query, key) -> whether the key is visible."""


def contestants(device: torch.device) -> list[Contestant]:
    """Returns the contestants for a device.

    A GPU gets our backends and the peers, which are fused kernels. A CPU has none of these kernels
    and gets the reference instead.

    The backend flash gets its heads sorted, as the peers do. It calls its library once for each
    stretch of neighbouring heads with the same window.
    """
    if device.type != "cuda":
        return [OurBackend("sdpa"), OurBackend("reference")]
    return [
        OurBackend("triton"),
        OurBackend("flash", sorted_heads=True),
        OurBackend("sdpa"),
        *PEERS,
    ]


def _flash_attention_4(
    shape: Shape, windows: tuple[int, ...], documents: Tensor | None
) -> Attention:
    library = import_module("flash_attn.cute")
    window = windows[0]
    # The library counts keys to the left of the query. Our windows include the query's own key.
    limits = (None, None) if window >= shape.length else (window - 1, 0)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = library.flash_attn_func(
            q, k, v, softmax_scale=shape.scale, causal=True, window_size=limits
        )[0]
        return out

    if documents is None:
        return attention
    bounds = document_bounds(documents)
    longest = int(bounds.diff().max())

    def packed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = library.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=shape.scale,
            causal=True,
            window_size=limits,
        )[0]
        return out

    return packed_attention


def _sdpa(
    backend: SDPBackend,
) -> Callable[[Shape, tuple[int, ...], Tensor | None], Attention]:
    def build(shape: Shape, windows: tuple[int, ...], documents: Tensor | None) -> Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=shape.scale, enable_gqa=True
                )

        return attention

    return build


def _flex_attention(shape: Shape, windows: tuple[int, ...], documents: Tensor | None) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Without a reset, torch counts each case and length as one more recompilation of the same
    # function, and it allows few.
    torch.compiler.reset()
    # A dimension of the mask in which all masks are equal is left out.
    rows = None if documents is None else shape.batch
    heads = None if len(set(windows)) == 1 else shape.heads
    # Without compilation it would store a boolean for every pair of every head.
    mask = create_block_mask(
        flex_mask(shape, windows, documents),
        rows,
        heads,
        shape.length,
        shape.length,
        shape.device,
        _compile=True,
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask, scale=shape.scale, enable_gqa=True)
        return out

    return attention


def flex_mask(shape: Shape, windows: tuple[int, ...], documents: Tensor | None) -> MaskMod:
    """Returns the mask of visible keys for FlexAttention.

    windows: one per KV head. documents: int32 (B, S), those of `Inputs`.
    """
    window = windows[0]
    per_head = torch.tensor(windows, device=shape.device).repeat_interleave(shape.group)

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def windowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    def mixed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < per_head[head])

    if len(set(windows)) > 1:
        mask_mod = mixed
    elif window >= shape.length:
        mask_mod = causal
    else:
        mask_mod = windowed
    if documents is None:
        return mask_mod

    def in_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = documents[row, query] == documents[row, key]
        return same & mask_mod(row, head, query, key)

    return in_document


FLASH_ATTENTION_4 = "FlashAttention 4"
FLEX_ATTENTION = "FlexAttention"
PEERS = [
    Peer(
        FLASH_ATTENTION_4,
        _flash_attention_4,
        heads_first=False,
        windowed=True,
        launch_per_window=True,
        packed=True,
        joins_sequences=True,
    ),
    Peer(
        "cuDNN (SDPA)",
        _sdpa(SDPBackend.CUDNN_ATTENTION),
        heads_first=True,
        windowed=False,
        launch_per_window=False,
    ),
    Peer(
        "FlashAttention 2 (SDPA)",
        _sdpa(SDPBackend.FLASH_ATTENTION),
        heads_first=True,
        windowed=False,
        launch_per_window=False,
    ),
    Peer(
        FLEX_ATTENTION,
        _flex_attention,
        heads_first=True,
        windowed=True,
        launch_per_window=False,
        packed=True,
    ),
]
