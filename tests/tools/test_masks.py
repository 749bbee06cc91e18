"""finalize-masks and rule-masks: the table they write and the one they print."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megaconsa.checkpoint import store
from megaconsa.consa.allocation import Allocation, as_rows, cut_margin, threshold, top_k
from megaconsa.consa.rules import RULES
from megaconsa.model.config import PRESETS
from megaconsa.reporting.terminal import text_map

Done = Callable[..., str]
Finished = Callable[[str], Path]


@pytest.mark.parametrize("method", ["top-k", "threshold"])
@pytest.mark.parametrize("name", ["heads", "layers"])
def test_finalize_masks(name: str, method: str, finished: Finished, done: Done, tmp_path: Path) -> None:
    run, out = finished(name), tmp_path / "new" / "table.json"
    text = done("finalize-masks", run, "--out", out, "--method", method)

    gates = store.resolve(run).gates()
    assert gates is not None
    granularity, scope, sparsity = ("kv_head", "per_layer", 0.25) if name == "heads" else ("layer", "global", 0.5)
    values = gates["log_alpha"] if name == "heads" else gates["log_alpha"][:, 0]
    full = top_k(values, sparsity, 4, granularity, scope) if method == "top-k" else threshold(values, 4)  # type: ignore[arg-type]
    allocation = Allocation.load(out)
    assert allocation.full == as_rows(full)
    assert (allocation.granularity, allocation.scope, allocation.target_sparsity) == (granularity, scope, sparsity)
    assert allocation.window == 8
    if name == "layers":
        assert allocation.is_layer_wise
    margin = pytest.approx(cut_margin(values, sparsity, 4, granularity, scope))  # type: ignore[arg-type]
    assert allocation.origin == {"run": str(run), "step": 6, "method": method, "cut_margin": margin}
    if method == "top-k":
        assert allocation.sparsity == sparsity
    else:
        assert 0 < allocation.sparsity < 1

    assert text_map(allocation) in text
    last = text.splitlines()[-1]
    assert last.startswith(f"{out}: sparsity {allocation.sparsity:.4f} (target {sparsity}), window 8, cut margin ")
    assert [path.name for path in out.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_table_goes_into_the_run_by_default(checkpoint: bool, finished: Finished, done: Done, tmp_path: Path) -> None:
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
    """A table inside a checkpoint of a learning run would pass for the one it trained on."""
    run = tmp_path / "run"
    shutil.copytree(finished("heads"), run)
    before = {path.relative_to(run) for path in run.rglob("*")}
    monkeypatch.chdir(run if where == "run" else run / where)
    done("finalize-masks", "step_4" if where == "checkpoints" else ".")
    assert {path.relative_to(run) for path in run.rglob("*")} - before == {Path("allocation.json")}


def test_folder_names_with_brackets_are_printed_whole(finished: Finished, done: Done, tmp_path: Path) -> None:
    """Rich takes [a] for markup."""
    out = tmp_path / "[a]" / "table.json"
    assert str(out) in done("finalize-masks", finished("heads"), "--out", out)
    assert str(out) in done("rule-masks", "dense", "--preset", "tiny", "--window", 8, "--out", out)


EXPECTED = {
    "dense": [True] * 4,
    "all-swa": [False] * 4,
    "interleaved": [False, False, True, False],
    "bottom-swa": [False, True, True, True],
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_masks(rule: str, done: Done, tmp_path: Path) -> None:
    out = tmp_path / "allocation.json"
    arguments = ("--window", 16, "--sparsity", 0.25, "--ratio", 2, "--out", out)
    text = done("rule-masks", rule, "--preset", "tiny", *arguments)
    allocation = Allocation.load(out)
    if rule == "head-share":
        assert allocation.full == ((True, True, True, False),) * 4
    else:
        assert allocation.full == tuple((full,) * 4 for full in EXPECTED[rule])
    assert allocation.window == 16
    assert text.splitlines()[-1] == f"{out}: {allocation.sparsity:.1%} of 4 x 4 KV heads use a window of 16"
    assert [line.split()[-2] for line in text.splitlines()[3::-1]] == [f"{sum(row)}/4" for row in allocation.full]

    shape = PRESETS["tiny"]
    counts = ("--layers", shape.num_hidden_layers, "--kv-heads", shape.num_key_value_heads)
    done("rule-masks", rule, *counts, *arguments[:-1], tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == out.read_text()


def test_defaults_of_the_rules(done: Done, tmp_path: Path) -> None:
    for rule, sparsity in (("interleaved", 0.75), ("head-share", 0.5), ("bottom-swa", 0.5)):
        done("rule-masks", rule, "--preset", "qwen3-0.6b", "--window", 1024, "--out", tmp_path / rule)
        written = json.loads((tmp_path / rule).read_text())
        assert (written["num_layers"], written["num_kv_heads"], written["sparsity"]) == (28, 8, sparsity)
