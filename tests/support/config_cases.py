"""A small run configuration for the tests of megaconsa.config, and how they change it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megaconsa.config import build
from megaconsa.errors import InputError

PER_LAYER: dict[str, Any] = {"source": "learn", "scope": "per_layer"}
BASE: dict[str, Any] = {
    "run": {"dir": "runs/a"},
    "attention": {"window": 8},
    "allocation": PER_LAYER,
    "gates": {"warmup_steps": 3},
    "training": {
        "steps": 10,
        "micro_batch": 2,
        "global_batch": 4,
        "sequence_length": 32,
        "learning_rate": 0.001,
    },
    "data": {"path": "data/a"},
}


def changed(**fields: Any) -> dict[str, Any]:
    """Returns BASE with `section__field=value`, or with a whole section, changed."""
    data = copy.deepcopy(BASE)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        if field:
            data.setdefault(section, {})[field] = value
        else:
            data[section] = value
    return data


def refusal(data: dict[str, Any]) -> str:
    """Returns the message of the refusal, which must be one line."""
    with pytest.raises(InputError) as caught:
        build(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)
