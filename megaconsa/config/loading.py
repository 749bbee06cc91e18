"""Loading a run configuration: YAML files, `section.field=value` overrides, and error messages."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megaconsa.config.checks import check, check_allocation, resolve_budget
from megaconsa.config.origin_shape import with_origin_shape
from megaconsa.config.run_config import Config
from megaconsa.errors import InputError
from megaconsa.reading import read_text
from megaconsa.run_paths import has_moved_to, relocated
from megaconsa.strict_yaml import UniqueKeyLoader

logger = logging.getLogger(__name__)


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies the overrides, and checks the result.

    The config.yaml of a run that was moved describes the run at its new place.

    overrides: `section.field=value`, where values are YAML.
    Raises InputError if the configuration cannot work.
    """
    data = read_yaml(path, "configuration", "sections")
    if has_moved_to(path.parent, data):
        logger.warning("%s was moved here from %s", path.parent.absolute(), data["run"]["dir"])
        data = relocated(data, path.parent)
    for override in overrides or []:
        _apply(data, override)
    return build(data)


def read_yaml(path: Path, kind: str, content: str) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    kind: what messages call the file.
    content: what messages call the entries of the mapping.
    Raises InputError if the file cannot be read or holds something else.
    """
    try:
        data = yaml.load(read_text(path), UniqueKeyLoader)
    except FileNotFoundError:
        raise InputError(f"{kind} {path} does not exist") from None
    except RecursionError:
        raise InputError(f"{kind} {path} cannot be read: it nests too deep") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{kind} {path} cannot be read: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{kind} {path} is not a mapping of {content}")
    return data


def build(data: dict[str, Any]) -> Config:
    """Checks plain values and returns the typed configuration.

    Raises InputError if the configuration cannot work.
    """
    # A section whose fields are all commented out reads as null.
    sections = {name: value for name, value in data.items() if value is not None}
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        raise InputError(_describe(error)) from None
    config = with_origin_shape(config)
    check(config)
    config = resolve_budget(config)
    check_allocation(config)
    return config


def _apply(data: dict[str, Any], override: str) -> None:
    """Applies one override to the plain values, in place."""
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or len(keys) != 2 or not all(keys):
        raise InputError(f"override {override!r} is not of the form section.field=value")
    section = data.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise InputError(f"section {keys[0]} of the configuration is not a mapping")
    try:
        section[keys[1]] = yaml.load(text, UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The parser raises ValueError for `1__0` and for impossible dates.
        reason = _one_line(error)
        raise InputError(f"override {override!r}: the value is not YAML ({reason})") from None


def _describe(error: ValidationError) -> str:
    """The first error that pydantic found, as one sentence.

    An unknown field is reported with the known name that is closest to it.
    """
    fault = error.errors()[0]
    place = [str(part) for part in fault["loc"]]
    name = ".".join(place)
    if fault["type"] == "extra_forbidden":
        section = Config if len(place) == 1 else Config.model_fields[place[0]].annotation
        known = list(section.model_fields)  # type: ignore[union-attr]
        near = difflib.get_close_matches(place[-1], known, 1, 0.6)
        if near:
            suggestion = ".".join([*place[:-1], near[0]])
            hint = f"did you mean {suggestion}?"
        else:
            hint = f"known are {', '.join(known)}"
        where = ".".join(place[:-1])
        in_section = f" in section {where}" if where else ""
        return f"unknown field {name}{in_section}; {hint}"
    if fault["type"] == "missing":
        override = f" or as {name}=VALUE" if len(place) == 2 else ""
        return f"field {name} is missing; give it in the file{override}"
    return f"{name}={fault['input']!r} is refused: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
