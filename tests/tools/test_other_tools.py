"""report, plan, verify-data, prepare-data and train by their command lines."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.config import build
from megaconsa.planning.plan import make_plan
from megaconsa.report.comparison import LEAST_FINAL_STEPS

Done = Callable[..., str]
Finished = Callable[[str], Path]
MakeConfig = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("heads", "learns its allocation"), ("trained", "trains on a fixed allocation")],
)
def test_report_of_a_run(
    name: str, kind: str, finished: Finished, done: Done, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "page.html"
    heading, row, wrote = done("report", finished(name), "--out", out).splitlines()
    assert heading.split()[:2] == ["run", "stage"]
    assert row.split()[0] == finished(name).name
    assert wrote == f"wrote {out}"
    page = out.read_text()
    assert kind in page
    assert "<svg" in page
    assert "training.learning_rate" in page
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_report_of_a_folder_of_runs_goes_into_it(
    finished: Finished, done: Done, tmp_path: Path
) -> None:
    for name in ("heads", "trained"):
        shutil.copytree(finished(name), tmp_path / name)
    assert done("report", tmp_path).endswith(f"wrote {tmp_path / 'report.html'}\n")
    page = (tmp_path / "report.html").read_text()
    assert page.index("<h2>heads") < page.index("<h2>trained")
    assert {path.name for path in tmp_path.iterdir()} == {"heads", "trained", "report.html"}


def test_rows_of_a_report(
    finished: Finished, megaconsa: Callable[..., Any], tmp_path: Path
) -> None:
    """The loss is the mean of the newest steps. Messages leave stdout to the rows."""
    run = finished("heads")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    out = tmp_path / "page.html"
    outcome = megaconsa("report", run, "--out", out, "--json")
    (row,) = json.loads(outcome.out)
    assert outcome.err == f"wrote {out}\n"
    newest = [step["loss"] for step in steps[-LEAST_FINAL_STEPS:]]
    assert row["loss"] == pytest.approx(sum(newest) / len(newest))
    assert (row["step"], row["stage"], row["sparsity"]) == (len(steps), "learns", 0.25)
    for form in ("--csv", "--markdown"):
        assert run.name in megaconsa("report", run, "--out", out, form).out


def test_plan_as_json_with_overrides_among_options(
    make_config: MakeConfig, done: Done, tmp_path: Path
) -> None:
    values = make_config(data={"path": "/nowhere"})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    options = ("--gpus", 2, "--device", "a100", "--mfu", 0.25, "--context", 4096)
    plan = json.loads(
        done("plan", config, "training.steps=11", *options, "training.micro_batch=1", "--json")
    )
    values["training"] |= {"steps": 11, "micro_batch": 1}
    assert plan.pop("smallest_change") is None
    assert plan == json.loads(json.dumps(make_plan(build(values), 2, "a100", 0.25, 4096).to_dict()))
    assert (plan["steps"], plan["accumulation"], plan["gpus"], plan["context"]) == (11, 2, 2, 4096)
    assert f"{plan['parameters']:,}" in done("plan", config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_plan_of_the_shipped_configurations(done: Done) -> None:
    from megaconsa import configs

    for config in sorted(Path(str(configs.__file__)).parent.glob("*.yaml")):
        text = config.read_text()
        if "\narms:" in text:
            continue  # a study
        allocation = []
        if "source: file" in text:
            allocation = ["allocation.source=rule", "allocation.file=null"]
        gpus = json.loads(done("plan", config, *allocation, "--json"))["gpus"]
        assert gpus == 1, config


def test_verify_data(
    small_data: Path, done: Done, megaconsa: Callable[..., Any], tmp_path: Path
) -> None:
    assert done("verify-data", small_data).endswith(f"{small_data}: all shards are intact\n")
    shutil.copytree(small_data, tmp_path / "data")
    shard = next((tmp_path / "data" / "validation").glob("shard.*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "data" / "train" / "index.json").write_text("{}")
    outcome = megaconsa("verify-data", tmp_path / "data")
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 2
    assert str(shard) in outcome.err
    assert "index.json" in outcome.err
    assert "intact" not in outcome.out


def test_prepared_data_verifies(done: Done, tmp_path: Path) -> None:
    """Prepares a .jsonl file and a folder through the command line.

    The same command again changes nothing.
    """
    text = Path(argparse.__file__).read_text()
    parts = [text[start : start + 1500] for start in range(0, 60_000, 1500)]
    (tmp_path / "texts").mkdir()
    for index, part in enumerate(parts[:20]):
        (tmp_path / "texts" / f"{index}.txt").write_text(part)
    (tmp_path / "lines.jsonl").write_text(
        "\n".join(json.dumps({"text": part}) for part in parts[20:])
    )
    out = tmp_path / "data"
    sizes = ("--train-tokenizer", 512, "--sequence-length", 16, "--validation-share", 0.2)
    command = ("prepare-data", tmp_path / "texts", tmp_path / "lines.jsonl", "--out", out, *sizes)
    printed = done(*command)
    assert "vocabulary 512" in printed
    rows = {words[0]: words[1] for line in printed.splitlines() if len(words := line.split()) == 4}
    assert int(rows["train"]) + int(rows["validation"]) == 40
    assert "intact" in done("verify-data", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done(*command)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_training_again_says_that_the_run_is_finished(finished: Finished, done: Done) -> None:
    run = finished("trained")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert f"{run} is finished: step 6" in done("train", run / "config.yaml")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
