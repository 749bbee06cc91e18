"""The module and the engine of each pipeline schedule.

This file imports DeepSpeed at its head, so import it only after the mesh exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed

from megaconsa.config import PipelineSchedule
from megaconsa.parallel.deepspeed.interleaved_engine import (
    InterleavedEngine,
    InterleavedModule,
    NeighbourGroups,
)
from megaconsa.parallel.deepspeed.pipeline_modules import CostCutModule, DualPipeCostCutModule
from megaconsa.parallel.mesh import Mesh

MODULES: dict[PipelineSchedule, type[CostCutModule]] = {
    "1f1b": CostCutModule,
    "dualpipev": DualPipeCostCutModule,
    "interleaved": InterleavedModule,
}


def build_engine(
    module: CostCutModule, optimizer: Any, settings: Mapping[str, Any], mesh: Mesh
) -> Any:
    """DeepSpeed's engine for a module of MODULES.

    settings: the dictionary that deepspeed.initialize takes.
    """
    if isinstance(module, InterleavedModule):
        return InterleavedEngine(module, optimizer, settings, NeighbourGroups.of(mesh))
    return deepspeed.initialize(model=module, optimizer=optimizer, config=dict(settings))[0]
