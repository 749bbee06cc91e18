"""finalize-masks and rule-masks: the table they write and the one they print."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.checkpoint import store
from megaconsa.checkpoint.gates import read_gates
from megaconsa.consa.allocation import Allocation, as_rows
from megaconsa.consa.rules import RULES
from megaconsa.model.config import PRESETS
from megaconsa.reporting.terminal import text_map

Done = Callable[..., str]
Finished = Callable[[str], Path]


@pytest.mark.parametrize("name", ["heads", "layers"])
def test_finalize_masks(name: str, finished: Finished, done: Done, tmp_path: Path) -> None:
    run = finished(name)
    out = tmp_path / "new" / "table.json"
    text = done("finalize-masks", run, "--out", out)

    bank = read_gates(store.resolve(run))
    allocation = Allocation.load(out)
    assert allocation.full == as_rows(bank.full())
    constraint = bank.constraint
    assert (allocation.granularity, allocation.scope) == (constraint.granularity, constraint.scope)
    assert allocation.target_sparsity == allocation.sparsity == constraint.sparsity
    assert allocation.window == 8
    if name == "layers":
        assert allocation.is_layer_wise
    evidence = bank.summary()
    assert allocation.origin == {
        "run": str(run),
        "step": 6,
        "tokens": 6 * 4 * 64,
        "controller": "evidence",
        "method": "top-k",
        "cut_margin": pytest.approx(constraint.margin(bank.gates.scores)),
        "split_agreement": evidence.split_agreement,
        "time_agreement": evidence.time_agreement,
        "separated_share": evidence.separated_share,
        "contradicted_share": evidence.contradicted_share,
    }

    assert text_map(allocation) in text
    table_line, evidence_line = text.splitlines()[-2:]
    assert table_line.startswith(
        f"{out}: sparsity {allocation.sparsity:.4f} (target {constraint.sparsity}), "
        "window 8, cut margin "
    )
    assert evidence_line.startswith("evidence: split_agreement ")
    assert [path.name for path in out.parent.iterdir()] == ["table.json"]


def test_the_papers_threshold_is_for_its_own_gates(
    finished: Finished,
    done: Done,
    refused: Callable[..., str],
    make_config: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], Any],
    tmp_path: Path,
) -> None:
    run = tmp_path / "paper"
    out = tmp_path / "table.json"
    # Gates that learn fast spread within the few steps, so that some pass the threshold.
    train(make_config(run={"dir": str(run)}, gates={"controller": "paper", "learning_rate": 2.0}))
    done("finalize-masks", run, "--out", out, "--method", "threshold")
    gates = store.resolve(run).gates()
    assert gates is not None
    assert Allocation.load(out).full == as_rows(gates["log_alpha"] > 0)
    assert "has none, use top-k" in refused(
        "finalize-masks", finished("heads"), "--out", out, "--method", "threshold"
    )


def test_an_allocation_from_noise_is_warned_of_and_refused_on_request(
    done: Done,
    refused: Callable[..., str],
    make_config: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], Any],
    tmp_path: Path,
) -> None:
    """Two steps of four sequences are no evidence about eight heads."""
    run = tmp_path / "short"
    out = tmp_path / "table.json"
    train(make_config(run={"dir": str(run)}, gates={"warmup_steps": 1}, training={"steps": 2}))
    assert "not supported by evidence" in refused(
        "finalize-masks", run, "--out", out, "--require-evidence"
    )
    assert not out.exists()
    assert "warning: the cut is not supported by evidence: " in done(
        "finalize-masks", run, "--out", out
    )


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_table_goes_into_the_run_by_default(
    checkpoint: bool, finished: Finished, done: Done, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("heads"), run)
    before = {path.relative_to(run) for path in run.rglob("*")}
    done("finalize-masks", run / "checkpoints" / "step_4" if checkpoint else run)
    assert {path.relative_to(run) for path in run.rglob("*")} - before == {Path("allocation.json")}
    assert Allocation.load(run / "allocation.json").origin["step"] == (4 if checkpoint else 6)


@pytest.mark.parametrize("where", ["run", "checkpoints", "checkpoints/step_4"])
def test_default_place_from_within_the_run(
    where: str, finished: Finished, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table must not be written into a checkpoint.

    There, it would be taken for the table that the run trained on.
    """
    run = tmp_path / "run"
    shutil.copytree(finished("heads"), run)
    before = {path.relative_to(run) for path in run.rglob("*")}
    monkeypatch.chdir(run if where == "run" else run / where)
    done("finalize-masks", "step_4" if where == "checkpoints" else ".")
    assert {path.relative_to(run) for path in run.rglob("*")} - before == {Path("allocation.json")}


