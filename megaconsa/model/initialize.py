"""Fresh weights: each parameter a function of the seed and its own name, so that no topology changes them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megaconsa.model.config import ModelConfig


def initial_weight(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """fp32 weights of a canonical parameter: ones for norms, else normal with the configured deviation."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)
