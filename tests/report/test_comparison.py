"""What the report says about several runs together."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from megaconsa.errors import InputError
from megaconsa.report.comparison import (
    choose_baseline,
    differing_settings,
    estimate,
    loss_difference,
    placed,
    summary,
)
from megaconsa.report.page import write_report
from megaconsa.report.runs import find_runs
from megaconsa.reporting.plot_style import moving_average
from tests.support.made_evaluation import made_evaluation
from tests.support.made_runs import write_runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs at two depths: dense, learn, and sweep/train, which continues learn."""
    folder = tmp_path / "runs"
    write_runs(folder, steps=140)
    train = folder / "sweep" / "train"
    train.parent.mkdir()
    shutil.move(folder / "train", train)
    shutil.copytree(train, folder / "dense")
    _configure(folder / "dense", allocation={"rule": "dense", "sparsity": 0.0})
    for run in (folder / "dense", train):
        init_from = {"init_from": str(folder / "learn" / "checkpoints" / "step_30")}
        _configure(run, model=init_from, run={"dir": str(run)})
    return folder


def _configure(folder: Path, **sections: dict[str, object]) -> None:
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    for name, fields in sections.items():
        values[name] |= fields
    path.write_text(yaml.safe_dump(values))


def test_runs_are_found_at_any_depth_and_a_stage_continues_where_its_origin_was(
    folder: Path,
) -> None:
    learn, dense, train = find_runs(folder).runs
    assert [run.name for run in (learn, dense, train)] == ["learn", "dense", "sweep/train"]
    assert train.continues == "learn"
    assert train.tokens_before == 30 * 16_384
    assert placed(train, "loss")[0][0] == 31 * 16_384
    assert learn.tokens_before == 0


def test_what_is_left_out_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (folder / "young").mkdir()
    (folder / "young" / "metrics.jsonl").touch()
    (folder / "learn" / "gates.json").write_text("{}")
    (folder / "odd").mkdir()
    (folder / "odd" / "evaluation.json").write_text("[]")
    found = find_runs(folder)
    assert [run.name for run in found.runs] == ["dense", "sweep/train"]
    assert [each.folder.name for each in found.left_out] == ["learn", "odd", "young"]
    page = write_report(folder, tmp_path / "page.html").read_text()
    for text in (caplog.text, page):
        assert "no step has ended" in text
        assert "gates.json" in text
        assert "evaluation.json" in text


def test_differences_are_paired_and_know_their_error(folder: Path) -> None:
    dense = folder / "dense" / "metrics.jsonl"
    train = folder / "sweep" / "train" / "metrics.jsonl"
    rows = [json.loads(line) for line in dense.read_text().splitlines()]
    for row in rows:
        row["loss"] += 0.25
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = find_runs(folder).runs
    baseline = choose_baseline(runs, None)
    assert baseline is not None
    assert baseline.name == "dense"
    _, difference = loss_difference(runs[2], baseline, "loss")
    assert np.allclose(difference, 0.25)
    table = summary(runs, baseline)
    cells = dict(zip(table.headings, table.rows[2], strict=True))
    assert cells["training - dense"] == "+0.2500 ± 0.0000"
    assert re.fullmatch(r"\d\.\d{4} ± 0\.0\d{3}", cells["training loss"])
    assert cells["continues"] == "learn"
    with pytest.raises(InputError, match="choose one of learn, dense, sweep/train"):
        choose_baseline(runs, "none")


def test_settings_that_differ(folder: Path) -> None:
    table = differing_settings(find_runs(folder).runs)
    assert table.headings == ["setting", "learn", "dense", "sweep/train"]
    values = {row[0]: row[1:] for row in table.rows}
    assert values["training.steps"] == ["140", "420", "420"]
    assert values["allocation.rule"][1:] == ["dense", "head-share"]
    assert "run.dir" not in values
    assert "training.micro_batch" not in values


def test_error_of_a_final_loss_ignores_its_slope() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.1, 400)
    found = estimate(5 - np.linspace(0, 1, 400) + noise)
    assert found is not None
    assert found.error == pytest.approx(0.1 / 20, rel=0.1)
    assert found.value == pytest.approx(4.5 + noise.mean())
    short = estimate(np.ones(3))
    assert short is not None
    assert short.error is None
    assert estimate(np.ones(0)) is None


def test_moving_average_keeps_a_slope() -> None:
    line = np.linspace(0, 1, 50)
    assert np.allclose(moving_average(line, 9), line)
    noise = np.random.default_rng(0).normal(0, 1, 1000)
    assert moving_average(noise, 25)[50:-50].std() < 0.3


def test_evaluations_are_in_the_report(folder: Path, tmp_path: Path) -> None:
    made_evaluation().save(folder / "evaluation" / "evaluation.json")
    page = write_report(folder, tmp_path / "page.html").read_text()
    for title in ("Perplexity by position", "Needles: random"):
        assert title in page
    for figure in ("+0.0080 ± 0.0010", "0.6000 ± 0.0500"):
        assert figure in page


def test_learning_claims_no_savings_of_its_own(folder: Path, tmp_path: Path) -> None:
    page = write_report(folder / "learn", tmp_path / "page.html").read_text()
    assert "<dt>training FLOPs</dt>" not in page
    assert "FLOPs of stage 2" in page
    assert "learning saves none" in page
