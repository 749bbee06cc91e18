"""The model as a list of pipeline layers, and the canonical names of their parameters.

A tuple, the carry, travels between layers: hidden states (tokens before the embedding), labels,
documents, sequences, and the loss's normalizer. All but the first are integers. A pipeline stage
receives nothing else.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megaconsa.consa.head_selector import HeadSelector
from megaconsa.model import loss
from megaconsa.model.config import ModelConfig
from megaconsa.model.norm import RMSNorm
from megaconsa.model.qwen3 import Block
from megaconsa.parallel import vocabulary
from megaconsa.parallel.context_parallel import ContextParallel
from megaconsa.parallel.next_tokens import NextTokens
from megaconsa.parallel.sharding import OwnHeads, Sharding
from megaconsa.parallel.tensor_parallel import TensorParallel
from megaconsa.parallel.topology import vocabulary_rows

Carry = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""What travels between layers:

- hidden states (B, S, hidden), or tokens (B, S) before the embedding
- labels (B, S)
- documents (B, S)
- sequences (B,)
- normalizer (2,)

With context parallelism the first two hold this rank's tokens, and documents all tokens.
"""


class EmbeddingLayer(nn.Embedding):
    def __init__(self, model_config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__(
            vocabulary_rows(model_config.vocab_size, tp.size), model_config.hidden_size
        )
        self.tp = tp

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        return self.tp.leave(vocabulary.lookup(carry[0], self.weight, self.tp)), *carry[1:]


class BlockLayer(Block):
    """A block with this rank's heads and columns, and the collectives around them."""

    def __init__(
        self,
        sharding: Sharding,
        layer: int,
        heads: HeadSelector,
        backend: str,
        separate: bool,
        tp: TensorParallel,
        cp: ContextParallel = ContextParallel(),
        recomputes_heads: bool = False,
    ) -> None:
        super().__init__(
            sharding.local_config(), layer, OwnHeads(heads, sharding), backend, separate
        )
        self.recomputes_heads = recomputes_heads
        self.tp = tp
        self.group = tp
        if cp.size > 1:
            self.self_attn.context = cp

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        hidden, labels, documents, sequences, normalizer = carry
        return (
            super().forward(hidden, documents, sequences),
            labels,
            documents,
            sequences,
            normalizer,
        )

    def attend(self, x: Tensor, documents: Tensor, sequences: Tensor) -> Tensor:
        return self.tp.leave(super().attend(self.tp.enter(x), documents, sequences))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.tp.leave(super().feed_forward(self.tp.enter(x)))


class RecomputedBlockLayer(BlockLayer):
    """A block whose activations are recomputed in the backward pass. DeepSpeed goes by the name of
    the class."""


class NormLayer(RMSNorm):
    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        return super().forward(carry[0]), *carry[1:]


class LMHeadLayer(nn.Linear):
    def __init__(
        self,
        model_config: ModelConfig,
        tp: TensorParallel,
        next_tokens: NextTokens | None = None,
    ) -> None:
        super().__init__(
            model_config.hidden_size, vocabulary_rows(model_config.vocab_size, tp.size), bias=False
        )
        self.loss = partial(
            head_loss, vocab_size=model_config.vocab_size, tp=tp, next_tokens=next_tokens
        )

    def forward(self, carry: Carry) -> Tensor:  # type: ignore[override]
        return self.loss(self, carry)


def head_loss(
    head: nn.Module,
    carry: Carry,
    vocab_size: int,
    tp: TensorParallel,
    next_tokens: NextTokens | None = None,
) -> Tensor:
    """Cross-entropy of a micro-batch.

    It is scaled so that DeepSpeed's mean over micro-batches is the mean over all labelled tokens.
    While `next_tokens` are wanted, they are noted instead, and the loss is 0.

    It is the last layer instead of the pipeline's loss function: DeepSpeed's BF16 optimizer
    silently drops the gradients of parameters that are used outside the engine's forward pass.
    """
    hidden, labels, _, sequences, normalizer = carry
    labelled_tokens, micro_batches = normalizer.unbind()
    assert isinstance(head.weight, Tensor)
    part = vocabulary.part(head.weight, tp, vocab_size)
    if next_tokens is not None and next_tokens.wanted:
        return next_tokens.find(tp.enter(hidden), head.weight, labels, sequences, part)
    total = loss.summed_cross_entropy(tp.enter(hidden), head.weight, labels, part)
    return total * (micro_batches / labelled_tokens)


def normalizer(labelled_tokens: int, micro_batches: int) -> Tensor:
    """Labelled tokens and micro-batches of the global batch, (2,) int64. The carry's last part."""
    return torch.tensor([labelled_tokens, micro_batches])


def canonical_name(name: str, num_layers: int) -> str:
    """The name of a pipeline parameter everywhere else.

    Example: `3.self_attn.q_proj.weight` becomes `model.layers.2.self_attn.q_proj.weight`.
    """
    if name.startswith("tied_modules.embed_tokens."):
        return "model.embed_tokens.weight"
    index, _, rest = name.partition(".")
    position = int(index)
    if position == 0:
        return f"model.embed_tokens.{rest}"
    if position <= num_layers:
        return f"model.layers.{position - 1}.{rest}"
    return f"model.norm.{rest}" if position == num_layers + 1 else f"lm_head.{rest}"


def layer_index(name: str, num_layers: int) -> int:
    """The pipeline layer of a canonical weight. A tied embedding is at its first place."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) + 1
    return {
        "model.embed_tokens.weight": 0,
        "model.norm.weight": num_layers + 1,
        "lm_head.weight": num_layers + 2,
    }[name]
