"""What a plan assumes where nothing is known yet."""

from __future__ import annotations

from megaconsa import run_folder
from megaconsa.config import Config, load
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint


def planned_allocation(config: Config) -> Allocation:
    """Returns the allocation of a run.

    While learning, it returns some table of the final sparsity. FLOPs and cache depend on nothing
    else. Raises InputError if a finished table cannot be read or made.
    """
    fixed = config.fixed_allocation()
    if fixed is not None:
        return fixed
    return even_allocation(config.constraint(), config.attention.window)


def assumed_allocation(config: Config) -> tuple[Allocation, str | None]:
    """Returns the allocation of a run, also if stage 1 has not made its file yet.

    The second value says what is assumed then. It is None otherwise.

    Raises InputError as `planned_allocation` does.
    """
    file = config.allocation.file
    if file is None or file.exists():
        return planned_allocation(config), None
    constraint, origin = _target(config)
    allocation = even_allocation(constraint, config.attention.window)
    assumed = (
        f"{file} does not exist yet: sparsity {constraint.sparsity:g} is assumed ({origin}), "
        "with full heads spread evenly over the layers"
    )
    return allocation, assumed


def _target(config: Config) -> tuple[Constraint, str]:
    """The target of stage 1, and where it is from.

    It is that of the run in model.init_from if this learns, or else allocation.sparsity.
    """
    run = config.model.init_from
    if run is not None and (run / run_folder.CONFIG).is_file():
        first = load(run / run_folder.CONFIG)
        if first.learning and first.to_model_config() == config.to_model_config():
            return first.constraint(), f"the target of {run}"
    given = "sparsity" in config.allocation.model_fields_set
    origin = "allocation.sparsity" if given else "the default of allocation.sparsity"
    return config.constraint(), origin


def even_allocation(constraint: Constraint, window: int) -> Allocation:
    """A table that meets the constraint, with its full units spread evenly over the layers."""
    layers = constraint.num_layers
    total = constraint.full * constraint.count
    rows = []
    placed = 0
    for layer in range(layers):
        upto = total * (layer + 1) // layers
        count = upto - placed
        placed = upto
        if constraint.granularity == "layer":
            row = [count > 0] * constraint.num_kv_heads
        else:
            row = [head < count for head in range(constraint.num_kv_heads)]
        rows.append(row)
    return Allocation.from_heads(rows, constraint, window, {"assumed": "evenly spread"})
