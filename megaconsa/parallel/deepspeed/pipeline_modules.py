"""The model as DeepSpeed's pipeline module, with stages cut by cost.

This file imports DeepSpeed at its head, so import it only after the mesh exists.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor

from megaconsa.consa.head_selector import HeadSelector
from megaconsa.parallel.context_parallel import ContextParallel
from megaconsa.parallel.next_tokens import NextTokens
from megaconsa.parallel.pipeline import (
    BlockLayer,
    EmbeddingLayer,
    LMHeadLayer,
    NormLayer,
    RecomputedBlockLayer,
    head_loss,
)
from megaconsa.parallel.recomputation import Recomputation
from megaconsa.parallel.sharding import Sharding
from megaconsa.parallel.tensor_parallel import TensorParallel


class CostCutModule(PipelineModule):
    """One stage per rank, for the 1F1B schedule.

    bounds: the first layer of each stage, and the end of the last.
    """

    def __init__(self, *args: Any, bounds: list[int], **settings: Any) -> None:
        self.bounds = bounds
        super().__init__(*args, **settings)
        self.tensor_sums: list[tuple[Tensor, Any]] = []
        """Weights whose gradients are parts of a sum over a group of ranks."""

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.bounds
        self._set_bounds(self.bounds[self.stage_id], self.bounds[self.stage_id + 1])

    def _synchronize_tied_weights(self) -> None:
        # Without no_grad, torch warns on every rank that autograd does not know this broadcast.
        with torch.no_grad():
            super()._synchronize_tied_weights()

    def tied_over_stages(self) -> list[Tensor]:
        """Weights that other stages hold too."""
        found = super().get_tied_weights_and_groups()
        return [weight for weight, group in found if torch.distributed.get_world_size(group) > 1]

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """Tensors that DeepSpeed sums once per step, each with its group.

        They are the tied weights and the `tensor_sums`.
        """
        return [*super().get_tied_weights_and_groups(), *self.tensor_sums]


class DualPipeCostCutModule(DualPipeVModule, CostCutModule):
    """Two stages per rank, for the DualPipeV schedule."""


def layer_specs(
    sharding: Sharding,
    tp: TensorParallel,
    cp: ContextParallel,
    heads: HeadSelector,
    backend: str,
    separate_documents: bool,
    recomputed: Recomputation = Recomputation(),
    next_tokens: NextTokens | None = None,
) -> list[Any]:
    """The pipeline's layers: embedding, blocks, final norm, head with loss.

    next_tokens: where the head notes them, if they are ever asked for.
    """
    config = sharding.model_config
    blocks = [
        LayerSpec(
            RecomputedBlockLayer if layer in recomputed.whole else BlockLayer,
            sharding,
            layer,
            heads,
            backend,
            separate_documents,
            tp,
            cp,
            layer in recomputed.heads,
        )
        for layer in range(config.num_hidden_layers)
    ]
    norm = LayerSpec(NormLayer, config.hidden_size, config.rms_norm_eps)
    if config.tie_word_embeddings:
        tied = partial(TiedLayerSpec, "embed_tokens", EmbeddingLayer, config, tp)
        head = partial(head_loss, vocab_size=config.vocab_size, tp=tp, next_tokens=next_tokens)
        return [tied(), *blocks, norm, tied(forward_fn=head)]
    return [
        LayerSpec(EmbeddingLayer, config, tp),
        *blocks,
        norm,
        LayerSpec(LMHeadLayer, config, tp, next_tokens),
    ]
