"""Makes the plans that the tests of the command plan check."""

from __future__ import annotations

from pathlib import Path

from megaconsa import config
from megaconsa.planning.plan import Plan, make_plan
from megaconsa.planning.table import plan_table
from megaconsa.tables import text_lines

SETTINGS = """
run: {dir: run}
model: {preset: qwen3-0.6b}
attention: {window: 1024}
allocation: {source: learn, sparsity: 0.5}
training:
  steps: 1000
  micro_batch: 4
  global_batch: 64
  sequence_length: 8192
  learning_rate: 1.0e-3
data: {path: data}
"""


def planned(
    settings: Path, *overrides: str, gpus: int = 1, device: str = "h100", mfu: float | None = 0.4
) -> Plan:
    """Makes a plan from a configuration file and overrides."""
    return make_plan(config.load(settings, list(overrides)), gpus, device, mfu)


def shown(plan: Plan) -> str:
    """Returns the table of a plan as a pipe gets it."""
    return "\n".join(line for _, line in text_lines(plan_table(plan), None))
