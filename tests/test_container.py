"""The image is built from the Dockerfile and runs megaconsa.

This takes a builder and several gigabytes, and the test that does it is run by hand.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support import ROOT

DOCKERFILE = ROOT / "Dockerfile"
IMAGE = "localhost/megaconsa-test"
BUILD_SECONDS = 3600


def run(*words: str, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.fixture
def builder() -> str:
    """The name of a program that can build here. The test is skipped if there is none."""
    reasons = []
    for name in ("docker", "podman", "buildah"):
        if shutil.which(name) is None:
            reasons.append(f"{name} is not installed")
            continue
        told = run(name, "info")
        if told.returncode == 0:
            return name
        reasons.append(f"{name}: {told.stderr.strip().splitlines()[-1]}")
    pytest.skip("; ".join(reasons))


def in_image(builder: str, *words: str) -> str:
    """Runs a command in a new container of the image. Returns its stdout."""
    if builder != "buildah":
        ended = run(builder, "run", "--rm", IMAGE, *words)
    else:
        container = run(builder, "from", IMAGE).stdout.strip()
        ended = run(builder, "run", container, "--", *words)
        run(builder, "rm", container)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.nightly
@pytest.mark.timeout(2 * BUILD_SECONDS)
def test_the_image_is_built_and_runs(builder: str) -> None:
    options = shlex.split(os.environ.get("MEGACONSA_BUILD_OPTIONS", ""))
    built = run(builder, "build", *options, "--tag", IMAGE, ".", seconds=BUILD_SECONDS)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    try:
        assert "quickstart" in in_image(builder, "megaconsa", "--help")
        config = "/opt/megaconsa/configs/quickstart.yaml"
        assert "parameters" in in_image(builder, "megaconsa", "plan", config)
        # Triton compiles with gcc and Python's headers.
        script = "import sysconfig, pathlib; from megaconsa.kernels import hybrid_attention; "
        script += "print(pathlib.Path(sysconfig.get_paths()['include'], 'Python.h').exists())"
        assert in_image(builder, "python", "-c", script).strip() == "True"
        in_image(builder, "gcc", "--version")
    finally:
        run(builder, "rmi", "--force", IMAGE)


def test_what_the_dockerfile_copies_is_not_left_out() -> None:
    """Everything that the package is built from must reach the builder."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    copied = re.findall(r"^COPY (\S+) ", DOCKERFILE.read_text(), re.MULTILINE)
    assert "." in copied
    needed = [name for name in copied if name != "."]
    needed += ["README.md", "LICENSE", "megaconsa", "kernels", "tools", "configs", "slurm"]
    for name in needed:
        assert (ROOT / name).exists(), name
        assert not any(fnmatch(name, pattern) for pattern in patterns), name


def test_the_working_directory_does_not_hide_the_package() -> None:
    """A folder that the user mounts there must not cover the sources."""
    folders = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert not Path(folders[0]).is_relative_to(folders[-1])
