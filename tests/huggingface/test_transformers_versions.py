"""The exports with the oldest and the newest transformers: this folder's tests, run with each installed aside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("release", ["transformers==4.57.0", "transformers>=5"])
def test_other_releases_of_transformers(release: str, tmp_path: Path) -> None:
    aside = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(aside), release]
    subprocess.run(install, check=True)
    found = "import transformers; print(transformers.__version__, transformers.__file__)"
    environment = os.environ | {"PYTHONPATH": str(aside), "OMP_NUM_THREADS": "1"}
    version, place = subprocess.check_output([sys.executable, "-c", found], env=environment, text=True, cwd=tmp_path).split()
    assert Path(place).is_relative_to(aside)
    assert version == "4.57.0" if "==" in release else int(version.split(".")[0]) >= 5
    command = [sys.executable, "-m", "pytest", "tests/huggingface", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{version}: {result.stdout[-4000:]}"
