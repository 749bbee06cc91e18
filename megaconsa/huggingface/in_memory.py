"""A checkpoint's weights as a model of transformers, without writing an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.huggingface.export import exported_config, exported_weight
from megaconsa.huggingface.load import without_progress_bar
from megaconsa.huggingface.modeling_megaconsa import (
    MegaconsaConfig,
    MegaconsaForCausalLM,
    native_rope,
    rope_parameters,
)
from megaconsa.huggingface.parameter_names import parameter_shapes
from megaconsa.model.config import ModelConfig


@torch.no_grad()
def build_model(
    weights: Mapping[str, Tensor],
    model_config: ModelConfig,
    allocation: Allocation,
    dtype: torch.dtype,
) -> Any:
    """Returns the model that an export of these weights would load as, on the CPU.

    weights: canonical name -> unsharded fp32 tensor, heads in original order.
    allocation: in the same head order.

    Raises InputError for a window of 1, which transformers' cache cannot hold.
    """
    if allocation.sparsity > 0 and allocation.window < 2:
        raise InputError(
            f"attention.window={allocation.window} cannot generate text: "
            "transformers' sliding cache needs 2 or more"
        )
    fields = exported_config(model_config, allocation, dtype, {})
    stock = allocation.is_layer_wise
    config = (Qwen3Config if stock else MegaconsaConfig).from_dict(fields)
    # transformers 4 and 5 spell the rotary base differently.
    for name, value in native_rope(rope_parameters(fields)).items():
        setattr(config, name, value)
    state = {
        name: exported_weight(name, weights, model_config, allocation, dtype)
        for name in parameter_shapes(model_config)
    }
    kind = Qwen3ForCausalLM if stock else MegaconsaForCausalLM
    with without_progress_bar():
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model.eval()
