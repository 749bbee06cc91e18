"""Exports that are made once, and the held-out documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.data.tokenizer import Tokenizer
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.needle import Needles
from megaconsa.huggingface.load import load_exported
from tests.support.exports import ALLOCATIONS, make_export


@pytest.fixture(scope="session")
def held_out(small_data: Path) -> HeldOut:
    return HeldOut(small_data)


@pytest.fixture(scope="session")
def needles(small_data: Path, held_out: HeldOut) -> Needles:
    return Needles(Tokenizer.load(small_data / "tokenizer"), held_out, seed=0)


@pytest.fixture(scope="session")
def loaded(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Returns a function that loads the export of a name in ALLOCATIONS."""
    models: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in models:
            folder = make_export(
                tmp_path_factory.mktemp("exports") / name,
                ALLOCATIONS[name],
                small_data / "tokenizer",
            )
            models[name], _ = load_exported(folder)
        return models[name]

    return load
