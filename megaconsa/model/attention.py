"""Grouped-query attention. Each KV head is full, sliding-window, or gated between the two."""

from __future__ import annotations

from torch import Tensor, nn

from megaconsa.consa.head_selector import HeadSelector
from megaconsa.kernels.rotary.rotary import rotate
from megaconsa.model.config import ModelConfig
from megaconsa.model.context_group import ContextGroup, WholeSequence
from megaconsa.model.norm import RMSNorm
from megaconsa.model.rope import document_angles
from megaconsa.model.weight_gradients import Stack


class Attention(nn.Module):
    """The attention of one layer, with Qwen3's norms of queries and keys."""

    def __init__(
        self, model_config: ModelConfig, layer: int, heads: HeadSelector, backend: str
    ) -> None:
        super().__init__()
        self.model_config = model_config
        self.layer = layer
        self.heads = heads
        self.backend = backend
        self.context: ContextGroup = WholeSequence()
        """The ranks that sequences are divided over."""
        hidden = model_config.hidden_size
        dim = model_config.head_dim
        self.q_proj = nn.Linear(hidden, model_config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, model_config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, model_config.num_key_value_heads * dim, bias=False)
        self.projections = Stack(self, "q_proj", "k_proj", "v_proj")
        self.o_proj = nn.Linear(model_config.num_attention_heads * dim, hidden, bias=False)
        self.output = Stack(self, "o_proj")
        self.q_norm = RMSNorm(dim, model_config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, model_config.rms_norm_eps)

    def forward(self, x: Tensor, documents: Tensor, sequences: Tensor, *, separate: bool) -> Tensor:
        """Attends within each sequence.

        x: (B, S, hidden), or this rank's tokens if a context group divides sequences.
        documents: (B, S) int32, index at which each position's document starts. Positions restart
            there. They are those of the whole sequence.
        separate: whether attention stays within a document.
        sequences: (B,) int64, indices within the step's global batch.

        Returns a tensor of the shape of x.
        """
        shape = (*x.shape[:2], -1, self.model_config.head_dim)
        cos, sin = document_angles(
            documents, self.model_config.head_dim, self.model_config.rope_theta, self.context
        )
        q = rotate(self.q_norm(self.q_proj(x).view(shape)), cos, sin)  # (B, S, heads, head_dim)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)), cos, sin)  # (B, S, kv_heads, head_dim)
        v = self.v_proj(x).view(shape)
        pattern = self.heads.select(self.layer, sequences)
        seen = documents if separate else None
        out = self.context.attend(q, k, v, pattern, seen, self.backend)
        return self.o_proj(out.flatten(2))
