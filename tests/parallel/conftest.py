"""Data and runs that the tests of topologies share."""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from tests.support.topologies import Runs


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, whose documents have three lines each.

    A sequence holds several documents, and micro-batches have different numbers of labels.
    """
    folder = tmp_path_factory.mktemp("topologies")
    lines = [
        line
        for module in (argparse, tarfile)
        for line in Path(str(module.__file__)).read_text().splitlines()
        if line.strip()
    ]
    documents = ["\n".join(lines[start : start + 3]) for start in range(0, len(lines), 3)]
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    prepare(
        [str(source)],
        folder / "data",
        Options(sequence_length=64, validation_share=0.1),
        train_tokenizer=512,
    )
    return folder


@pytest.fixture
def runs(
    workspace: Path, make_config: Callable[..., dict[str, Any]], train: Callable[..., Any]
) -> Runs:
    return Runs(workspace, make_config, train)
