"""The block as it runs on a GPU, compared with the plain block in fp64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.head_selector import HeadSelector
from megaconsa.kernels import limits
from megaconsa.kernels.attention import flash_library, hybrid_attention
from megaconsa.kernels.attention.backends import BACKENDS
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.model import fused_block
from megaconsa.model.config import ModelConfig
from megaconsa.model.fused_block import run_block
from megaconsa.model.qwen3 import Block
from megaconsa.model.recomputed_tensors import RecomputedTensors
from megaconsa.model.weight_gradients import MAIN_GRAD, Stack
from tests.kernels.test_flash import textbook_backward, textbook_forward

SHAPE = ModelConfig(61, 48, 80, 1, 6, 2, head_dim=16, rope_theta=10_000.0, rms_norm_eps=1e-5)
TABLE = Allocation(5, ((True, False),))
interpreted = pytest.mark.skipif(not limits.INTERPRETED, reason="needs TRITON_INTERPRET=1")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
WHERE = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, marks=interpreted),
        pytest.param("cuda", torch.float32, marks=on_gpu),
        pytest.param("cuda", torch.bfloat16, marks=on_gpu),
    ],
    ids=str,
)


def build(device: str, dtype: torch.dtype) -> Block:
    generator = torch.Generator().manual_seed(0)
    block = Block(SHAPE, 0, TABLE)
    for weight in block.parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.3 * drawn if weight.dim() == 1 else drawn / weight.shape[1] ** 0.5
    return block.to(device, dtype)


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, gradient = torch.randn(2, 2, 40, SHAPE.hidden_size, generator=generator).to(device, dtype)
    documents = torch.zeros(2, 40, dtype=torch.int32, device=device)
    documents[0, 11:] = 11
    documents[1, 33:] = 33
    return x, gradient, documents, torch.arange(2, device=device)


def put_in_one_tensor(block: Block) -> None:
    """Makes the weights neighbours in memory, as DeepSpeed does."""
    weights = [weight for weight in block.parameters() if weight.dim() > 1]
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    parts = flat.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part.view(weight.shape)


def give_buffers(block: Block) -> dict[str, Tensor]:
    """Gives each weight a buffer that already holds something."""
    total = sum(weight.numel() for weight in block.parameters())
    flat = torch.ones(total, device=next(block.parameters()).device)
    buffers = {}
    begin = 0
    for name, weight in block.named_parameters():
        buffer = flat[begin : begin + weight.numel()].view(weight.shape)
        setattr(weight, MAIN_GRAD, buffer)
        buffers[name] = buffer
        begin += weight.numel()
    return buffers


def check(ours: Tensor, truth: Tensor, limit: float) -> None:
    """Compares by norm, because bf16 rounds each of several intermediate results."""
    error = torch.linalg.vector_norm(ours.double() - truth) / torch.linalg.vector_norm(truth)
    assert error < limit


@WHERE
@pytest.mark.parametrize("buffers", ["none", "apart", "neighbours"])
def test_equals_the_plain_block(buffers: str, device: str, dtype: torch.dtype) -> None:
    block = build(device, dtype)
    x, gradient, documents, sequences = inputs(device, dtype)
    plain = copy.deepcopy(block).double()
    true_x = x.double().requires_grad_()
    truth = plain(true_x, documents, sequences)
    truth.backward(gradient.double())
    sums: dict[str, Tensor] = {}
    if buffers != "none":
        sums = give_buffers(block)
    if buffers == "neighbours":
        put_in_one_tensor(block)
    leaf = x.clone().requires_grad_()
    out = run_block(block, leaf, documents, sequences)
    out.backward(gradient)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    check(out.detach(), truth.detach(), limit)
    assert leaf.grad is not None
    assert true_x.grad is not None
    check(leaf.grad, true_x.grad, limit)
    for name, weight in block.named_parameters():
        wanted = plain.get_parameter(name).grad
        assert wanted is not None
        if buffers == "none":
            assert weight.grad is not None
            check(weight.grad, wanted, limit)
        else:
            assert weight.grad is None
            check(sums[name] - 1, wanted, limit)


def test_neighbours_are_not_copied() -> None:
    flat = torch.arange(24.0)
    above, below = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    owner = nn.ModuleDict({"above": above, "below": below})
    stack, turned = Stack(owner, "above", "below"), Stack(owner, "below", "above")
    above.weight.data, below.weight.data = flat.view(2, 3, 4).clone().unbind()
    view = stack.matrix()
    assert view.data_ptr() == above.weight.data_ptr()
    assert torch.equal(view, flat.view(6, 4))
    assert torch.equal(turned.matrix(), torch.cat((below.weight, above.weight)))
    # As after a checkpoint was loaded, or the module was moved.
    below.weight.data = torch.ones(3, 4)
    assert torch.equal(stack.matrix(), torch.cat((above.weight, below.weight)))
    owner["above"] = nn.Linear(4, 3, bias=False)
    assert torch.equal(stack.matrix(), torch.cat((owner["above"].weight, below.weight)))


def test_a_copied_block_has_its_own_weights() -> None:
    block = build("cpu", torch.float32)
    put_in_one_tensor(block)
    before = block.mlp.gate_up.matrix().clone()
    other = copy.deepcopy(block)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert not other.mlp.gate_up.matrix().any()
    assert torch.equal(block.mlp.gate_up.matrix(), before)


@interpreted
@pytest.mark.parametrize("buffers", [False, True])
def test_frozen_weights_get_no_gradients(buffers: bool) -> None:
    block = build("cpu", torch.float32)
    x, gradient, documents, sequences = inputs("cpu", torch.float32)
    sums = give_buffers(block) if buffers else {}
    for name, weight in block.named_parameters():
        weight.requires_grad_("q_proj" not in name and "down_proj" not in name)
    plain = copy.deepcopy(block)
    plain(x, documents, sequences).backward(gradient)
    run_block(block, x, documents, sequences).backward(gradient)
    for name, weight in block.named_parameters():
        wanted = plain.get_parameter(name).grad
        found = sums[name] - 1 if buffers else weight.grad
        if wanted is None:
            assert found is None or not found.any()
        else:
            assert found is not None
            check(found, wanted, 1e-4)


class Gates:
    """The heads of a layer that learns."""

    def __init__(self, device: str) -> None:
        self.gate = torch.tensor([[0.3, 0.8], [0.6, 0.1]], device=device, requires_grad=True)

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        return HeadPattern((5, 5), self.gate)


@pytest.fixture
def _textbook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serves all backends on a CPU, with textbook functions instead of FlashAttention."""
    if torch.cuda.is_available():
        return
    library = flash_library.Library(textbook_forward, textbook_backward)
    monkeypatch.setattr(flash_library, "find", lambda device: library)
    monkeypatch.setattr(hybrid_attention, "choose_backend", lambda name, problem: BACKENDS[name])


