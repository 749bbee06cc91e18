"""Grouped-query attention whose KV heads are full, sliding-window, or gated between the two."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.rotary.rotary import rotate
from megaconsa.model.config import ModelConfig
from megaconsa.model.norm import RMSNorm
from megaconsa.model.rope import rotary_angles


class HeadSelector(Protocol):
    """What tells a layer the kind of its heads: an Allocation (a finished table) or a GateBank (while learning)."""

    def select(
        self, layer: int, sequences: Tensor
    ) -> tuple[int | tuple[int, ...], Tensor | None]: ...


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, heads: HeadSelector, backend: str) -> None:
        super().__init__()
        self.config, self.layer, self.heads, self.backend = config, layer, heads, backend
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, documents: Tensor | None, sequences: Tensor
    ) -> Tensor:
        """x: (B, S, hidden); positions and documents: (B, S); sequences: (B,)."""
        shape = (*x.shape[:2], -1, self.config.head_dim)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)), cos, sin)  # (B, S, heads, head_dim)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)), cos, sin)  # (B, S, kv_heads, head_dim)
        v = self.v_proj(x).view(shape)
        window, gate = self.heads.select(self.layer, sequences)
        out = hybrid_attention(
            q, k, v, window=window, gate=gate, documents=documents, backend=self.backend
        )
        return self.o_proj(out.flatten(2))
