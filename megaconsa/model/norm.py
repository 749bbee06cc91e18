"""Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaconsa.model import kernel_use


class RMSNorm(nn.Module):
    """Normalises the last dimension. Its statistics are in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if kernel_use.kernels_serve(x):
            # Imported here, because machines without a GPU may lack Triton.
            from megaconsa.model.fused_norm import run_norm

            return run_norm(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
