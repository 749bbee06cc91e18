"""Decoding token by token equals attention over the whole sequence.

The plain version is compared in fp64, where a key too many shows. The Triton kernels are compared
in fp32, because the interpreter multiplies bf16 wrongly. They are compared at fewer positions,
because the interpreter is slow.
Every cache starts full of NaN, because slots that no token was written to must not be seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels import KVCache, decode_attention, limits
from megaconsa.kernels.attention import reference
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.decode import decode_attention as decode
from megaconsa.kernels.decode import triton

interpreted = pytest.mark.skipif(not limits.INTERPRETED, reason="needs TRITON_INTERPRET=1")
both = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
PRECISION = {"reference": (torch.float64, 1e-13), "triton": (torch.float32, 2e-6)}


def draw(
    batch: int, length: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """Draws q, k and v, large enough to make attention uneven."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, dim) for heads in (kv_heads * group, kv_heads, kv_heads)]
    return tuple(
        (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for shape in shapes
    )


def whole(
    inputs: tuple[Tensor, ...],
    windows: tuple[int, ...],
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Computes the fp64 reference over the sequence. Padding is a separate document."""
    q, k, v = (x.double() for x in inputs)
    padding = None if start is None else (torch.arange(q.shape[1]) >= start[:, None]).int()
    return reference.attention(
        q, k, v, HeadPattern(windows), padding, q.shape[-1] ** -0.5 if scale is None else scale
    )


def poisoned(
    inputs: tuple[Tensor, ...], windows: tuple[int, ...], capacity: int, start: Tensor | None = None
) -> KVCache:
    k = inputs[1]
    cache = KVCache(
        k.shape[0], capacity, windows, k.shape[-1], dtype=k.dtype, device=k.device, start=start
    )
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def decoded(
    inputs: tuple[Tensor, ...],
    cache: KVCache,
    backend: str,
    positions: Iterable[int],
    prompt: int = 1,
    scale: float | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Appends a prompt at once, then token by token.

    positions: where to yield outputs. None of them is inside the prompt.
    Yields each position with its output (B, 1, heads, D).
    """
    q, k, v = inputs
    positions = set(positions)
    stop = prompt
    cache.append(k[:, :prompt], v[:, :prompt])
    while True:
        if stop - 1 in positions:
            yield (
                stop - 1,
                decode_attention(q[:, stop - 1 : stop], cache, scale=scale, backend=backend),
            )
        if stop == q.shape[1]:
            return
        cache.append(k[:, stop : stop + 1], v[:, stop : stop + 1])
        stop += 1


def check(outputs: Iterator[tuple[int, Tensor]], truth: Tensor, tolerance: float) -> None:
    compared = 0
    for position, out in outputs:
        expected = truth[:, position : position + 1]
        assert out.shape == expected.shape
        error = float((out.double() - expected).norm() / expected.norm())
        assert error <= tolerance, f"position {position}: {error}"
        compared += 1
    assert compared


@pytest.mark.parametrize("window", [1, 7, 64, FULL_WINDOW])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_every_position_equals_attention_over_the_sequence(
    window: int, group: int, dim: int
) -> None:
    """The sequence spans three windows.

    The other heads are one full head and one head with another window.
    """
    windows = (window, FULL_WINDOW, 5)
    length = 3 * window + 2 if window < FULL_WINDOW else 70
    dtype, tolerance = PRECISION["reference"]
    inputs = draw(2, length, 3, group, dim, dtype)
    check(
        decoded(inputs, poisoned(inputs, windows, length), "reference", range(length)),
        whole(inputs, windows),
        tolerance,
    )


@interpreted
@pytest.mark.parametrize(
    ("windows", "group", "dim"),
    [
        ((1, FULL_WINDOW), 1, 16),
        ((7, FULL_WINDOW, 7), 2, 16),
        ((7, 1), 8, 32),
        ((64, FULL_WINDOW), 3, 64),
        ((64, 7, FULL_WINDOW), 1, 80),
        ((64,), 8, 96),
        ((FULL_WINDOW,), 20, 128),
        ((33, FULL_WINDOW), 2, 256),
    ],
    ids=str,
)
def test_triton_equals_attention_over_the_sequence(
    windows: tuple[int, ...], group: int, dim: int
) -> None:
    """Compares every position for short windows.

    Long windows are compared around their multiples and around the edges of the tiles.
    """
    window = windows[0]
    length = 3 * window + 2 if window < FULL_WINDOW else 70
    edges = {
        side + edge for side in (-1, 0, 1) for edge in (1, window, 2 * window, 3 * window, 32, 64)
    }
    positions = range(length) if length < 25 else edges | {length - 1}
    dtype, tolerance = PRECISION["triton"]
    inputs = draw(1, length, len(windows), group, dim, dtype)
    check(
        decoded(inputs, poisoned(inputs, windows, length), "triton", positions),
        whole(inputs, windows),
        tolerance,
    )


@both
def test_many_pieces_of_uneven_heads_join(backend: str) -> None:
    """The sequence fills many tiles in some heads and less than one in others."""
    windows = (300, FULL_WINDOW, 7, 300, 641)
    dtype, tolerance = PRECISION[backend]
    inputs = draw(1, 700, 5, 2, 128, dtype)
    positions = {639, 640, 641, 699}
    outputs = decoded(inputs, poisoned(inputs, windows, 700), backend, positions, prompt=500)
    check(outputs, whole(inputs, windows), tolerance)


@interpreted
def test_more_pieces_than_are_joined_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses as many programs as a GPU runs.

    Every tile of keys then becomes a separate piece.
    """
    monkeypatch.setattr(triton, "PROGRAMS_PER_PROCESSOR", 66)
    windows = (FULL_WINDOW, 7)
    dtype, tolerance = PRECISION["triton"]
    inputs = draw(1, 1100, 2, 1, 256, dtype)
    outputs = decoded(inputs, poisoned(inputs, windows, 1100), "triton", {1099}, prompt=1100)
    check(outputs, whole(inputs, windows), tolerance)


@both
@pytest.mark.parametrize("prompt", [1, 6, 7, 8, 20])
def test_a_prompt_then_tokens(backend: str, prompt: int) -> None:
    """The prompt is shorter than, as long as, and longer than a window.

    The cache has room to spare.
    """
    windows = (7, FULL_WINDOW)
    dtype, tolerance = PRECISION[backend]
    inputs = draw(2, 23, 2, 2, 16, dtype)
    positions = range(23) if backend == "reference" else (prompt - 1, prompt, 22)
    check(
        decoded(inputs, poisoned(inputs, windows, 40), backend, positions, prompt),
        whole(inputs, windows),
        tolerance,
    )


@both
def test_padding_on_the_left_is_never_seen(backend: str) -> None:
    """Even NaN in the padding is never seen.

    Covers windows that reach into the padding, windows that have just left it, and whole tiles of
    padding.
    """
    windows = (7, FULL_WINDOW, 64, 1)
    start = torch.tensor([0, 9, 70, 64], dtype=torch.int32)
    dtype, tolerance = PRECISION[backend]
    inputs = draw(4, 150, 4, 2, 80, dtype)
    truth = whole(inputs, windows, start)
    for x in inputs[1:]:
        x.masked_fill_((torch.arange(150) < start[:, None])[:, :, None, None], math.nan)
    positions = range(70, 150) if backend == "reference" else (70, 71, 76, 77, 133, 134, 149)
    check(
        decoded(inputs, poisoned(inputs, windows, 150, start), backend, positions, prompt=71),
        truth,
        tolerance,
    )


@both
def test_a_sequence_of_padding_gives_zeros(backend: str) -> None:
    inputs = draw(2, 6, 2, 1, 16, PRECISION[backend][0])
    cache = poisoned(inputs, (3, FULL_WINDOW), 8, torch.tensor([6, 2], dtype=torch.int32))
    ((_, out),) = decoded(inputs, cache, backend, {5}, prompt=6)
    assert not out[0].any()
    assert out[1].isfinite().all()
    assert out[1].any()


@both
def test_scale_and_strides_of_q(backend: str) -> None:
    """q is a view of (B, heads, T, D), as it is in a model."""
    windows = (3, FULL_WINDOW)
    dtype, tolerance = PRECISION[backend]
    inputs = draw(2, 5, 2, 3, 16, dtype)
    q = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    for scale in (0.3, -0.1):
        outputs = decoded((q, *inputs[1:]), poisoned(inputs, windows, 5), backend, {4}, scale=scale)
        check(outputs, whole(inputs, windows, scale=scale), tolerance)


@both
def test_equal_inputs_give_equal_bits(backend: str) -> None:
    inputs = draw(2, 200, 2, 2, 64, torch.float32)
    cache = poisoned(inputs, (50, FULL_WINDOW), 200)
    cache.append(*inputs[1:])
    first, second = (decode_attention(inputs[0][:, -1:], cache, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@interpreted
def test_triton_in_fp16() -> None:
    windows = (40, FULL_WINDOW)
    inputs = draw(1, 130, 2, 2, 128, torch.float16)
    check(
        decoded(inputs, poisoned(inputs, windows, 130), "triton", {129}, prompt=100),
        whole(inputs, windows),
        1e-3,
    )


@st.composite
def cases(draw_: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[int], int, int]:
    """Draws a problem.

    Returns (batch, length, kv_heads, group, dim), windows, starts, prompt, room to spare.
    """
    kv_heads = draw_(st.integers(1, 4))
    length = draw_(st.integers(1, 90))
    window = st.one_of(st.integers(1, 100), st.just(FULL_WINDOW))
    windows = tuple(draw_(st.lists(window, min_size=kv_heads, max_size=kv_heads)))
    starts = draw_(st.lists(st.integers(0, length - 1), min_size=1, max_size=3))
    shape = (
        len(starts),
        length,
        kv_heads,
        draw_(st.integers(1, 5)),
        draw_(st.sampled_from(limits.HEAD_DIMS)),
    )
    return shape, windows, starts, draw_(st.integers(1, length)), draw_(st.integers(0, 40))


@both
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=cases())
def test_the_newest_token_for_any_shape(
    backend: str, case: tuple[tuple[int, ...], tuple[int, ...], list[int], int, int]
) -> None:
    shape, windows, starts, prompt, room = case
    dtype, tolerance = PRECISION[backend]
    inputs = draw(*shape, dtype)
    start = torch.tensor(starts, dtype=torch.int32)
    last = shape[1] - 1
    outputs = decoded(
        inputs, poisoned(inputs, windows, shape[1] + room, start), backend, {last}, prompt
    )
    check(outputs, whole(inputs, windows, start), tolerance)


@pytest.mark.parametrize(
    ("q", "arguments", "message"),
    [
        (torch.zeros(2, 2, 4, 16), {}, "shapes do not fit"),
        (torch.zeros(1, 1, 4, 16), {}, "shapes do not fit"),
        (torch.zeros(2, 1, 3, 16), {}, "shapes do not fit"),
        (torch.zeros(2, 1, 4, 8), {}, "shapes do not fit"),
        (
            torch.zeros(2, 1, 4, 16).double(),
            {},
            "q is torch.float64 on cpu, but the cache holds torch.float32",
        ),
        (torch.zeros(2, 1, 4, 16, requires_grad=True), {}, "has no gradient"),
        (
            torch.zeros(2, 1, 4, 16),
            {"backend": "flash"},
            "backend flash cannot decode; choose one of auto, reference, triton",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    q: Tensor, arguments: dict[str, str], message: str
) -> None:
    inputs = draw(2, 1, 2, 2, 16, torch.float32)
    cache = poisoned(inputs, (2, FULL_WINDOW), 4)
    with pytest.raises(ValueError, match="the cache is empty"):
        decode_attention(inputs[0], cache)
    cache.append(*inputs[1:])
    with pytest.raises(ValueError, match=message):
        decode_attention(q, cache, **arguments)  # type: ignore[arg-type]


def test_what_triton_refuses() -> None:
    assert "head_dim is 20" in str(triton.refusal("cuda", torch.float32, 20))
    assert "float64" in str(triton.refusal("cuda", torch.float64, 64))
    if limits.INTERPRETED:
        assert "bf16" in str(triton.refusal("cpu", torch.bfloat16, 64))
    else:
        assert "needs a CUDA GPU" in str(triton.refusal("cpu", torch.float32, 64))
    inputs = draw(1, 1, 1, 1, 20, torch.float32)
    cache = poisoned(inputs, (1,), 1)
    cache.append(*inputs[1:])
    with pytest.raises(ValueError, match="backend triton cannot decode this"):
        decode_attention(inputs[0], cache, backend="triton")


def test_auto_says_once_what_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    decode._choose.cache_clear()
    inputs = draw(1, 1, 1, 1, 16, torch.float32)
    cache = poisoned(inputs, (1,), 1)
    cache.append(*inputs[1:])
    with caplog.at_level(logging.INFO, logger="megaconsa.kernels"):
        for _ in range(3):
            decode_attention(inputs[0], cache)
    assert [
        record.getMessage().startswith("decoding with backend=auto takes reference")
        for record in caplog.records
    ] == [True]
