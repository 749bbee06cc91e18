"""A tiny model and a slow reference for its logits.

The reference is the stock Qwen3 of transformers, in the original head order, with an explicit mask
per query head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megaconsa.consa.allocation import Allocation
from megaconsa.huggingface.parameter_names import parameter_shapes, qwen3_config_fields
from megaconsa.model.config import PRESETS, ModelConfig

WINDOW = 8
MODEL = replace(PRESETS["tiny"], vocab_size=256, rope_theta=50_000.0, rms_norm_eps=1e-5)
HEAD_WISE = Allocation(
    window=WINDOW,
    full=(
        (False, True, False, True),
        (True, True, True, True),
        (False, False, False, False),
        (True, False, False, True),
    ),
    origin={"rule": "test"},
)
LAYER_WISE = replace(
    HEAD_WISE,
    full=((False,) * 4, (True,) * 4, (False,) * 4, (True,) * 4),
    granularity="layer",
    scope="global",
)
DENSE = replace(HEAD_WISE, full=((True,) * 4,) * 4)


def random_weights(model_config: ModelConfig) -> dict[str, Tensor]:
    """Random weights whose attention is sharp.

    A key too many or too few changes the logits visibly.
    """
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in parameter_shapes(model_config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            weights[name] = noise / shape[1] ** 0.5
        else:
            weights[name] = (2.0 if "self_attn" in name else 1.0) + 0.3 * noise
    return weights


def stock(weights: dict[str, Tensor], model_config: ModelConfig, **fields: Any) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        **(qwen3_config_fields(model_config) | fields), attn_implementation="eager"
    )
    qwen3 = Qwen3ForCausalLM(config).eval()
    missing, unexpected = qwen3.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    qwen3.tie_weights()
    return qwen3


@torch.no_grad()
def masked_logits(
    weights: dict[str, Tensor], model_config: ModelConfig, allocation: Allocation, tokens: Tensor
) -> Tensor:
    """Computes logits with an explicit mask.

    Key j is visible to query i iff 0 <= i - j < the window of the head.

    tokens: (B, S) int64.
    Returns (B, S, V) fp32.
    """
    qwen3 = stock(weights, model_config)
    length = tokens.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for index, layer in enumerate(qwen3.model.layers):
        windows = torch.tensor(allocation.windows(index)).repeat_interleave(
            model_config.queries_per_kv_head
        )[:, None, None]
        visible = (distance >= 0) & (distance < windows)
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None]
        layer.self_attn.register_forward_pre_hook(_with_mask(mask), with_kwargs=True)
    return qwen3(tokens, use_cache=False).logits


def _with_mask(mask: Tensor) -> Any:
    return lambda module, arguments, keywords: (arguments, keywords | {"attention_mask": mask})
