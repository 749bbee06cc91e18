"""Small real data and small real runs, shared by the tests that train."""

from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # This must be set before anything imports triton. Its kernels then run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Under nohup this signal is ignored, and the runs that the tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SEQUENCE_LENGTH = 64
VOCABULARY = 512


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Uses one thread because the tensors are small.

    More threads would only wait for each other and for the other test process.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_process_groups_left() -> Iterator[None]:
    """Leaves the process group of runs in this process.

    Each of its groups has threads, and hundreds of runs would leave thousands of them.
    """
    yield
    if "megaconsa.parallel.world" in sys.modules:
        from megaconsa.parallel.world import leave

        leave()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder made of a few modules of the standard library."""
    import sysconfig

    from megaconsa.data.preparation_options import Options
    from megaconsa.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "python"
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        str(library / name)
        for name in (
            "argparse.py",
            "ast.py",
            "inspect.py",
            "typing.py",
            "tarfile.py",
            "json",
            "email",
        )
    ]
    prepare(
        sources,
        folder,
        Options(sequence_length=SEQUENCE_LENGTH, validation_share=0.1),
        train_tokenizer=VOCABULARY,
    )
    return folder


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A separate file system with the size that the test is parametrized with ("8m")."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def make_config(small_data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Plain values of a small learning run.

    Keyword arguments change sections: make_config(training={"steps": 3}).
    """
    base = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {
            "preset": "tiny",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "head_dim": 8,
        },
        "attention": {"window": 8},
        "allocation": {"source": "learn"},
        "gates": {"warmup_steps": 2},
        "training": {
            "steps": 6,
            "micro_batch": 2,
            "global_batch": 4,
            "sequence_length": SEQUENCE_LENGTH,
            "learning_rate": 3e-3,
        },
        "data": {"path": str(small_data)},
        "validation": {"sequences": 4},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }

    def make(**sections: dict[str, Any]) -> dict[str, Any]:
        values = copy.deepcopy(base)
        for name, fields in sections.items():
            values.setdefault(name, {}).update(fields)
        return values

    return make


@pytest.fixture
def train() -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Runs a configuration to its end in this process and returns the rows of its metrics."""
    from megaconsa.config import build
    from megaconsa.parallel import mesh
    from megaconsa.reporting.metrics import read_metrics
    from megaconsa.training.inputs import check_inputs
    from megaconsa.training.setup import build_trainer

    logging.getLogger("megaconsa").setLevel(logging.WARNING)

    def run(values: dict[str, Any]) -> list[dict[str, Any]]:
        config = build(values)
        assert build_trainer(check_inputs(config), mesh.initialize()).run()
        return read_metrics(config.run.dir / "metrics.jsonl")

    return run


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes readers of unreachable files retry at short intervals, for a second."""
    from megaconsa import reading

    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(reading, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 1.0)
