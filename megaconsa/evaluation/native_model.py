"""A checkpoint's model in one process. Its attention units can be switched between two passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from megaconsa.checkpoint.store import Checkpoint
from megaconsa.consa.constraint import Constraint
from megaconsa.consa.scores import UnitSelector
from megaconsa.data.stream import Batch, BatchStream
from megaconsa.kernels.rotary.rotary import rotate
from megaconsa.model.loss import IGNORED, summed_cross_entropy
from megaconsa.model.qwen3 import Block, Qwen3
from megaconsa.model.rope import rotary_angles


@dataclass(frozen=True)
class Sample:
    """The first batches of a shuffled stream, on the model's device."""

    stream: BatchStream
    batches: int
    device: torch.device

    @property
    def sequences(self) -> int:
        return self.batches * self.stream.micro_batch

    def __iter__(self) -> Iterator[Batch]:
        for (batch,) in islice(self.stream.steps(), self.batches):
            yield Batch(
                tokens=batch.tokens.to(self.device),
                labels=batch.labels.to(self.device),
                documents=batch.documents.to(self.device),
                sequences=batch.sequences.to(self.device),
            )


class NativeModel:
    """The model with frozen weights, and a switch for its units. All units are full at first.

    It computes in bf16 on a GPU and in fp32 on a CPU, with `attention.backend=auto`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        units: Constraint,
        window: int,
        separate_documents: bool,
        device: torch.device,
    ) -> None:
        """units: says which units exist. Its target is not used."""
        model_config = checkpoint.model_config
        self.device = device
        self.layers = units.num_layers
        self.units = units.units_per_layer
        self.selector = UnitSelector(self.table(True), window, model_config.num_key_value_heads)
        with device:
            model = Qwen3(model_config, self.selector, "auto", separate_documents)
        weights = checkpoint.weights()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = model.to(dtype).requires_grad_(False)

    def table(self, full: bool) -> Tensor:
        """Returns a table in which all units are alike: (layers, units) booleans on the CPU."""
        return torch.full((self.layers, self.units), full)

    def use(self, units: Tensor) -> None:
        """Sets a table or gates for the passes that follow. UnitSelector describes both."""
        self.selector.units = units

    def embed(self, batch: Batch) -> Tensor:
        """Returns the input of layer 0, (B, S, hidden)."""
        hidden: Tensor = self.model.model.embed_tokens(batch.tokens)
        return hidden

    def block(self, layer: int, x: Tensor, batch: Batch) -> Tensor:
        """Returns the output of a layer for its input x, both (B, S, hidden)."""
        output: Tensor = self.model.model.layers[layer](x, batch.documents, batch.sequences)
        return output

    def final(self, x: Tensor, batch: Batch, first: int = 0) -> Tensor:
        """Returns the input of the output head, given the input x of layer `first`.

        Both are (B, S, hidden).
        """
        for layer in range(first, self.layers):
            x = self.block(layer, x, batch)
        normed: Tensor = self.model.model.norm(x)
        return normed

    def mean_loss(self, batch: Batch) -> Tensor:
        """Returns the loss in nats per predicted token of the batch, fp32, with its graph."""
        hidden = self.final(self.embed(batch), batch)
        total = summed_cross_entropy(hidden, self.model.lm_head.weight, batch.labels)
        return total / predicted_tokens(batch).sum()

    @torch.no_grad()
    def sequence_losses(self, x: Tensor, batch: Batch, first: int) -> Tensor:
        """Returns the summed loss of each sequence in nats, (B,) fp64.

        x: the input of layer `first`, (B, S, hidden).
        """
        hidden = self.final(x, batch, first)
        weight = self.model.lm_head.weight
        losses = []
        for row, labels in zip(hidden, batch.labels, strict=True):
            losses.append(summed_cross_entropy(row, weight, labels))
        return torch.stack(losses).double()

    def queries_and_keys(self, layer: int, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the queries and keys of a layer with RoPE, (B, S, heads, D) each.

        x: the input of the layer, (B, S, hidden).
        """
        block = self.model.model.layers[layer]
        assert isinstance(block, Block)
        attention = block.self_attn
        model_config = attention.model_config
        normed = block.input_layernorm(x)
        positions = torch.arange(x.shape[1], device=x.device) - batch.documents
        cos, sin = rotary_angles(positions, model_config.head_dim, model_config.rope_theta)
        by_head = (*x.shape[:2], -1, model_config.head_dim)
        q = attention.q_norm(attention.q_proj(normed).view(by_head))
        k = attention.k_norm(attention.k_proj(normed).view(by_head))
        return rotate(q, cos, sin), rotate(k, cos, sin)


def predicted_tokens(batch: Batch) -> Tensor:
    """Returns the number of labelled positions of each sequence, (B,)."""
    return (batch.labels != IGNORED).sum(dim=1)
