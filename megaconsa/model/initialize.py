"""Initial weights: each is a function of the seed and the parameter's name alone.

The topology of a run therefore does not change them.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megaconsa.model.config import ModelConfig


def initial_weight(name: str, shape: torch.Size, model_config: ModelConfig, seed: int) -> Tensor:
    """fp32 weights of a parameter: ones for norms, otherwise normal.

    name: the canonical name. The standard deviation is `config.initializer_range`.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # 63 bits of the digest.
    parameter_seed = int.from_bytes(digest[:8], "little") >> 1
    generator = torch.Generator().manual_seed(parameter_seed)
    return torch.empty(shape).normal_(0.0, model_config.initializer_range, generator=generator)
