"""What the flash backend adds to FlashAttention.

These are runs of heads, shared buffers, registered operators, and gates.
The packages run on GPUs only. Here, a textbook forward and backward pass in torch replaces them,
with the same signatures. test_flash_cuda.py runs the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels.attention import flash, flash_library, reference
from megaconsa.kernels.attention.flash_library import Library, Packed
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.visibility import visible


def log_weights(
    q: Tensor, k: Tensor, window: int | None, scale: float, documents: Tensor | None
) -> Tensor:
    """Computes scores (B, heads, queries, S), minus infinity where a key is not visible."""
    length = k.shape[1]
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    mask = visible(length, window or length, documents, q.device, length - q.shape[1])
    return torch.einsum("bihd,bjhd->bhij", q, keys).mul(scale).masked_fill(~mask, float("-inf"))


def as_one_sequence(
    packed: Packed | None, *tensors: Tensor
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Packed tensors (tokens, ...) as a sequence of documents, (1, tokens, ...)."""
    if packed is None:
        return None, tensors
    assert packed.bounds.dtype == torch.int32
    lengths = packed.bounds.diff()
    assert lengths.min() > 0
    assert lengths.max() == packed.longest <= packed.length
    documents = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    return documents, tuple(tensor[None] for tensor in tensors)


def textbook_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int | None,
    scale: float,
    packed: Packed | None = None,
) -> None:
    documents, (q, k, v, out, lse) = as_one_sequence(packed, q, k, v, out, lse)
    scores = log_weights(q, k, window, scale, documents)
    values = v.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    lse.copy_(scores.logsumexp(-1))
    out.copy_(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values))


def textbook_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    window: int | None,
    scale: float,
    packed: Packed | None = None,
) -> None:
    """Computes the gradients from the saved out and lse, as the packages do.

    It asserts the memory layout that the packages need.
    """
    assert 0 not in dout.stride()
    assert lse.is_contiguous()
    documents, tensors = as_one_sequence(packed, dout, q, k, v, out, lse, dq, dk, dv)
    dout, q, k, v, out, lse, dq, dk, dv = tensors
    group = q.shape[2] // k.shape[2]
    weights = (log_weights(q, k, window, scale, documents) - lse[..., None]).exp()
    dweights = torch.einsum("bihd,bjhd->bhij", dout, v.repeat_interleave(group, dim=2))
    dscores = weights * (dweights - (dout * out).sum(-1).transpose(1, 2)[..., None]) * scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", dscores, k.repeat_interleave(group, dim=2)))
    dk.copy_(torch.einsum("bhij,bihd->bjhd", dscores, q).unflatten(2, (-1, group)).sum(3))
    dv.copy_(torch.einsum("bhij,bihd->bjhd", weights, dout).unflatten(2, (-1, group)).sum(3))


@pytest.fixture(scope="module", autouse=True)
def _textbook() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            flash_library, "find", lambda device: Library(textbook_forward, textbook_backward)
        )
        yield


def draw(
    batch: int, length: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, heads, dim, generator=generator, dtype=dtype).requires_grad_()
        for heads in (kv_heads * group, kv_heads, kv_heads)
    ]


def check_equals_reference(
    shape: tuple[int, int, int, int, int],
    windows: tuple[int, ...],
    gate: Tensor | None = None,
    documents: Tensor | None = None,
    closed: tuple[bool, ...] | None = None,
    earlier_keys: int = 0,
) -> None:
    q, k, v = draw(*shape)
    leaves = [q[:, earlier_keys:].detach().requires_grad_(), k, v]
    z = None
    if gate is not None:
        z = gate.clone().requires_grad_()
        leaves.append(z)
    dout = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1))
    results = []
    for attention in (flash.attention, reference.attention):
        out = attention(*leaves[:3], HeadPattern(windows, z, closed), documents, 0.4)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for result, truth in zip(*results, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [None, torch.tensor([[0.3, 0.1], [0.9, 0.5]])])
def test_keys_before_the_first_query(gate: Tensor | None) -> None:
    check_equals_reference((2, 9, 2, 2, 8), (3, 3), gate, earlier_keys=4)
    check_equals_reference((2, 9, 2, 2, 8), (3, FULL_WINDOW), earlier_keys=8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_order_of_heads_equals_the_reference(data: st.DataObject) -> None:
    bounds = ((1, 3), (1, 9), (1, 6), (1, 3), (1, 5))
    shape = tuple(data.draw(st.integers(low, high)) for low, high in bounds)
    kinds = st.sampled_from([1, 3, 9, FULL_WINDOW])
    windows = data.draw(st.tuples(*[kinds] * shape[2]))
    documents = None
    if data.draw(st.booleans()):
        begins = data.draw(st.lists(st.booleans(), min_size=18, max_size=18))
        places = torch.tensor(begins * 2).int()[: shape[0] * shape[1]]
        documents = places.view(shape[:2]).cumsum(dim=1).int()
    check_equals_reference(shape, windows, None, documents)  # type: ignore[arg-type]


@pytest.mark.parametrize("documents", [None, torch.tensor([[0] * 9, [1] * 4 + [7] * 5]).int()])
@pytest.mark.parametrize("windows", [(3, 3), (3, FULL_WINDOW)])
def test_gated_heads_equal_the_reference(
    windows: tuple[int, int], documents: Tensor | None
) -> None:
    gate = torch.tensor([[0.3, 0.9], [0.01, 0.6]])
    check_equals_reference((2, 9, 2, 2, 4), windows, gate, documents)


GATES = {
    "open": [[0.3, 0.9, 0.01], [0.6, 0.99, 0.5]],
    "at the ends": [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]],
    "one closed": [[0.3, 0.0, 0.2], [0.6, 0.0, 1.0]],
    "all closed": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
}


