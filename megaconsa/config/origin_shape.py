"""A model that starts from existing weights takes its shape, rope and context from them."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megaconsa import run_folder
from megaconsa.config.run_config import Config
from megaconsa.config.sections import ModelSection
from megaconsa.errors import InputError
from megaconsa.files import parse_json
from megaconsa.model.config import PRESETS, ModelConfig
from megaconsa.reading import read_text
from megaconsa.run_paths import relocated

logger = logging.getLogger(__name__)

EXTENSIONS = {"rope_theta", "max_position_embeddings"}
"""Fields that a new run may give other values than its weights have, to extend the context."""
_NO_TENSORS = EXTENSIONS | {"rms_norm_eps", "initializer_range"}
"""Fields that no tensor's shape depends on. Presets differ in them from models of the same name."""
_NAMES = [field.name for field in dataclass_fields(ModelConfig)]

Shape = dict[str, Any]


def with_origin_shape(config: Config) -> Config:
    """The configuration with the shape of the weights that model.init_from names.

    Returns it unchanged where it names none, or where nothing is there yet.
    Raises InputError if a field of the section `model` contradicts the weights.
    """
    section = config.model
    if section.init_from is None or section.preset not in PRESETS:
        return config
    # A run that has begun keeps its shape, whatever has become of its origin.
    recorded = _recorded_model(config.run.dir)
    shape = None
    if recorded is None or not _same_place(recorded.get("init_from"), section.init_from):
        shape = _shape_of(section.init_from)
    if shape is None and recorded is not None:
        shape = _full_shape(recorded)
    if shape is None:
        return config
    _refuse_contradictions(section, shape)
    missing: Shape = {}
    for name, value in shape.items():
        if getattr(section, name) is None:
            missing[name] = value
    try:
        # Validated, because the values come from a file.
        section = ModelSection.model_validate(section.model_dump() | missing)
    except ValidationError:
        return config  # The check of the checkpoint says what is wrong with it.
    preset = asdict(PRESETS[section.preset])
    news = [f"{name}={value}" for name, value in missing.items() if value != preset[name]]
    if news:
        logger.info("model.init_from=%s gives the model %s", section.init_from, ", ".join(news))
    return config.model_copy(update={"model": section})


def _shape_of(origin: Path) -> Shape | None:
    """The shape of a run, a checkpoint or an import. None if it cannot be read."""
    try:
        if (origin / "state.json").is_file():
            state = parse_json(read_text(origin / "state.json"))
            return _known(state["shape"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    recorded = _recorded_model(origin)
    return None if recorded is None else _full_shape(recorded)


def _recorded_model(run: Path) -> dict[str, Any] | None:
    """The section `model` of the configuration that a run wrote. None if it cannot be read."""
    try:
        config = yaml.safe_load(read_text(run / run_folder.CONFIG))
        section = relocated(config, run)["model"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return section if isinstance(section, dict) else None


def _full_shape(section: dict[str, Any]) -> Shape | None:
    """The shape that a recorded section `model` means. None for an unknown preset."""
    preset = PRESETS.get(section.get("preset", "tiny"))
    if preset is None:
        return None
    given = {name: value for name, value in section.items() if value is not None}
    return asdict(preset) | _known(given)


def _same_place(recorded: object, origin: Path) -> bool:
    return isinstance(recorded, str) and os.path.realpath(recorded) == os.path.realpath(origin)


def _known(fields: dict[str, Any]) -> Shape:
    return {name: fields[name] for name in _NAMES if name in fields}


def _refuse_contradictions(section: ModelSection, shape: Shape) -> None:
    """Raises InputError for a given value, or a given preset, that the weights do not have."""
    for name, value in shape.items():
        given = getattr(section, name)
        if given is not None and given != value and name not in EXTENSIONS:
            raise InputError(
                f"model.{name}={given} contradicts model.init_from={section.init_from}, "
                f"whose weights have {name}={value}; leave model.{name} out"
            )
    if "preset" not in section.model_fields_set:
        return
    preset = asdict(PRESETS[section.preset])
    for name, value in shape.items():
        settled = name in _NO_TENSORS or getattr(section, name) is not None
        if not settled and preset[name] != value:
            raise InputError(
                f"model.preset={section.preset} with {name}={preset[name]} contradicts "
                f"model.init_from={section.init_from}, whose weights have {name}={value}; "
                "leave the preset out, for example by model.preset=null"
            )
