"""transformers with the kernels of Liger (Hsu et al. 2024, arXiv 2410.10989)."""

from __future__ import annotations

import torch
from liger_kernel.transformers import apply_liger_kernel_to_qwen3
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from megaconsa.benchmarks.training.peers import PeerModel
from megaconsa.data.stream import Batch
from megaconsa.huggingface.parameter_names import qwen3_config_fields
from megaconsa.training.inputs import Inputs


def build(inputs: Inputs, weights: dict[str, Tensor], device: torch.device) -> PeerModel:
    """Builds the model in the precision of training, without fp32 master weights.

    weights: canonical name -> fp32 tensor.
    """
    # It replaces classes of transformers, so it must come before the model.
    apply_liger_kernel_to_qwen3()
    training = inputs.config.training
    config = Qwen3Config(**qwen3_config_fields(inputs.model_config) | {"use_cache": False})
    dtype = torch.bfloat16 if training.in_bf16(device.type) else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    if training.activation_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()

    def loss(batch: Batch, labelled: int) -> Tensor:
        outputs = model(
            input_ids=batch.tokens,
            # Without a mask of ones, some releases of transformers give SDPA a mask of
            # (B, 1, S, S). Its fused causal kernels take none.
            attention_mask=torch.ones_like(batch.tokens),
            shift_labels=batch.labels,
            num_items_in_batch=labelled,
        )
        result: Tensor = outputs.loss
        return result

    return PeerModel(model, loss)
