"""A Qwen3-like decoder.

Module and parameter names are those of transformers' Qwen3. They are megaconsa's canonical names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaconsa.consa.head_selector import HeadSelector
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.model import kernel_use
from megaconsa.model.attention import Attention
from megaconsa.model.config import ModelConfig
from megaconsa.model.mlp import MLP
from megaconsa.model.norm import RMSNorm
from megaconsa.model.tensor_group import NoGroup, TensorGroup


class Block(nn.Module):
    """One pre-norm decoder layer.

    separate: whether attention stays within a document.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        layer: int,
        heads: HeadSelector,
        backend: str = "auto",
        separate: bool = True,
    ) -> None:
        super().__init__()
        self.separate = separate
        self.recomputes_heads = False
        """Whether q and k are computed again in the backward pass, where blocks run by the kernels
        of a GPU. Plain torch keeps them, and all that they were computed from."""
        self.group: TensorGroup = NoGroup()
        """The ranks that the block is divided over."""
        self.self_attn = Attention(model_config, layer, heads, backend)
        self.mlp = MLP(model_config)
        self.input_layernorm = RMSNorm(model_config.hidden_size, model_config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(model_config.hidden_size, model_config.rms_norm_eps)

    def forward(self, x: Tensor, documents: Tensor, sequences: Tensor) -> Tensor:
        """Runs the layer on the residual stream.

        x: (B, S, hidden).
        documents: (B, S) int32, index at which each position's document starts.
        sequences: (B,) int64, indices within the step's global batch.

        Returns (B, S, hidden).
        """
        if kernel_use.kernels_serve(x):
            # Imported here, because machines without a GPU may lack Triton.
            from megaconsa.model.fused_block import run_block

            return run_block(self, x, documents, sequences)
        normed = self.input_layernorm(x)
        x = x + self.attend(normed, documents, sequences)
        return x + self.feed_forward(self.post_attention_layernorm(x))

    def attend(self, x: Tensor, documents: Tensor, sequences: Tensor) -> Tensor:
        """The attention's contribution to the residual stream."""
        return self.self_attn(x, documents, sequences, separate=self.separate)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP's contribution to the residual stream."""
        return self.mlp(x)


class Decoder(nn.Module):
    """The parameters below the output head. `Qwen3.forward` runs them."""

    def __init__(
        self, model_config: ModelConfig, heads: HeadSelector, backend: str, separate: bool
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(model_config.vocab_size, model_config.hidden_size)
        self.layers = nn.ModuleList(
            Block(model_config, layer, heads, backend, separate)
            for layer in range(model_config.num_hidden_layers)
        )
        self.norm = RMSNorm(model_config.hidden_size, model_config.rms_norm_eps)


class Qwen3(nn.Module):
    """The whole model in one process.

    It is the reference for the parallel engine. Evaluation on one device uses it too.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        heads: HeadSelector,
        backend: str = "auto",
        separate: bool = True,
    ) -> None:
        super().__init__()
        self.model = Decoder(model_config, heads, backend, separate)
        self.lm_head = nn.Linear(model_config.hidden_size, model_config.vocab_size, bias=False)
        if model_config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, sequences: Tensor | None = None
    ) -> Tensor:
        """Runs the whole model.

        tokens: (B, S) integers.
        documents: (B, S) int32, index at which each position's document starts. None makes each row
            one document.
        sequences: (B,) int64, indices within the step's global batch. None numbers the rows.

        Returns logits (B, S, vocab_size).
        """
        if documents is None:
            documents = torch.zeros_like(tokens, dtype=torch.int32)
        if sequences is None:
            sequences = torch.arange(tokens.shape[0], device=tokens.device)
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, documents, sequences)
        return self.lm_head(self.model.norm(x))


def weight_shapes(model_config: ModelConfig) -> dict[str, torch.Size]:
    """Canonical name and shape of every weight. A tied output head is not listed separately."""
    with torch.device("meta"):
        model = Qwen3(model_config, _NoHeads())
    return {name: weight.shape for name, weight in model.named_parameters()}


class _NoHeads:
    """Replaces an allocation where nothing is computed."""

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        raise NotImplementedError
