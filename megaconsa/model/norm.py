"""Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalises the last dimension. Its statistics are in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            # Imported here, because machines without a GPU may lack Triton.
            from megaconsa.model import fused_norm

            if fused_norm.serves(x):
                return fused_norm.run_norm(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
