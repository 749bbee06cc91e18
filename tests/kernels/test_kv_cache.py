"""The KV cache: what it holds after every append, its size in bytes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels import KVCache

CAPACITY = 20
WINDOWS = (5, FULL_WINDOW, 1, 5, CAPACITY, 8)


def numbered(tokens: int, batch: int = 2, dim: int = 3) -> tuple[Tensor, Tensor]:
    """Keys whose value encodes their (sequence, token, head).

    The values are the negatives of the keys.
    """
    b, t, h = torch.meshgrid(
        torch.arange(batch), torch.arange(tokens), torch.arange(len(WINDOWS)), indexing="ij"
    )
    keys = (10_000 * (b + 1) + 100 * t + h).to(torch.float32)[..., None].expand(-1, -1, -1, dim)
    return keys, -keys


def empty(**changes: object) -> KVCache:
    arguments = {
        "batch": 2,
        "capacity": CAPACITY,
        "windows": WINDOWS,
        "head_dim": 3,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return KVCache(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "chunks", [[1] * CAPACITY, [CAPACITY], [7, 1, 1, 11], [4, 16], [2, 5, 1, 9, 3]], ids=str
)
def test_every_head_holds_its_window(chunks: list[int]) -> None:
    """The content does not depend on how the tokens were split into appends.

    Token j is in slot j modulo the number of slots. A head holds the newest min(W, capacity) tokens
    and no other.
    """
    cache = empty()
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    keys, values = numbered(CAPACITY)
    stop = 0
    for tokens in chunks:
        start = stop
        stop = stop + tokens
        cache.append(keys[:, start:stop], values[:, start:stop])
        assert cache.length == int(cache.position) == stop
        for group in cache.groups:
            expected = torch.full_like(group.keys, math.nan)
            for token in range(max(0, stop - group.slots), stop):
                expected[:, :, token % group.slots] = keys[:, token, group.heads]
            assert torch.equal(group.keys.nan_to_num(0), expected.nan_to_num(0))
            assert torch.equal(group.values.nan_to_num(0), -expected.nan_to_num(0))


def test_groups_are_the_distinct_windows_within_the_capacity() -> None:
    groups = [(group.slots, group.heads) for group in empty().groups]
    assert groups == [(1, (2,)), (5, (0, 3)), (8, (5,)), (CAPACITY, (1, 4))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bytes_are_those_of_the_formula(dtype: torch.dtype) -> None:
    cache = empty(dtype=dtype)
    slots = 5 + CAPACITY + 1 + 5 + CAPACITY + 8
    assert cache.nbytes == 2 * 2 * 3 * dtype.itemsize * slots
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for g in cache.groups
        for x in (g.keys, g.values)
    }
    assert cache.nbytes == sum(storages.values())


def test_bytes_against_a_dense_cache() -> None:
    """Half of the heads are windowed.

    The cache then takes half of the memory plus the windows. This is the purpose of the hybrid.
    """
    shape = {
        "batch": 1,
        "capacity": 32_768,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "device": "meta",
    }
    dense = KVCache(windows=(FULL_WINDOW,) * 8, **shape)  # type: ignore[arg-type]
    hybrid = KVCache(windows=(FULL_WINDOW, 1024) * 4, **shape)  # type: ignore[arg-type]
    assert hybrid.nbytes / dense.nbytes == 0.5 + 0.5 * 1024 / 32_768


def test_the_length_can_be_read_back_from_the_device() -> None:
    cache = empty()
    keys, values = numbered(3)
    cache.append(keys, values)
    cache.position += 2  # as after two replays of a CUDA graph
    assert cache.length == 3
    assert cache.refresh_length() == cache.length == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch 0, .* must all be at least 1"),
        ({"capacity": 0}, "capacity 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"windows": (4, 0)}, r"windows \(4, 0\)"),
        ({"windows": ()}, "with a window for each KV head"),
        ({"start": torch.zeros(3, dtype=torch.int32)}, r"start must be int32 \(2,\)"),
        ({"start": torch.zeros(2)}, "start must be int32"),
        ({"start": torch.tensor([0, -1], dtype=torch.int32)}, "at least 0"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empty(**changes)


def test_tokens_that_do_not_fit_are_refused_and_change_nothing() -> None:
    cache = empty()
    keys, values = numbered(CAPACITY)
    cache.append(keys[:, :18], values[:, :18])
    before = cache.keys.clone()
    learned = keys[:, :1].clone().requires_grad_()
    for k, v, message in [
        (keys[:, :3], values[:, :3], "3 more tokens do not fit: the cache holds 18 of 20"),
        (keys[:1, :1], values[:1, :1], "shapes do not fit"),
        (keys[:, :1, :5], values[:, :1, :5], "shapes do not fit"),
        (keys[:, :1, :, :2], values[:, :1, :, :2], "shapes do not fit"),
        (keys[:, :1], values[:, :2], "shapes do not fit"),
        (keys[:, :1].double(), values[:, :1].double(), "k is torch.float64"),
        (learned, values[:, :1], "no gradients"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.append(k, v)
    # Compare bits, because a slot that no token has filled may hold anything, also NaN.
    assert torch.equal(cache.keys.view(torch.int32), before.view(torch.int32))
    assert cache.length == int(cache.position) == 18
    with torch.no_grad():
        cache.append(learned, values[:, :1])
    assert not cache.keys.requires_grad
