"""The exports with the oldest and the newest transformers.

The tests of this folder run with each release installed in a separate place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.huggingface.load import load_exported
from megaconsa.huggingface.source import open_source
from tests.support import ROOT
from tests.support.transformers_reference import HEAD_WISE, LAYER_WISE, MODEL, WINDOW, masked_logits

RELEASES = ["transformers==4.57.0", "transformers>=5"]
TESTS = [
    "tests/huggingface",
    "tests/data/test_tokenizer_folder.py",
    "tests/tools/test_export_hf.py",
]

SAVE_AGAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM
source, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32,
trust_remote_code=True).save_pretrained(out)
"""
LOGITS = """
import sys
sys.modules["megaconsa"] = None  # importing it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
source, length, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(torch.arange(int(length))[None]).logits}, out)
"""


@pytest.fixture(scope="module", params=RELEASES)
def release(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """The environment of a process that uses that release."""
    aside = tmp_path_factory.mktemp("site")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(aside),
    ]
    subprocess.run([*install, request.param], check=True)
    found = "import transformers; print(transformers.__version__, transformers.__file__)"
    environment = os.environ | {"PYTHONPATH": str(aside), "OMP_NUM_THREADS": "1"}
    version, place = subprocess.check_output(
        [sys.executable, "-c", found], env=environment, text=True, cwd=aside
    ).split()
    assert Path(place).is_relative_to(aside)
    assert version == "4.57.0" if "==" in request.param else int(version.split(".")[0]) >= 5
    return environment


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_other_releases_of_transformers(release: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        *TESTS,
        "-m",
        "not nightly and not gpu",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(
        command, cwd=ROOT, env=release, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("allocation", [HEAD_WISE, LAYER_WISE], ids=["head-wise", "stock"])
def test_what_another_release_saved_is_the_same_model_here(
    release: dict[str, str],
    allocation: Allocation,
    exported: Callable[[Allocation], Path],
    weights: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """The model is the same for the evaluation and for the import.

    If the folder has its model file, it is also the same for transformers alone.
    """
    again = tmp_path / "again"
    tokens = torch.arange(3 * WINDOW)[None]
    command = [sys.executable, "-c", SAVE_AGAIN, str(exported(allocation)), str(again)]
    subprocess.run(command, env=release, cwd=tmp_path, check=True)
    expected = masked_logits(weights, MODEL, allocation, tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            load_exported(again)[0](tokens).logits, expected, rtol=0, atol=1e-4
        )
    source = open_source(again)
    assert source.model_config == MODEL
    assert source.allocation is not None
    assert (source.allocation.full, source.allocation.window) == (allocation.full, WINDOW)
    if allocation is HEAD_WISE:
        command = [
            sys.executable,
            "-c",
            LOGITS,
            str(again),
            str(tokens.shape[1]),
            str(tmp_path / "logits"),
        ]
        subprocess.run(command, cwd=tmp_path, check=True)
        torch.testing.assert_close(
            load_file(tmp_path / "logits")["logits"], expected, rtol=0, atol=1e-4
        )
