"""Comparing configurations as plain values, including those written by earlier versions."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from megaconsa.config.run_config import Config


def with_defaults(values: dict[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """A copy of a configuration's plain values, with missing fields set to their defaults.

    An earlier version wrote its configuration before a newer field existed.
    """
    full = dict(values)
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name not in full and not field.is_required():
            full[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif (
            isinstance(kind, type)
            and issubclass(kind, BaseModel)
            and isinstance(full.get(name), dict)
        ):
            full[name] = with_defaults(full[name], kind)
    return full


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configurations differ, as `field: old -> new`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before = old.get(key)
        after = new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found
