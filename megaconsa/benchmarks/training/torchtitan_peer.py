"""torchtitan (Liang et al. 2024, arXiv 2410.06511) as it trains in one process.

It keeps fp32 weights under autocast, and compiles each block and the loss. FSDP2, which would cast
the weights instead, is for several processes only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import maybe_enable_amp
from torchtitan.models.qwen3 import (
    Qwen3Model,
    Qwen3ModelArgs,
    Qwen3StateDictAdapter,
    parallelize_qwen3,
)

from megaconsa.benchmarks.training.peers import PeerModel
from megaconsa.data.stream import Batch
from megaconsa.training.inputs import Inputs


@dataclass(frozen=True)
class _EndOfText:
    """Replaces a tokenizer where torchtitan looks for the ends of documents."""

    eos_id: int


def build(inputs: Inputs, weights: dict[str, Tensor], device: torch.device) -> PeerModel:
    """Builds the model with torchtitan's own functions.

    weights: canonical name -> fp32 tensor.
    """
    training = inputs.config.training
    separate = inputs.config.attention.separate_documents
    arguments = _arguments(inputs)
    job = JobConfig()
    job.training.seq_len = training.sequence_length
    job.compile.enable = True
    job.activation_checkpoint.mode = "full" if training.activation_checkpointing else "none"
    alone = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    with device:
        model = Qwen3Model(arguments)
    model.load_state_dict(Qwen3StateDictAdapter(arguments, None).from_hf(weights))
    model.train()
    model = parallelize_qwen3(model, alone, job)
    cross_entropy = build_cross_entropy_loss(job)
    precision = "bfloat16" if training.in_bf16(device.type) else "float32"
    autocast = maybe_enable_amp(alone, precision, device.type)
    tokenizer = _EndOfText(inputs.data.end_of_text)

    def loss(batch: Batch, labelled: int) -> Tensor:
        masks = model.get_attention_masks(batch.tokens, tokenizer) if separate else None
        with autocast:
            logits = model(batch.tokens, attention_masks=masks)
            total: Tensor = cross_entropy(logits, batch.labels)
        return total / labelled

    return PeerModel(model, loss)


def _arguments(inputs: Inputs) -> Qwen3ModelArgs:
    """The model's shape in torchtitan's terms."""
    shape = inputs.model_config
    separate = inputs.config.attention.separate_documents
    return Qwen3ModelArgs(
        dim=shape.hidden_size,
        n_layers=shape.num_hidden_layers,
        n_heads=shape.num_attention_heads,
        n_kv_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        head_dim=shape.head_dim,
        hidden_dim=shape.intermediate_size,
        norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        enable_weight_tying=shape.tie_word_embeddings,
        max_seq_len=inputs.config.training.sequence_length,
        attn_type="flex" if separate else "sdpa",
        attn_mask_type="block_causal" if separate else "causal",
    )
