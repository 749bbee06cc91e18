"""A Qwen3-like decoder. Module and parameter names are those of transformers' Qwen3, which are megaconsa's canonical names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaconsa.model.attention import Attention, HeadSelector
from megaconsa.model.config import ModelConfig
from megaconsa.model.norm import RMSNorm


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        heads: HeadSelector,
        backend: str = "auto",
        separate: bool = True,
    ) -> None:
        super().__init__()
        self.separate = separate
        self.self_attn = Attention(config, layer, heads, backend)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, documents: Tensor, sequences: Tensor) -> Tensor:
        """x: (B, S, hidden). documents: (B, S) int32, index at which each position's document starts; sequences: (B,) int64."""
        # A document's start is its id and its origin at once: positions restart with each document.
        positions = torch.arange(documents.shape[1], device=documents.device) - documents
        x = x + self.attend(
            self.input_layernorm(x), positions, documents if self.separate else None, sequences
        )
        return x + self.feed_forward(self.post_attention_layernorm(x))

    def attend(
        self, x: Tensor, positions: Tensor, documents: Tensor | None, sequences: Tensor
    ) -> Tensor:
        return self.self_attn(x, positions, documents, sequences)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Decoder(nn.Module):
    def __init__(
        self, config: ModelConfig, heads: HeadSelector, backend: str, separate: bool
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, heads, backend, separate)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """The whole model in one process: what the parallel engine must equal, and what evaluation on one device uses."""

    def __init__(
        self, config: ModelConfig, heads: HeadSelector, backend: str = "auto", separate: bool = True
    ) -> None:
        super().__init__()
        self.model = Decoder(config, heads, backend, separate)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, sequences: Tensor | None = None
    ) -> Tensor:
        """tokens: (B, S) integers. Returns logits (B, S, vocab_size). Without documents each row is one document."""
        documents = torch.zeros_like(tokens, dtype=torch.int32) if documents is None else documents
        sequences = (
            torch.arange(tokens.shape[0], device=tokens.device) if sequences is None else sequences
        )
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, documents, sequences)
        return self.lm_head(self.model.norm(x))


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every weight's canonical name and shape; a tied output head has none of its own."""
    with torch.device("meta"):
        model = Qwen3(config, _NoHeads())
    return {name: weight.shape for name, weight in model.named_parameters()}


class _NoHeads:
    """In place of an allocation where nothing is computed."""

    def select(self, layer: int, sequences: Tensor) -> tuple[int | tuple[int, ...], Tensor | None]:
        raise NotImplementedError