def test_folder_names_with_brackets_are_printed_whole(
    finished: Finished, done: Done, tmp_path: Path
) -> None:
    """Rich would read [a] as markup."""
    out = tmp_path / "[a]" / "table.json"
    assert str(out) in done("finalize-masks", finished("heads"), "--out", out)
    assert str(out) in done("rule-masks", "dense", "--preset", "tiny", "--window", 8, "--out", out)


EXPECTED = {
    "dense": [True] * 4,
    "all-swa": [False] * 4,
    "interleaved": [False, False, True, False],
    "bottom-swa": [False, True, True, True],
    "middle": [False, True, True, True],
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_masks(rule: str, done: Done, tmp_path: Path) -> None:
    out = tmp_path / "allocation.json"
    arguments = ("--window", 16, "--sparsity", 0.25, "--ratio", 2, "--seed", 3, "--out", out)
    text = done("rule-masks", rule, "--preset", "tiny", *arguments)
    allocation = Allocation.load(out)
    if rule in ("head-share", "random"):
        if rule == "head-share":
            assert [sum(row) for row in allocation.full] == [3] * 4
        assert allocation.sparsity == 0.25
        assert len(set(allocation.full)) > 1
        assert allocation.origin == {"rule": rule, "seed": 3}
    else:
        assert allocation.full == tuple((full,) * 4 for full in EXPECTED[rule])
    assert allocation.window == 16
    assert (
        text.splitlines()[-1]
        == f"{out}: {allocation.sparsity:.1%} of 4 x 4 KV heads use a window of 16"
    )
    assert [line.split()[-2] for line in text.splitlines()[:4]] == [
        f"{sum(row)}/4" for row in allocation.full
    ]

    shape = PRESETS["tiny"]
    counts = ("--layers", shape.num_hidden_layers, "--kv-heads", shape.num_key_value_heads)
    done("rule-masks", rule, *counts, *arguments[:-1], tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == out.read_text()


def test_random_over_all_layers(done: Done, tmp_path: Path) -> None:
    def written(*arguments: object) -> Allocation:
        out = tmp_path / "allocation.json"
        common = (
            "--preset",
            "small",
            "--window",
            16,
            "--scope",
            "global",
            "--seed",
            3,
            "--out",
            out,
        )
        done("rule-masks", "random", *common, *arguments)
        return Allocation.load(out)

    heads = written("--sparsity", 0.75)
    assert (heads.sparsity, heads.granularity, heads.scope) == (0.75, "kv_head", "global")
    assert len({sum(row) for row in heads.full}) > 1
    layers = written("--granularity", "layer", "--sparsity", 0.25)
    assert (layers.sparsity, layers.granularity, layers.is_layer_wise) == (0.25, "layer", True)


def test_head_share_without_a_seed_keeps_the_first_heads(done: Done, tmp_path: Path) -> None:
    out = tmp_path / "allocation.json"
    done(
        "rule-masks",
        "head-share",
        "--preset",
        "tiny",
        "--window",
        16,
        "--sparsity",
        0.25,
        "--out",
        out,
    )
    assert Allocation.load(out).full == ((True, True, True, False),) * 4


def test_defaults_of_the_rules(done: Done, tmp_path: Path) -> None:
    for rule, sparsity in (
        ("interleaved", 0.75),
        ("head-share", 0.5),
        ("bottom-swa", 0.5),
        ("middle", 0.5),
    ):
        done(
            "rule-masks", rule, "--preset", "qwen3-0.6b", "--window", 1024, "--out", tmp_path / rule
        )
        written = json.loads((tmp_path / rule).read_text())
        assert (written["num_layers"], written["num_kv_heads"], written["sparsity"]) == (
            28,
            8,
            sparsity,
        )
