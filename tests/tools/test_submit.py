"""`megaconsa submit` without a Slurm.

These tests cover what it would run, what it refuses, and the files of slurm/ that it names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.cluster.jobs import FILES, TIME
from megaconsa.model.config import PRESETS

Done = Callable[..., str]
RULE = {"source": "rule", "rule": "dense"}
SWEEP = ("--out", "sweep", "--sparsity", 0.25, "--sparsity", 0.5)
SCRIPTS = sorted([*FILES.glob("*.sbatch"), *FILES.glob("*.sh")])


@pytest.fixture
def configs(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes learn.yaml and train.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, sections in {"learn": {}, "train": {"allocation": RULE}}.items():
        Path(f"{name}.yaml").write_text(
            yaml.safe_dump(make_config(run={"dir": f"runs/{name}"}, **sections))
        )


@pytest.mark.usefixtures("configs")
def test_train(done: Done) -> None:
    where = ("--partition", "gpu", "--account", "me", "--sbatch=--qos=high")
    printed = done(
        "submit",
        "train",
        "train.yaml",
        "run.seed=1",
        "--nodes",
        2,
        "--gpus-per-node",
        1,
        "--time",
        "1-00",
        *where,
        "--dry-run",
    )
    assert f"MEGACONSA_SLURM={FILES}" in printed
    options = "--partition=gpu --account=me --output=runs/train/slurm/%x-%j.out --qos=high "
    size = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 --time=1-00"
    assert printed.endswith(
        f"sbatch --parsable {options}{size} {FILES}/train.sbatch train.yaml run.seed=1\n"
    )
    assert not Path("runs").exists()


@pytest.mark.usefixtures("configs")
def test_both_stages_of_a_chain_have_the_shape_of_an_import(
    done: Done, refused: Callable[..., str]
) -> None:
    """Stage 1, from which stage 2 starts, is not there yet."""
    shape = asdict(PRESETS["tiny"]) | {"max_position_embeddings": 8192}
    Path("import").mkdir()
    Path("import/state.json").write_text(json.dumps({"shape": shape}))
    for name, origin in {"learn": "import", "train": "out/learn"}.items():
        values = yaml.safe_load(Path(f"{name}.yaml").read_text())
        values["model"] = {"init_from": origin}
        values["training"]["sequence_length"] = 8192
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values))
    chain = ("submit", "chain", "learn.yaml", "train.yaml", "--out", "out", "--gpus-per-node", 1)
    printed = done(*chain, "--dry-run")
    assert "model.init_from=import" not in printed
    # Alone, stage 2 has the preset's context until stage 1 is there.
    said = refused("submit", "train", "train.yaml", "--gpus-per-node", 1, "--dry-run")
    assert "exceeds model.max_position_embeddings=4096" in said


@pytest.mark.usefixtures("configs")
def test_cores_and_whole_nodes(done: Done) -> None:
    """Eight GPUs per node are the whole node on most clusters.

    The user can override the default in both directions.
    """

    def options(*arguments: object) -> list[str]:
        batch = ("training.global_batch=16", "--dry-run")
        return done("submit", "learn", "learn.yaml", *batch, *arguments).split()

    assert "--exclusive" in options()
    assert "--exclusive" not in options("--no-exclusive")
    assert "--exclusive" not in options("--gpus-per-node", 4)
    assert "--exclusive" in options("--gpus-per-node", 4, "--exclusive")
    assert "--cpus-per-task=12" in options("--cpus-per-task", 12)


@pytest.mark.usefixtures("configs")
def test_paths_are_expanded(done: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Paths are expanded like those of a configuration.

    No shell expands them within --out=~/a or in the quotes of a script.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    chain = ("submit", "chain", "~/learn.yaml", "$HOME/train.yaml", "--out=$SCRATCH/a")
    printed = done(*chain, "--gpus-per-node", 1, "--dry-run")
    assert f"chain.sbatch {tmp_path}/learn.yaml {tmp_path}/train.yaml /scratch/me/a" in printed
    assert "--output=/scratch/me/a/slurm/" in printed


@pytest.mark.usefixtures("configs")
def test_sweep(done: Done) -> None:
    printed = done(
        "submit",
        "sweep",
        "learn.yaml",
        *SWEEP,
        "--granularity",
        "layer",
        "--gpus-per-node",
        1,
        "--dry-run",
    )
    expected = (
        "MEGACONSA_SPARSITIES='0.25 0.5' MEGACONSA_GRANULARITIES=layer "
        "sbatch --parsable --array=0-1 "
    )
    assert expected in printed
    assert printed.endswith(f"{FILES}/sweep.sbatch learn.yaml sweep\n")


@pytest.mark.usefixtures("configs")
def test_chain_prints_its_four_jobs(done: Done) -> None:
    chain = (
        "submit",
        "chain",
        "learn.yaml",
        "train.yaml",
        "run.seed=2",
        "--out",
        "out",
        "--nodes",
        2,
        "--gpus-per-node",
        1,
    )
    lines = done(*chain, "--dry-run").partition("# which submits\n")[2].splitlines()
    ends = [
        "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 "
        f"{FILES}/learn.sbatch learn.yaml run.seed=2 run.dir=out/learn",
        f"--dependency=afterok:ID_OF_learn {FILES}/command.sbatch "
        "finalize-masks out/learn --out out/allocation.json",
        f"{FILES}/train.sbatch train.yaml run.seed=2 run.dir=out/train model.init_from=out/learn "
        "allocation.source=file allocation.file=out/allocation.json",
        f"--dependency=afterok:ID_OF_train {FILES}/command.sbatch export-hf out/train --out out/hf",
    ]
    assert len(lines) == len(ends)
    for line, end in zip(lines, ends, strict=True):
        assert line.strip().endswith(end)
        assert "--output=out/slurm/%x-%j.out" in line
    assert not Path("out").exists()


def test_evaluate_hands_its_arguments_on(done: Done) -> None:
    arguments = ("--model", "a=runs/hf", "--data", "data", "--out", "evaluation")
    printed = done("submit", "evaluate", "--time", "60", "--dry-run", "--", *arguments)
    assert printed.endswith(
        f"--cpus-per-task=8 --time=60 {FILES}/evaluate.sbatch "
        "--model a=runs/hf --data data --out evaluation\n"
    )


@pytest.mark.usefixtures("configs")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (
            ("train", "learn.yaml"),
            "learn.yaml has allocation.source=learn, "
            "but this job is to train on a finished allocation",
        ),
        (
            ("learn", "train.yaml"),
            "train.yaml has allocation.source=rule, but this job is to learn",
        ),
        (("learn", "learn.yaml", "training.stepz=1"), "did you mean training.steps?"),
        (
            ("learn", "learn.yaml", "--nodes", 3),
            "--nodes 3 --gpus-per-node 1: training.global_batch=4 must be a multiple",
        ),
        (
            ("learn", "learn.yaml", "parallel.tensor=2"),
            "1 processes are not a multiple of parallel.tensor=2",
        ),
        (
            ("learn", "learn.yaml", "parallel.tensor=2", "--nodes", 2),
            "--gpus-per-node 1: parallel.tensor=2 does not divide it, and a tensor group across",
        ),
        (
            ("learn", "~nosuchuser/learn.yaml"),
            "configuration ~nosuchuser/learn.yaml: there is no user ~nosuchuser",
        ),
        (
            ("chain", "learn.yaml", "train.yaml", "--out", "$NOWHERE/a"),
            "--out $NOWHERE/a: the environment has no variable $NOWHERE",
        ),
        (("learn", "learn.yaml", "--time", "a day"), "--time a day is not a time limit"),
        (("learn", "learn.yaml", "--sbatch", "-p gpu"), "is not one option of sbatch"),
        (("learn", "learn.yaml", "--out", "runs"), "belongs to chain and sweep"),
        (("learn", "learn.yaml", "--sparsity", "0.5"), "belong to sweep"),
        (("chain", "learn.yaml", "--out", "out"), "chain needs 2 configurations"),
        (("chain", "learn.yaml", "run.seed=1", "--out", "out"), "chain needs 2 configurations"),
        (("chain", "learn.yaml", "train.yaml"), "--out FOLDER is missing"),
        (
            ("chain", "train.yaml", "learn.yaml", "--out", "out"),
            "train.yaml has allocation.source=rule",
        ),
        (("chain", "learn.yaml", "train.yaml", "--out", "my out"), "has a space in it"),
        (("sweep", "learn.yaml", "--out", "out"), "--sparsity, at least once"),
        (
            ("sweep", "learn.yaml", *SWEEP, "--sparsity", 0.3),
            "cannot be met by 16 KV heads; possible are 0, 0.0625,",
        ),
        (("sweep", "learn.yaml", *SWEEP, "--granularity", "tall"), "allocation.granularity='tall'"),
    ],
)
def test_refused(arguments: tuple[object, ...], said: str, refused: Done) -> None:
    before = sorted(Path().rglob("*"))
    if "--gpus-per-node" not in arguments:
        arguments = (*arguments, "--gpus-per-node", 1)
    assert said in refused("submit", *arguments)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("configs")
def test_without_slurm(refused: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch is not found" in refused("submit", "learn", "learn.yaml", "--gpus-per-node", 1)
    assert not Path("runs").exists()


def test_times() -> None:
    for good in ("90", "90:00", "24:00:00", "2-12", "2-12:30", "2-12:30:00"):
        assert TIME.fullmatch(good)
    for bad in ("", "1d", "24h", "1:2:3", "-1", "1-", "1-2-3", "1:00:00:00"):
        assert not TIME.fullmatch(bad)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(script: Path) -> None:
    """bash checks the scripts, and so does shellcheck where it is installed."""
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "-x", script],
            cwd=FILES.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", sorted(FILES.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_say_what_to_edit_and_name_no_site(script: Path) -> None:
    text = script.read_text()
    assert "# Edit" in text.partition("#SBATCH")[0]
    assert not re.search(r"^#SBATCH --(partition|account|qos|constraint|mem)", text, re.MULTILINE)


def test_scripts_started_in_the_wrong_way_say_so() -> None:
    """The script is started outside a job and without arguments."""
    ended = subprocess.run(
        ["bash", FILES / "chain.sbatch"],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("refused: give two configurations and a folder")
