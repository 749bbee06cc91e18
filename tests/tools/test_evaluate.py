"""`megaconsa evaluate`, from exported folders to the figures, the table and the picture."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megaconsa.evaluation import perplexity
from tests.support.evaluations import SMALL, Done


def test_models_side_by_side(
    exports: Path,
    small_data: Path,
    done: Done,
    tmp_path: Path,
    results: Callable[[], dict[str, Any]],
) -> None:
    models = [
        "--model",
        f"dense={exports / 'dense'}",
        "--model",
        f"rule={exports / 'layers'}",
        "--model",
        exports / "heads",
    ]
    text = done("evaluate", *models, "--data", small_data, "--out", tmp_path / "out", *SMALL)
    record = results()
    assert list(record["models"]) == ["dense", "rule", "heads"]
    assert {name: model["window"] for name, model in record["models"].items()} == {
        "dense": None,
        "rule": 8,
        "heads": 8,
    }
    assert record["settings"]["perplexity"] == {"length": 32, "documents": 3}
    for name, model in record["models"].items():
        assert sum(model["perplexity"]["tokens"]) == 3 * 32
        assert [(cell["length"], cell["depth"]) for cell in model["needle"]] == [
            (80, 0),
            (80, 1),
            (100, 0),
            (100, 1),
        ]
        assert (name in record["differences"]) == (name != "dense")
    for part in (
        "dense",
        "heads",
        "window 8",
        "16-31 (48 / 3)",
        "all (96 / 3)",
        "loss less that of dense",
        "100 tokens",
    ):
        assert part in text
    with Image.open(tmp_path / "out" / "evaluation.png") as picture:
        assert picture.size[0] == 1500
        assert np.asarray(picture.convert("L")).std() > 10


def test_what_is_there_is_not_measured_again(
    exports: Path,
    small_data: Path,
    done: Done,
    megaconsa: Callable[..., Any],
    tmp_path: Path,
    results: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A command that was stopped resumes, and models and parts can be added.

    The figures are those of a single uninterrupted command.
    """
    out = ["--data", small_data, "--out", tmp_path / "out", *SMALL]
    dense = ["--model", exports / "dense"]
    heads = ["--model", exports / "heads"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megaconsa.evaluation.needle.measure", stop)
        assert megaconsa("evaluate", *dense, *out).code == 130
    first = results()["models"]["dense"]
    assert first["perplexity"]
    assert first["needle"] is None
    assert "dense: perplexity is there already" in done("evaluate", *dense, *out)
    assert results()["models"]["dense"] == first | {
        "needle": results()["models"]["dense"]["needle"]
    }
    text = done("evaluate", *dense, *heads, *out)
    assert "dense: needle is there already" in text
    assert "heads: needles: 8/8" in text
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    done("evaluate", *heads, *out)
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before
    done("evaluate", *dense, *heads, "--data", small_data, "--out", tmp_path / "whole", *SMALL)
    assert (tmp_path / "whole" / "evaluation.json").read_bytes() == before


def test_other_forms_hold_the_same_rows(
    exports: Path,
    small_data: Path,
    done: Done,
    megaconsa: Callable[..., Any],
    tmp_path: Path,
    results: Callable[[], dict[str, Any]],
) -> None:
    models = ["--model", exports / "dense", "--model", exports / "heads"]
    command = ["evaluate", *models, "--data", small_data, "--out", tmp_path / "out", *SMALL]
    text = done(*command)

    def stdout(form: str) -> str:
        outcome = megaconsa(*command, form)
        # Messages leave stdout to the rows.
        assert "perplexity is there already" in outcome.err
        return str(outcome.out)

    rows = json.loads(stdout("--json"))
    loss = results()["differences"]["heads"]
    section = [row for row in rows if row["section"] == "loss less that of dense"]
    assert [row["heads"] for row in section] == [*loss["loss"], loss["overall_loss"]]
    assert section[0]["heads ±"] == loss["standard_error"][0]
    assert all(row["quantity"].strip() in text for row in rows)
    read = list(csv.DictReader(stdout("--csv").splitlines()))
    assert [row["quantity"] for row in read] == [row["quantity"] for row in rows]
    lines = stdout("--markdown").splitlines()
    assert sum("**" not in line for line in lines) == len(rows) + 2


def test_a_model_exported_again_is_measured_again(
    exports: Path,
    small_data: Path,
    done: Done,
    tmp_path: Path,
    results: Callable[[], dict[str, Any]],
) -> None:
    model = tmp_path / "hf"
    shutil.copytree(exports / "dense", model)
    command = [
        "evaluate",
        "--model",
        model,
        "--data",
        small_data,
        "--out",
        tmp_path / "out",
        *SMALL,
        "--needles",
        0,
    ]
    done(*command)
    before = results()["models"]["hf"]
    shutil.rmtree(model)
    shutil.copytree(exports / "layers", model)
    assert "hf: not the model that was evaluated before" in done(*command)
    after = results()["models"]["hf"]
    assert after["digest"] != before["digest"]
    assert after["perplexity"]["loss"] != before["perplexity"]["loss"]


def test_settings_that_the_data_decides(
    exports: Path,
    small_data: Path,
    done: Done,
    tmp_path: Path,
    results: Callable[[], dict[str, Any]],
) -> None:
    done(
        "evaluate",
        "--model",
        exports / "dense",
        "--data",
        small_data,
        "--out",
        tmp_path / "out",
        "--needles",
        0,
    )
    settings = results()["settings"]
    assert settings["perplexity"] == {"length": 64, "documents": 256}
    assert (settings["dtype"], settings["needle"]) == ("float32", None)


def test_bfloat16(
    exports: Path,
    small_data: Path,
    done: Done,
    tmp_path: Path,
    results: Callable[[], dict[str, Any]],
) -> None:
    done(
        "evaluate",
        "--model",
        exports / "dense",
        "--data",
        small_data,
        "--out",
        tmp_path / "out",
        *SMALL,
        "--dtype",
        "bfloat16",
    )
    assert results()["models"]["dense"]["perplexity"]["loss"][0] > 0


def test_edges_reach_the_length() -> None:
    assert all(perplexity.bucket_edges(length)[-1] == length for length in range(1, 300))
