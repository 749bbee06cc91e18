"""Decoding on a GPU.

The reference is fp64 attention of the newest token to a list of the keys that it sees.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels import KVCache, decode_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
MIXED = (FULL_WINDOW, 1024, FULL_WINDOW, 1, 64, FULL_WINDOW, 1000, 1024)


def draw(
    batch: int, length: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Draws q of the newest token, and k and v of all tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(batch, 1, kv_heads * group, dim), *[(batch, length, kv_heads, dim)] * 2]
    return tuple(
        torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes
    )


def truth(
    q: Tensor, k: Tensor, v: Tensor, windows: tuple[int, ...], start: Tensor | None = None
) -> Tensor:
    batch, length, kv_heads, dim = k.shape
    queries = q.double().view(batch, kv_heads, -1, dim)
    out = torch.empty_like(queries)
    for row in range(batch):
        for head, window in enumerate(windows):
            seen = slice(max(length - window, 0 if start is None else int(start[row])), length)
            weights = (queries[row, head] @ k[row, seen, head].double().T * dim**-0.5).softmax(
                dim=-1
            )
            out[row, head] = weights @ v[row, seen, head].double()
    return out.view(q.shape)


def poisoned(
    k: Tensor, windows: tuple[int, ...], capacity: int, start: Tensor | None = None
) -> KVCache:
    cache = KVCache(
        k.shape[0], capacity, windows, k.shape[-1], dtype=k.dtype, device="cuda", start=start
    )
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def check(out: Tensor, expected: Tensor) -> None:
    """Checks each sequence separately, so that one wrong sequence does not hide among many."""
    error = (out.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert float(error.max()) <= TOLERANCE[out.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("batch", "length"),
    [(1, 1), (1, 63), (3, 65), (1, 1025), (16, 1000), (4, 8191), (1, 8192), (300, 33)],
)
def test_lengths_and_batches(dtype: torch.dtype, batch: int, length: int) -> None:
    """The head shapes are those of the paper.

    The cache has room for more tokens. 300 sequences are more than the programs that run at a time.
    """
    q, k, v = draw(batch, length, 8, 2, 128, dtype)
    cache = poisoned(k, MIXED, length + 100)
    cache.append(k[:, :-1], v[:, :-1])
    cache.append(k[:, -1:], v[:, -1:])
    check(decode_attention(q, cache, backend="triton"), truth(q, k, v, MIXED))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("dim", "group", "windows"),
    [
        (16, 1, (7, FULL_WINDOW)),
        (32, 32, (100, FULL_WINDOW)),
        (64, 3, (128, FULL_WINDOW, 5)),
        (80, 8, (FULL_WINDOW,)),
        (96, 5, (300, FULL_WINDOW)),
        (256, 2, (1000, FULL_WINDOW, 64)),
    ],
    ids=str,
)
def test_head_dims_and_groups(
    dtype: torch.dtype, dim: int, group: int, windows: tuple[int, ...]
) -> None:
    """The padding on the left is NaN.

    A single head is cut into as many pieces as the GPU runs programs.
    """
    q, k, v = draw(2, 5000, len(windows), group, dim, dtype)
    start = torch.tensor([0, 4900], dtype=torch.int32, device="cuda")
    for x in (k, v):
        x[1, :4900] = math.nan
    cache = poisoned(k, windows, 5000, start)
    cache.append(k, v)
    check(decode_attention(q, cache), truth(q, k, v, windows, start))


def test_equal_inputs_give_equal_bits() -> None:
    q, k, v = draw(4, 8192, 8, 2, 128, torch.bfloat16)
    cache = poisoned(k, MIXED, 8192)
    cache.append(k, v)
    first, *others = (decode_attention(q, cache) for _ in range(20))
    assert all(torch.equal(first, other) for other in others)


def test_a_captured_graph_follows_the_length() -> None:
    """One graph holds append and attention.

    It is replayed over three windows, and over many more tiles than it was captured with.
    """
    windows = (64, FULL_WINDOW, 7, FULL_WINDOW)
    q, k, v = draw(2, 700, 4, 2, 64, torch.float32)
    cache = poisoned(k, windows, 700)
    token_k, token_v = (torch.empty_like(x[:, :1]) for x in (k, v))

    def step() -> Tensor:
        cache.append(token_k, token_v)
        return decode_attention(q, cache)

    cache.append(k[:, :2], v[:, :2])
    token_k.copy_(k[:, 2:3])
    token_v.copy_(v[:, 2:3])
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    assert cache.refresh_length() == 3
    for position in range(3, 700):
        token_k.copy_(k[:, position : position + 1])
        token_v.copy_(v[:, position : position + 1])
        graph.replay()
        if position % 23 == 0 or position == 699:
            check(out, truth(q, k[:, : position + 1], v[:, : position + 1], windows))
    assert cache.refresh_length() == 700
    with pytest.raises(ValueError, match="1 more tokens do not fit"):
        cache.append(token_k, token_v)


def test_triton_equals_the_plain_version_on_the_gpu() -> None:
    q, k, v = draw(3, 900, 8, 2, 128, torch.float32)
    cache = poisoned(k, MIXED, 1000, torch.tensor([0, 500, 899], dtype=torch.int32, device="cuda"))
    cache.append(k, v)
    check(
        decode_attention(q, cache, backend="triton"),
        decode_attention(q, cache, backend="reference").double(),
    )


def test_a_cache_of_more_than_two_to_the_31_elements() -> None:
    batch = 20
    length = 131_072
    windows = (FULL_WINDOW,) * 7 + (1024,)
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    q, k, v = draw(batch, length, 8, 2, 128, torch.bfloat16)
    cache = KVCache(batch, length, windows, 128, dtype=torch.bfloat16, device="cuda")
    assert cache.keys.numel() > 2**31
    cache.append(k, v)
    out = decode_attention(q, cache)
    for rows in (slice(0, 1), slice(batch - 1, batch)):
        check(out[rows], truth(q[rows], k[rows], v[rows], windows))
