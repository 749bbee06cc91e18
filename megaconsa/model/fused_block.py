"""A block on a GPU: what stands before and after attention, each as one autograd function.

The plain block in `qwen3.py` says what is computed. Here each function

- runs a norm, a rotation or a SwiGLU as one kernel, with its intermediate values in fp32,
- multiplies with several weights at once,
- keeps little for the backward pass: norms and SwiGLU are computed again there, by the kernels
  that compute their gradients, and so are q and k if the block `recomputes_heads`,
- adds the gradients of weights to their fp32 buffers (`weight_gradients.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaconsa.kernels.norm import triton as norm
from megaconsa.kernels.rotary import normed_heads as rotary
from megaconsa.kernels.swiglu import triton as gating
from megaconsa.model.attention import Attention
from megaconsa.model.mlp import MLP
from megaconsa.model.norm import RMSNorm
from megaconsa.model.recomputed_tensors import RecomputedTensors
from megaconsa.model.rope import document_angles
from megaconsa.model.tensor_group import TensorGroup
from megaconsa.model.weight_gradients import add_gradient


class BlockModules(Protocol):
    """The parts of a `qwen3.Block`."""

    self_attn: Attention
    mlp: MLP
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    separate: bool
    recomputes_heads: bool
    group: TensorGroup


def run_block(block: BlockModules, x: Tensor, documents: Tensor, sequences: Tensor) -> Tensor:
    """As `Block.forward`."""
    q, k, v, x = before_attention(block, x, documents)
    attended = attend(block, q, k, v, documents, sequences)
    return after_attention(block, x, attended)


def before_attention(
    block: BlockModules, x: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a block computes before attention.

    x: (B, S, hidden), or this rank's part of the sequence.
    documents: (B, S) int32, index at which each position's document starts, of whole sequences.

    Returns q (B, S, heads, D), k and v (B, S, kv_heads, D), and x itself.
    """
    attention = block.self_attn
    config = attention.model_config
    cos, sin = document_angles(documents, config.head_dim, config.rope_theta, attention.context)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _BeforeAttention.apply(
        x,
        block,
        cos,
        sin,
        block.input_layernorm.weight,
        *attention.projections.weights,
        attention.q_norm.weight,
        attention.k_norm.weight,
    )
    return results


def attend(
    block: BlockModules, q: Tensor, k: Tensor, v: Tensor, documents: Tensor, sequences: Tensor
) -> Tensor:
    """The attention of the block's heads, (B, S, heads, D).

    q, k, v: as `before_attention` returned them.
    """
    attention = block.self_attn
    pattern = attention.heads.select(attention.layer, sequences)
    seen = documents if block.separate else None
    with _saving(block, q, k):
        return attention.context.attend(q, k, v, pattern, seen, attention.backend)


def after_attention(block: BlockModules, x: Tensor, attended: Tensor) -> Tensor:
    """What a block computes after attention.

    x: the block's input, as `before_attention` returned it.
    attended: (B, S, heads, D).

    Returns the block's result, of the shape of x.
    """
    out: Tensor = _AfterAttention.apply(
        x,
        attended.flatten(2),
        block,
        *block.self_attn.output.weights,
        block.post_attention_layernorm.weight,
        *block.mlp.gate_up.weights,
        *block.mlp.down.weights,
    )
    return out