ATTENTIONS = pytest.mark.parametrize(
    ("backend", "heads", "separate"),
    [
        ("triton", "dense", True),
        ("triton", "mixed", False),
        ("triton", "gated", True),
        ("flash", "mixed", True),
        # A function of its own.
        ("flash", "gated", False),
        # It saves q and k twice.
        ("flash", "gated", True),
        # It saves views of q and k.
        ("sdpa", "gated", True),
    ],
)


def attending(
    backend: str,
    heads: str,
    separate: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Block, list[Tensor]]:
    """A block, and all that gets gradients but x."""
    block = build(device, dtype)
    selectors: dict[str, HeadSelector] = {
        "dense": Allocation(5, ((True, True),)),
        "mixed": TABLE,
        "gated": Gates(device),
    }
    selector = selectors[heads]
    block.self_attn.heads = selector
    block.self_attn.backend = backend
    block.separate = separate
    gates = [selector.gate] if isinstance(selector, Gates) else []
    return block, [*block.parameters(), *gates]


@contextmanager
def watched_heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StorageWeakRef]]:
    """The memory of each q and k that is computed."""
    found: list[StorageWeakRef] = []
    compute = fused_block.rotary.normed_heads

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        heads = compute(*arguments)
        found.extend(StorageWeakRef(each.untyped_storage()) for each in heads)
        return heads

    with monkeypatch.context() as patch:
        patch.setattr(fused_block.rotary, "normed_heads", watched)
        yield found


