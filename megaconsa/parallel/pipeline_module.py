"""DeepSpeed's pipeline modules with stages cut by cost. Imports DeepSpeed, so it is itself imported once the mesh stands."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import DualPipeVModule, PipelineModule
from torch import Tensor


class CostCutModule(PipelineModule):
    """One stage a rank, for the 1F1B schedule. bounds: the first layer of each stage, and the end of the last."""

    def __init__(self, *args: Any, bounds: list[int], **settings: Any) -> None:
        self.bounds = bounds
        super().__init__(*args, **settings)
        self.tensor_sums: list[tuple[Tensor, Any]] = []
        """Weights whose gradients are parts of a sum over a group of ranks."""

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.bounds
        self._set_bounds(self.bounds[self.stage_id], self.bounds[self.stage_id + 1])

    def _synchronize_tied_weights(self) -> None:
        with (
            torch.no_grad()
        ):  # otherwise torch warns, on every rank, of a broadcast that autograd does not know
            super()._synchronize_tied_weights()

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """What DeepSpeed sums once a step, over which ranks: tied weights over their stages, and the `tensor_sums`."""
        return [*super().get_tied_weights_and_groups(), *self.tensor_sums]


class DualPipeCostCutModule(DualPipeVModule, CostCutModule):
    """Two stages a rank, for the DualPipeV schedule."""
