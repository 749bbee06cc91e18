"""The model as a list of pipeline layers, and the way from their parameters' names to canonical ones.

What travels between layers is a tuple, the carry: hidden states first (tokens before the embedding), then integers only, because
a pipeline stage gets nothing else: labels, documents, sequences and the loss's normaliser.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megaconsa.model.attention import HeadSelector
from megaconsa.model.config import ModelConfig
from megaconsa.model.loss import summed_cross_entropy
from megaconsa.model.norm import RMSNorm
from megaconsa.model.qwen3 import Block

Carry = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""(hidden (B, S, hidden) or tokens (B, S); labels (B, S); documents (B, S); sequences (B,); normaliser (2,))"""


class EmbeddingLayer(nn.Embedding):
    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        return super().forward(carry[0]), *carry[1:]


class BlockLayer(Block):
    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        hidden, labels, documents, sequences, normalizer = carry
        return super().forward(hidden, documents, sequences), labels, documents, sequences, normalizer


class NormLayer(RMSNorm):
    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        return super().forward(carry[0]), *carry[1:]


class HeadLayer(nn.Linear):
    def forward(self, carry: Carry) -> Tensor:  # type: ignore[override]
        return head_loss(self, carry)


def head_loss(head: nn.Module, carry: Carry) -> Tensor:
    """Cross-entropy of a micro-batch, scaled so that DeepSpeed's mean over micro-batches is the mean over all labelled tokens.

    It is the last layer, not the pipeline's loss function: DeepSpeed's BF16 optimizer drops the gradients of parameters that are
    used outside the engine's forward pass, silently.
    """
    hidden, labels, _, _, normalizer = carry
    labelled_tokens, micro_batches = normalizer.unbind()
    assert isinstance(head.weight, Tensor)
    return summed_cross_entropy(hidden, head.weight, labels) * (micro_batches / labelled_tokens)


def normalizer(labelled_tokens: int, micro_batches: int) -> Tensor:
    """The carry's last part: labelled tokens and micro-batches of the whole global batch, (2,) int64."""
    return torch.tensor([labelled_tokens, micro_batches])


def layer_specs(config: ModelConfig, heads: HeadSelector, backend: str, separate_documents: bool) -> list[Any]:
    """Embedding, blocks, final norm, head with loss."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    embedding = (EmbeddingLayer, config.vocab_size, config.hidden_size)
    blocks = [
        LayerSpec(BlockLayer, config, layer, heads, backend, separate_documents) for layer in range(config.num_hidden_layers)
    ]
    norm = LayerSpec(NormLayer, config.hidden_size, config.rms_norm_eps)
    if config.tie_word_embeddings:
        tied = partial(TiedLayerSpec, "embed_tokens", *embedding)
        return [tied(), *blocks, norm, tied(forward_fn=head_loss)]
    return [LayerSpec(*embedding), *blocks, norm, LayerSpec(HeadLayer, config.hidden_size, config.vocab_size, bias=False)]


def canonical_name(name: str, num_layers: int) -> str:
    """`3.self_attn.q_proj.weight` of the pipeline is `model.layers.2.self_attn.q_proj.weight` everywhere else."""
    if name.startswith("tied_modules.embed_tokens."):
        return "model.embed_tokens.weight"
    index, _, rest = name.partition(".")
    position = int(index)
    if position == 0:
        return f"model.embed_tokens.{rest}"
    if position <= num_layers:
        return f"model.layers.{position - 1}.{rest}"
    return f"model.norm.{rest}" if position == num_layers + 1 else f"lm_head.{rest}"
