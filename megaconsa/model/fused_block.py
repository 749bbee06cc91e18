"""A block on a GPU: what stands before and after attention, each as one autograd function.

The plain block in `qwen3.py` says what is computed. Here each function

- runs a norm, a rotation or a SwiGLU as one kernel, with its intermediate values in fp32,
- multiplies with several weights at once,
- keeps little for the backward pass: norms and SwiGLU are computed again there, by the kernels
  that compute their gradients,
- adds the gradients of weights to their fp32 buffers (`weight_gradients.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.norm import triton as norm
from megaconsa.kernels.rotary import normed_heads as rotary
from megaconsa.kernels.swiglu import triton as gating
from megaconsa.model.attention import Attention
from megaconsa.model.mlp import MLP
from megaconsa.model.norm import RMSNorm
from megaconsa.model.ranks import Ranks
from megaconsa.model.rope import document_angles
from megaconsa.model.weight_gradients import own_gradient


class Parts(Protocol):
    """The parts of a `qwen3.Block`."""

    self_attn: Attention
    mlp: MLP
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    separate: bool
    ranks: Ranks


def run_block(block: Parts, x: Tensor, documents: Tensor, sequences: Tensor) -> Tensor:
    """As `Block.forward`."""
    attention = block.self_attn
    config = attention.model_config
    cos, sin = document_angles(documents, config.head_dim, config.rope_theta)
    q, k, v, x = _BeforeAttention.apply(
        x,
        block,
        cos,
        sin,
        block.input_layernorm.weight,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.q_norm.weight,
        attention.k_norm.weight,
    )
    pattern = attention.heads.select(attention.layer, sequences)
    attended = hybrid_attention(
        q,
        k,
        v,
        window=pattern.windows,
        gate=pattern.gate,
        documents=documents if block.separate else None,
        backend=attention.backend,
    )
    out: Tensor = _AfterAttention.apply(
        x,
        attended.flatten(2),
        block,
        attention.o_proj.weight,
        block.post_attention_layernorm.weight,
        block.mlp.gate_proj.weight,
        block.mlp.up_proj.weight,
        block.mlp.down_proj.weight,
    )
    return out


class _BeforeAttention(torch.autograd.Function):
    """Norm, projections to heads, norms of queries and keys, rotary embedding.

    Returns q, k, v, and x itself. The gradient that reaches x beside attention comes back through
    the latter, so that the kernel of the norm can add it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Parts,
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
        normed = block.ranks.gathered(norm.rms_norm(x, norm_weight, config.rms_norm_eps))
        rows = normed @ block.self_attn.projections.matrix().T
        rows = rows.unflatten(-1, (-1, config.head_dim))
        heads = config.num_attention_heads
        q, k = rotary.normed_heads(rows, heads, q_norm, k_norm, config.rms_norm_eps, cos, sin)
        v = rows[:, :, heads + config.num_key_value_heads :]
        ctx.block = block
        # Another rank's part of the norm cannot be computed again.
        ctx.save_for_backward(x, rows, cos, sin, normed if block.ranks.size > 1 else None)
        return q, k, v, x.view_as(x)

    @staticmethod
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
        d_normed = block.ranks.summed(d_rows @ projections.matrix())
        norm_weight = block.input_layernorm.weight
        d_x, parts, normed = norm.rms_norm_backward(
            d_normed, x, norm_weight, eps, d_residual.contiguous()
        )
        of_projections = projections.gradients(d_rows, normed if gathered is None else gathered)
        of_heads = head_parts.sum(dim=0)
        return (
            d_x,
            None,
            None,
            None,
            own_gradient(norm_weight, parts.sum(dim=0)),
            *of_projections,
            own_gradient(attention.q_norm.weight, of_heads[0]),
            own_gradient(attention.k_norm.weight, of_heads[1]),
        )


class _AfterAttention(torch.autograd.Function):
    """Output projection, residual addition, norm, MLP, residual addition."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attended: Tensor,
        block: Parts,
        o_proj: Tensor,
        norm_weight: Tensor,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
    ) -> Tensor:
        ranks = block.ranks
        eps = block.self_attn.model_config.rms_norm_eps
        delta = ranks.summed(attended @ o_proj.T)
        x, normed = norm.add_rms_norm(x, delta, norm_weight, eps)
        normed = ranks.gathered(normed)
        gate_up = normed @ block.mlp.gate_up.matrix().T
        out = ranks.summed(gating.swiglu(gate_up) @ down_proj.T)
        ctx.block = block
        ctx.save_for_backward(attended, x, gate_up, normed if ranks.size > 1 else None)
        return out.add_(x)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        block = ctx.block
        ranks = block.ranks
        attended, x, gate_up, gathered = ctx.saved_tensors
        mlp = block.mlp
        attention = block.self_attn
        norm_weight = block.post_attention_layernorm.weight
        d_out = d_out.contiguous()
        d_down = ranks.gathered(d_out)
        d_gated = d_down @ mlp.down.matrix()
        d_gate_up, gated = gating.swiglu_backward(d_gated, gate_up)
        of_down = mlp.down.gradients(d_down, gated)
        d_normed = ranks.summed(d_gate_up @ mlp.gate_up.matrix())
        d_x, parts, normed = norm.rms_norm_backward(
            d_normed, x, norm_weight, attention.model_config.rms_norm_eps, d_out
        )
        of_inputs = mlp.gate_up.gradients(d_gate_up, normed if gathered is None else gathered)
        d_delta = ranks.gathered(d_x)
        d_attended = d_delta @ attention.output.matrix()
        return (
            d_x,
            d_attended,
            None,
            *attention.output.gradients(d_delta, attended),
            own_gradient(norm_weight, parts.sum(dim=0)),
            *of_inputs,
            *of_down,
        )