@pytest.mark.parametrize("knows", [False, True])
@pytest.mark.parametrize("window", [1, 3, 40, 69, 70])
@pytest.mark.parametrize("kind", GATES)
def test_the_window_is_computed_once(kind: str, window: int, knows: bool) -> None:
    """Gated heads equal the reference, also where the host knows which gates are closed."""
    gate = torch.tensor(GATES[kind])
    closed = tuple((gate == 0).all(dim=0).tolist()) if knows else None
    check_equals_reference((2, 70, 3, 2, 8), (window,) * 3, gate, closed=closed)


def test_closed_heads_take_no_part_before_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> None:
        q, window = arguments[0], arguments[5]
        calls.append((tuple(q.shape), window))
        textbook_forward(*arguments)

    library = Library(counted, textbook_backward)
    monkeypatch.setattr(flash_library, "find", lambda device: library)
    q, k, v = draw(1, 20, 4, 2, 8)
    gate = torch.tensor([[0.5, 0.0, 0.7, 1.0]])
    closed = (False, True, False, False)
    flash.attention(q, k, v, HeadPattern((6,) * 4, gate, closed), None, 0.5)
    assert calls == [((1, 20, 8, 8), 6), ((1, 14, 2, 8), None), ((1, 14, 4, 8), None)]


def test_all_weight_on_one_side_of_the_window() -> None:
    """The first head's scores are 100 for the first keys, the second head's for the others."""
    q, k, v = draw(1, 40, 2, 1, 8)
    with torch.no_grad():
        q.zero_()
        k.zero_()
        q[:, :, 0, 0] = q[:, :, 1, 1] = 10.0
        k[:, :20, :, 0] = 10.0
        k[:, 20:, :, 1] = 10.0
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    for value in (0.0, 0.5, 1.0):
        gate = torch.full((1, 2), value)
        results = []
        for attention in (flash.attention, reference.attention):
            out = attention(q, k, v, HeadPattern((10, 10), gate), None, 1.0)
            results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)))
        # Near 100, fp32 knows the log-sum-exp to 8e-6, and a weight's share in dq is up to 100.
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_calls_read_and_write_slices_of_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend makes no copies beside the work of the library.

    Each pass makes two calls. Each argument is a view, of the caller's tensors where the caller has
    them.
    """
    q, k, v = draw(2, 8, 4, 2, 4)
    storages: dict[str, list[list[int]]] = {"forward": [], "backward": []}

    def seen(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Tensor | float | None) -> None:
            storages[name].append(
                [x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)]
            )
            function(*arguments)

        return call

    library = Library(seen("forward", textbook_forward), seen("backward", textbook_backward))
    monkeypatch.setattr(flash_library, "find", lambda device: library)
    out = flash.attention(q, k, v, HeadPattern((FULL_WINDOW, FULL_WINDOW, 3, 3)), None, 0.5)
    torch.autograd.grad(out, (q, k, v), torch.randn(out.shape))
    inputs = [x.untyped_storage().data_ptr() for x in (q, k, v)]
    for calls in storages.values():
        assert len(calls) == 2
        assert calls[0] == calls[1]
    assert storages["forward"][0][:4] == [*inputs, out.untyped_storage().data_ptr()]
    assert storages["backward"][0][1:5] == storages["forward"][0][:4]


def test_operators_are_registered_rightly() -> None:
    """torch's own checks cover schema, fake implementation, autograd and tracing."""
    q, k, v = draw(2, 7, 3, 2, 4)
    windows = [3, FULL_WINDOW, 3]
    operators = torch.ops.megaconsa
    for bounds, longest in ((None, 0), (torch.tensor([0, 3, 7, 14]).int(), 7)):
        inputs = (q, k, v, windows, bounds, longest, 0.5)
        torch.library.opcheck(operators.flash_attention.default, inputs)
        leaves = [x.detach() for x in (q, k, v)]
        out, lse = flash.forward(*leaves, windows, bounds, longest, 0.5)
        arguments = (torch.randn(out.shape), *leaves, out, lse, windows, bounds, longest, 0.5)
        torch.library.opcheck(operators.flash_attention_backward.default, arguments)


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_and_recomputes_to_the_same(gated: bool) -> None:
    leaves = draw(2, 8, 2, 2, 4)
    gate = torch.tensor([[0.3, 0.9], [0.1, 0.6]]) if gated else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash.attention(q, k, v, HeadPattern((FULL_WINDOW, 3), gate), None, 0.5)

    results = []
    torch._dynamo.reset()
    for function in (
        run,
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda *arguments: checkpoint(run, *arguments, use_reentrant=False),
    ):
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for other in results[1:]:
        assert all(
            torch.equal(first, second) for first, second in zip(results[0], other, strict=True)
        )


def test_a_broadcast_gradient_is_understood() -> None:
    """The gradient of a sum has strides of 0, which the packages do not accept."""
    leaves = draw(1, 6, 2, 1, 4)
    results = []
    for attention in (flash.attention, reference.attention):
        out = attention(*leaves, HeadPattern((2, FULL_WINDOW)), None, 0.5)
        results.append(torch.autograd.grad(out.sum(), leaves))
    for result, truth in zip(*results, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5)


def test_flash_attn_4_is_not_taken_where_its_gradients_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def served(capability: int) -> tuple[int, ...]:
        monkeypatch.setattr(flash_library, "_capability", lambda device: capability)
        return flash_library.served_head_dims(torch.device("cuda"))

    assert not {16, 80} & set(served(9))
    assert 256 in served(9)
    assert 256 not in served(10)
    assert {16, 80, 256} <= set(served(8))
