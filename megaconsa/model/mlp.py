"""The MLP of a block."""

from __future__ import annotations

from torch import Tensor, nn

from megaconsa.model.config import ModelConfig
from megaconsa.model.weight_gradients import Stack


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(
            model_config.hidden_size, model_config.intermediate_size, bias=False
        )
        self.up_proj = nn.Linear(
            model_config.hidden_size, model_config.intermediate_size, bias=False
        )
        self.down_proj = nn.Linear(
            model_config.intermediate_size, model_config.hidden_size, bias=False
        )
        self.gate_up = Stack(self, "gate_proj", "up_proj")
        self.down = Stack(self, "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
