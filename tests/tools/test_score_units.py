"""score-units: the table it writes and prints, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from megaconsa.checkpoint import store
from megaconsa.consa.allocation import Allocation, as_rows
from megaconsa.consa.constraint import Constraint
from megaconsa.evaluation.unit_scores import Method, ScoreRequest, score_units
from megaconsa.reporting.terminal import text_map
from megaconsa.tools.score_units import OPTIONS

Done = Callable[..., str]
Refused = Callable[..., str]
Finished = Callable[[str], Path]

FROZEN = ("--sequences", 4)
TRAINED = ("--steps", 2)
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "leave-one-out": FROZEN,
    "leave-one-in": FROZEN,
    "gradient": (*FROZEN, "--z", 0.25),
    "attention-mass": FROZEN,
    "calibrate": TRAINED,
    "scalar-gates": (*TRAINED, "--weight-learning-rate", 1e-4),
}


def test_every_method_has_options() -> None:
    assert list(OPTIONS) == list(get_args(Method))
    assert set(OPTIONS) == {*ARGUMENTS, "file"}


@pytest.mark.parametrize("method", ARGUMENTS)
def test_table_scores_and_text(method: str, finished: Finished, done: Done, tmp_path: Path) -> None:
    run = finished("trained")
    out = tmp_path / "new" / "table.json"
    saved = tmp_path / "scores.json"
    arguments = ("--method", method, "--out", out, "--save-scores", saved, "--device", "cpu")
    text = done("score-units", run, *arguments, *ARGUMENTS[method])

    written = json.loads(saved.read_text())
    scores = torch.tensor(written["scores"], dtype=torch.float64)
    allocation = Allocation.load(out)
    assert allocation.full == as_rows(Constraint(4, 4, 0.75, scope="global").top_k(scores))
    assert (allocation.window, allocation.target_sparsity, allocation.sparsity) == (8, 0.75, 0.75)
    assert (allocation.granularity, allocation.scope) == ("kv_head", "global")
    tokens = store.resolve(run).state["tokens"]
    origin = {"run": str(run), "step": 6, "tokens": tokens, "sequences": 4, "seed": 0}
    assert allocation.origin == {"method": method, **origin}

    has_errors = method not in ("calibrate", "scalar-gates")
    assert (written["standard_errors"] is not None) == has_errors
    assert {name: written[name] for name in allocation.origin} == allocation.origin
    assert (written["window"], written["granularity"]) == (8, "kv_head")

    assert text_map(allocation) in text
    largest = next(line for line in text.splitlines() if line.startswith("largest scores: "))
    named = re.findall(r"layer (\d) head (\d) \(([^ )]+)( ± [^)]+)?\)", largest)
    assert len(named) == 10
    assert all(bool(error) == has_errors for *_, error in named)
    best = int(scores.argmax())
    assert (int(named[0][0]), int(named[0][1])) == (best // 4, best % 4)
    assert text.splitlines()[-1].startswith(f"{out}: sparsity 0.7500 (target 0.75), window 8, ")


def test_defaults_are_those_of_the_request(finished: Finished, done: Done, tmp_path: Path) -> None:
    run = finished("trained")
    saved = tmp_path / "scores.json"
    arguments = ("--method", "gradient", "--out", tmp_path / "table.json", "--device", "cpu")
    done("score-units", run, *arguments, "--save-scores", saved)
    request = ScoreRequest("gradient", torch.device("cpu"))
    assert json.loads(saved.read_text()) == score_units(store.resolve(run), request).to_json()


def test_layers_and_a_floor(finished: Finished, done: Done, tmp_path: Path) -> None:
    run = finished("trained")
    out = tmp_path / "table.json"
    common = ("score-units", run, "--method", "gradient", "--sequences", 4, "--out", out)
    text = done(*common, "--scope", "global", "--granularity", "layer")
    allocation = Allocation.load(out)
    assert (allocation.granularity, allocation.scope) == ("layer", "global")
    assert sorted(allocation.full) == [(False,) * 4] * 3 + [(True,) * 4]
    assert " head " not in text

    done(*common, "--scope", "global", "--floor", 1, "--sparsity", 0.625, "--window", 4)
    allocation = Allocation.load(out)
    assert all(any(row) for row in allocation.full)
    assert (allocation.window, allocation.sparsity) == (4, 0.625)


def test_file(finished: Finished, done: Done, tmp_path: Path) -> None:
    run = finished("trained")
    pattern = tmp_path / "full_attention_heads.tsv"
    pattern.write_text("0.1\t0.9\t0.2\t0.3\n" * 3 + "0.1\t0.2\t0.3\t1.0\n")
    out = tmp_path / "table.json"
    text = done("score-units", run, "--method", "file", "--scores", pattern, "--out", out)
    allocation = Allocation.load(out)
    assert allocation.full == ((False, True, False, False),) * 3 + ((False, False, False, True),)
    assert allocation.origin["scores"] == str(pattern)
    assert "layer 3 head 3 (1), layer 0 head 1 (0.9), " in text


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("gradient", ("--sequences", 3), "too few sequences for evidence"),
        ("gradient", ("--z", 0), "--z 0 must lie between 0 and 1"),
        ("gradient", ("--window", 64), "--window 64 hides nothing"),
        ("gradient", ("--data", "/nowhere"), "data /nowhere: no such folder"),
        ("gradient", ("--device", "abacus"), "--device abacus is unknown"),
        ("gradient", ("--steps", 4), "--steps 4 has no effect on --method gradient"),
        ("leave-one-out", ("--z", 0.5), "--z 0.5 has no effect on --method leave-one-out"),
        ("calibrate", ("--sequences", 4), "--sequences 4 has no effect on --method calibrate"),
        ("calibrate", ("--learning-rate", 0), "--learning-rate 0 must be a positive number"),
        ("calibrate", ("--learning-rate", "nan"), "--learning-rate nan must be a positive number"),
        ("file", ("--seed", 1), "--seed 1 has no effect on --method file"),
        ("file", (), "--method file needs --scores FILE"),
        ("file", ("--scores", "SCORES"), "line 2 holds 'x', which is not a finite number"),
        ("gradient", ("--sparsity", 0.3), "allocation.sparsity=0.3 cannot be met"),
        (
            "gradient",
            ("--scope", "per_layer", "--granularity", "layer"),
            "use allocation.scope=global",
        ),
        (
            "gradient",
            ("--scope", "per_layer", "--floor", 1),
            "allocation.floor=1 needs allocation.scope=global",
        ),
        ("gradient", ("--save-scores", "FOLDER"), "is a folder; name a file in it"),
    ],
)
def test_refusals_write_nothing(
    method: str,
    arguments: tuple[Any, ...],
    said: str,
    finished: Finished,
    refused: Refused,
    tmp_path: Path,
) -> None:
    (tmp_path / "scores.tsv").write_text("1\t2\t3\t4\n1\tx\t3\t4\n")
    places = {"SCORES": tmp_path / "scores.tsv", "FOLDER": tmp_path}
    words = [places.get(word, word) for word in arguments]
    common = ("--method", method, "--out", tmp_path / "table.json")
    assert said in refused("score-units", finished("trained"), *common, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.tsv"]


def test_checkpoint_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    common = ("--method", "gradient", "--out", tmp_path / "table.json")
    assert "it does not exist" in refused("score-units", tmp_path / "nowhere", *common)
    assert not list(tmp_path.iterdir())
