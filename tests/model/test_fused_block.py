"""The block as it runs on a GPU, compared with the plain block in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from megaconsa.consa.allocation import Allocation
from megaconsa.kernels import limits
from megaconsa.model.config import ModelConfig
from megaconsa.model.fused_block import run_block
from megaconsa.model.qwen3 import Block
from megaconsa.model.weight_gradients import MAIN_GRAD, Stack

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
