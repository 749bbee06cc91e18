"""A GPU's block, divided over tensor ranks, compared with the plain block of one process.

The ranks are three gloo processes, and the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from megaconsa.consa.allocation import Allocation
from megaconsa.kernels import limits
from megaconsa.model.config import ModelConfig
from megaconsa.model.qwen3 import Block
from megaconsa.parallel.pipeline import BlockLayer
from megaconsa.parallel.sharding import Sharding, is_divided, sums_over_heads
from megaconsa.parallel.tensor_parallel import TensorParallel
from tests.parallel.test_tensor_parallel import run, stretch

SHAPE = ModelConfig(61, 24, 36, 1, 6, 3, head_dim=8, rope_theta=10_000.0, rms_norm_eps=1e-5)
TABLE = Allocation(4, ((False, True, False),))
LENGTH = 18


def check_block(tp: TensorParallel) -> None:
    from megaconsa.model.fused_block import run_block

    generator = torch.Generator().manual_seed(0)
    whole = Block(SHAPE, 0, TABLE)
    for weight in whole.parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.3 * drawn if weight.dim() == 1 else drawn / weight.shape[1] ** 0.5
    x, upstream = torch.randn(2, 2, LENGTH, SHAPE.hidden_size, generator=generator)
    documents = torch.zeros(2, LENGTH, dtype=torch.int32)
    documents[1, 7:] = 7
    sequences = torch.arange(2)
    whole_x = x.clone().requires_grad_()
    truth = whole(whole_x, documents, sequences)
    truth.backward(upstream)

    sharding = Sharding(SHAPE, TABLE, tp.rank, tp.size)
    block = BlockLayer(sharding, 0, TABLE, "auto", True, tp)
    for name, weight in block.named_parameters():
        full_name = f"model.layers.0.{name}"
        weight.data = sharding.split(full_name, whole.get_parameter(name).detach()).clone()
    own_x = stretch(x, tp).clone().requires_grad_()
    leaves = [own_x, *block.parameters()]
    block.recomputes_heads = True
    recomputed = run_block(block, own_x, documents, sequences)
    recomputed_gradients = torch.autograd.grad(recomputed, leaves, stretch(upstream, tp))
    block.recomputes_heads = False
    out = run_block(block, own_x, documents, sequences)
    out.backward(stretch(upstream, tp))
    for leaf, gradient in zip(leaves, recomputed_gradients, strict=True):
        assert leaf.grad is not None
        assert torch.equal(gradient, leaf.grad)
    torch.testing.assert_close(out, stretch(truth, tp), rtol=1e-4, atol=1e-5)
    assert whole_x.grad is not None
    torch.testing.assert_close(own_x.grad, stretch(whole_x.grad, tp), rtol=1e-4, atol=1e-5)
    for name, weight in block.named_parameters():
        full_name = f"model.layers.0.{name}"
        wanted = whole.get_parameter(name).grad
        assert weight.grad is not None
        assert wanted is not None
        found = weight.grad
        is_part = not is_divided(full_name) and (tp.sequence or sums_over_heads(full_name))
        if is_part:
            found = tp.all_reduce(found.clone())
        torch.testing.assert_close(
            found, sharding.split(full_name, wanted), rtol=1e-4, atol=1e-4, msg=name
        )


@pytest.mark.skipif(not limits.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "whole"])
def test_equals_one_process(sequence: bool) -> None:
    run(check_block, 3, sequence)
