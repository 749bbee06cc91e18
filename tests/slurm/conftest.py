"""One real Slurm for all tests of this folder, and how they submit to it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.slurm_cluster import Cluster, missing

MEGACONSA = Path(sys.executable).with_name("megaconsa")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    # Do not use pytest's folders. The name of munged's socket may have at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))
    folder.chmod(0o755)
    with Cluster(folder) as started:
        yield started
    shutil.rmtree(folder)


@pytest.fixture
def submit(cluster: Cluster) -> Callable[..., str]:
    """Runs `megaconsa submit ...` and returns what it printed."""

    def run(*arguments: object, **variables: str) -> str:
        return cluster.call(MEGACONSA, "submit", *arguments, **variables)

    return run


@pytest.fixture
def write_config(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Writes NAME.yaml for a run in tmp_path/NAME.

    Example: write_config("a", training={"steps": 3}).
    """

    def write(name: str, **sections: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(make_config(**{"run": {"dir": str(tmp_path / name)}, **sections}))
        )
        return path

    return write