def _compute_heads(
    block: BlockModules, rows: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k after their norms and their rotation, from the projections."""
    attention = block.self_attn
    config = attention.model_config
    return rotary.normed_heads(
        rows,
        config.num_attention_heads,
        attention.q_norm.weight,
        attention.k_norm.weight,
        config.rms_norm_eps,
        cos,
        sin,
    )


def _saving(block: BlockModules, q: Tensor, k: Tensor) -> AbstractContextManager[None]:
    """How attention saves q and k for its backward pass."""
    before_attention: Any = q.grad_fn
    # Without a gradient function, as in an evaluation, nothing holds what they come from.
    if not block.recomputes_heads or before_attention is None:
        return nullcontext()

    def compute() -> tuple[Tensor, Tensor]:
        # They are there until its own backward pass, which follows that of attention.
        _, rows, cos, sin, _ = before_attention.saved_tensors
        return _compute_heads(block, rows, cos, sin)

    return RecomputedTensors((q, k), compute).hooks()


class _BeforeAttention(torch.autograd.Function):
    """Norm, projections to heads, norms of queries and keys, rotary embedding.

    Returns q, k, v, and x itself. The gradient that x gets from after attention comes back through
    the latter, so that the kernel of the norm can add it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: BlockModules,
        cos: Tensor,
        sin: Tensor,
        norm_weight: Tensor,
        q_proj: Tensor,
        k_proj: Tensor,
        v_proj: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config = block.self_attn.model_config
        x = x.contiguous()
        own = norm.rms_norm(x, norm_weight, config.rms_norm_eps)
        normed = block.group.gather_input(own)
        rows = normed @ block.self_attn.projections.matrix().T
        rows = rows.unflatten(-1, (-1, config.head_dim))
        q, k = _compute_heads(block, rows, cos, sin)
        v = rows[:, :, config.num_attention_heads + config.num_key_value_heads :]
        ctx.block = block
        # Another rank's part of the norm cannot be computed again.
        gathered = None if normed is own else normed
        ctx.save_for_backward(x, rows, cos, sin, gathered)
        return q, k, v, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_residual: Tensor) -> Any:
        block = ctx.block
        x, rows, cos, sin, gathered = ctx.saved_tensors
        attention = block.self_attn
        eps = attention.model_config.rms_norm_eps
        d_rows, head_parts = rotary.normed_heads_backward(
            d_q.contiguous(),
            d_k.contiguous(),
            d_v.contiguous(),
            rows,
            attention.q_norm.weight,
            attention.k_norm.weight,
            eps,
            cos,
            sin,
        )
        d_rows = d_rows.flatten(2)
        projections = attention.projections
        wanted = ctx.needs_input_grad[5:8]
        wait_for_d_normed = block.group.start_reduce_output(d_rows @ projections.matrix())
        if gathered is not None:
            # The ranks exchange meanwhile.
            of_projections = projections.gradients(d_rows, gathered, wanted)
        norm_weight = block.input_layernorm.weight
        d_x, parts, normed = norm.rms_norm_backward(
            wait_for_d_normed(), x, norm_weight, eps, d_residual.contiguous()
        )
        if gathered is None:
            of_projections = projections.gradients(d_rows, normed, wanted)
        of_heads = head_parts.sum(dim=0)
        return (
            d_x,
            None,
            None,
            None,
            add_gradient(norm_weight, parts.sum(dim=0)),
            *of_projections,
            add_gradient(attention.q_norm.weight, of_heads[0]),
            add_gradient(attention.k_norm.weight, of_heads[1]),
        )


class _AfterAttention(torch.autograd.Function):
    """Output projection, residual addition, norm, MLP, residual addition."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attended: Tensor,
        block: BlockModules,
        o_proj: Tensor,
        norm_weight: Tensor,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
    ) -> Tensor:
        group = block.group
        eps = block.self_attn.model_config.rms_norm_eps
        delta = group.reduce_output(attended @ o_proj.T)
        x, own = norm.add_rms_norm(x, delta, norm_weight, eps)
        normed = group.gather_input(own)
        gate_up = normed @ block.mlp.gate_up.matrix().T
        out = group.reduce_output(gating.swiglu(gate_up) @ down_proj.T)
        ctx.block = block
        gathered = None if normed is own else normed
        ctx.save_for_backward(attended, x, gate_up, gathered)
        return out.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        block = ctx.block
        group = block.group
        attended, x, gate_up, gathered = ctx.saved_tensors
        mlp = block.mlp
        attention = block.self_attn
        norm_weight = block.post_attention_layernorm.weight
        d_out = d_out.contiguous()
        d_down = group.gather_input(d_out)
        d_gated = d_down @ mlp.down.matrix()
        d_gate_up, gated = gating.swiglu_backward(d_gated, gate_up)
        wanted = ctx.needs_input_grad
        # The gradients of weights are computed while the ranks exchange those of activations.
        wait_for_d_normed = group.start_reduce_output(d_gate_up @ mlp.gate_up.matrix())
        of_down = mlp.down.gradients(d_down, gated, wanted[7:8])
        d_x, parts, normed = norm.rms_norm_backward(
            wait_for_d_normed(), x, norm_weight, attention.model_config.rms_norm_eps, d_out
        )
        wait_for_d_delta = group.start_gather_input(d_x)
        of_inputs = mlp.gate_up.gradients(
            d_gate_up, normed if gathered is None else gathered, wanted[5:7]
        )
        d_delta = wait_for_d_delta()
        d_attended = d_delta @ attention.output.matrix()
        return (
            d_x,
            d_attended,
            None,
            *attention.output.gradients(d_delta, attended, wanted[3:4]),
            add_gradient(norm_weight, parts.sum(dim=0)),
            *of_inputs,
            *of_down,
        )