def are_free(memory: list[StorageWeakRef]) -> list[bool]:
    # Triton's interpreter leaves cycles that hold its arguments.
    gc.collect()
    return [each.expired() for each in memory]


@WHERE
@ATTENTIONS
@pytest.mark.usefixtures("_textbook")
def test_recomputed_heads_change_nothing(
    backend: str, heads: str, separate: bool, device: str, dtype: torch.dtype
) -> None:
    if device == "cuda" and backend != "triton":
        pytest.skip("the order of its sums varies")
    block, leaves = attending(backend, heads, separate, device, dtype)
    x, gradient, documents, sequences = inputs(device, dtype)
    x.requires_grad_()
    results = []
    for block.recomputes_heads in (False, True):
        out = run_block(block, x, documents, sequences)
        results.append([out, *torch.autograd.grad(out, [x, *leaves], gradient)])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


@interpreted
@ATTENTIONS
@pytest.mark.usefixtures("_textbook")
def test_recomputed_heads_are_not_kept(
    backend: str, heads: str, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, leaves = attending(backend, heads, separate)
    x, gradient, documents, sequences = inputs("cpu", torch.float32)
    with watched_heads(monkeypatch) as memory:
        kept = run_block(block, x, documents, sequences)
        assert are_free(memory) == [False, False]
    block.recomputes_heads = True
    with watched_heads(monkeypatch) as memory:
        out = run_block(block, x, documents, sequences)
        assert are_free(memory) == [True, True]
        first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        # Computed once, for q and k and all that saved them. A retained graph keeps neither.
        assert are_free(memory) == [True] * 4
        second = torch.autograd.grad(out, leaves, gradient)
        assert are_free(memory) == [True] * 6
    truth = torch.autograd.grad(kept, leaves, gradient)
    for one, other, wanted in zip(first, second, truth, strict=True):
        assert torch.equal(one, wanted)
        assert torch.equal(other, wanted)


@interpreted
@pytest.mark.parametrize("backward", [True, False])
def test_hooks_of_recomputed_heads_end_with_the_graph(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = []

    class Watched(RecomputedTensors):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            hooks.append(weakref.ref(self))

    monkeypatch.setattr(fused_block, "RecomputedTensors", Watched)
    # Not by Triton's interpreter, which leaves cycles that hold the attention's result.
    block, _ = attending("sdpa", "gated", True)
    block.recomputes_heads = True
    x, gradient, documents, sequences = inputs("cpu", torch.float32)
    # The garbage collector would also free a cycle, but late.
    gc.disable()
    try:
        out = run_block(block, x, documents, sequences)
        assert hooks[0]() is not None
        if backward:
            out.backward(gradient)
        else:
            del out
        assert hooks[0]() is None
    finally:
        gc.enable()


@interpreted
def test_frozen_heads_are_kept() -> None:
    """Only the gate gets a gradient, so nothing keeps what q and k could be computed from."""
    block, leaves = attending("triton", "gated", True)
    x, gradient, documents, sequences = inputs("cpu", torch.float32)
    block.requires_grad_(False)
    results = []
    for block.recomputes_heads in (False, True):
        out = run_block(block, x, documents, sequences)
        results.append(torch.autograd.grad(out, leaves[-1], gradient)[0])
    assert torch.equal(*results)
