"""What to change so that a plan fits, and all topologies of a number of GPUs side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megaconsa.config import Config, build
from megaconsa.errors import InputError
from megaconsa.planning.cards import find_card
from megaconsa.planning.plan import Plan, make_plan

Fields = dict[str, Any]
"""Values by dotted names of the configuration."""
AXES = ("tensor", "context", "pipeline")
MOST_TENSOR_RANKS = 8
"""GPUs of a node. Tensor ranks communicate too much for more than one node."""
MOST_GPUS = 1024


@dataclass(frozen=True)
class Change:
    """Overrides, and the plan with them."""

    fields: Fields
    plan: Plan

    def __str__(self) -> str:
        """For example `training.micro_batch=2 --gpus 16`."""
        return " ".join(f"{name}={value}" for name, value in self.fields.items())


def smallest_change(config: Config, plan: Plan, mfu: float | None) -> Change | None:
    """Returns the change of the fewest fields with which the plan fits.

    Among changes of equally many fields it is the fastest. The number of GPUs grows only if nothing
    else helps. Returns None if nothing helps at all.

    mfu: as `make_plan` takes it.
    """
    gpus = plan.gpus
    while gpus <= MOST_GPUS:
        for changes in _candidates(config, plan):
            fitting = []
            for fields in changes:
                planned = _planned(config, fields, gpus, plan, mfu)
                if planned is not None and planned.fits:
                    fitting.append(Change(fields, planned))
            if fitting:
                return max(fitting, key=lambda change: change.plan.tokens_per_second)
        gpus *= 2
    return None


def topologies(
    config: Config, plan: Plan, mfu: float | None, gpus: int | None = None
) -> list[Plan]:
    """Returns the plans of all topologies, the fastest that fit first.

    Topologies that the configuration refuses are left out.

    plan: has the device, and the number of GPUs unless `gpus` is given.
    """
    gpus = plan.gpus if gpus is None else gpus
    found = []
    for tensor, context, pipeline in product(_powers(gpus), repeat=3):
        if tensor > MOST_TENSOR_RANKS or gpus % (tensor * context * pipeline):
            continue
        fields: Fields = {
            "parallel.tensor": tensor,
            "parallel.context": context,
            "parallel.pipeline": pipeline,
        }
        if pipeline == 1:
            fields["parallel.schedule"] = "1f1b"
        planned = _planned(config, fields, gpus, plan, mfu)
        if planned is not None:
            found.append(planned)
    return sorted(found, key=lambda each: (not each.fits, -each.tokens_per_second))


def _candidates(config: Config, plan: Plan) -> Iterator[list[Fields]]:
    """Changes of no field, of one, of two and of three. Fields of one kind exclude each other."""
    training = config.training
    kinds: list[list[Fields]] = []
    if not training.activation_checkpointing:
        gib = int(find_card(plan.device).limit_bytes / 2**30)
        kinds.append([{"training.memory_gib": gib}])
    # The largest first, because it wins among equally fast ones.
    micro_batches = [each for each in _powers(training.micro_batch) if each < training.micro_batch]
    micro_batches.reverse()
    kinds.append([{"training.micro_batch": each} for each in micro_batches])
    # Other ways to divide the run exclude each other too.
    divided: list[Fields] = [{f"parallel.{axis}": ranks} for axis in AXES for ranks in (2, 4, 8)]
    if config.parallel.shard == "optimizer":
        divided.append({"parallel.shard": "gradients"})
    kinds.append(divided)
    yield [{}]
    yield [fields for kind in kinds for fields in kind]
    pairs = []
    for number, kind in enumerate(kinds):
        for other in kinds[number + 1 :]:
            pairs += [first | second for first, second in product(kind, other)]
    yield pairs
    if len(kinds) == 3:
        yield [first | second | third for first, second, third in product(*kinds)]


def _planned(
    config: Config, fields: Fields, gpus: int, plan: Plan, mfu: float | None
) -> Plan | None:
    """Plans with other fields. Returns None if these are refused."""
    data = config.to_dict()
    for name, value in fields.items():
        section, _, field = name.partition(".")
        data[section][field] = value
    try:
        return make_plan(build(data), gpus, plan.device, mfu, plan.context)
    except InputError:
        return None


def _powers(limit: int) -> list[int]:
    """The powers of two up to `limit`."""
    return [2**power for power in range(limit.bit_length())]
