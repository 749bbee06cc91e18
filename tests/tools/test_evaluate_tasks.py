"""`megaconsa evaluate --task`, with tasks of lm-eval."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaconsa.huggingface.load import load_exported
from tests.support import ROOT
from tests.support.evaluations import Refused
from tests.support.exports import ALLOCATIONS, make_export

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "blue"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_tasks_without_lm_eval(
    exports: Path,
    small_data: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    error = refused(
        "evaluate",
        "--model",
        exports / "dense",
        "--data",
        small_data,
        "--out",
        tmp_path / "out",
        "--task",
        "colours",
    )
    assert error == (
        "error: --task needs lm-eval; install it with: pip install 'megaconsa[harness]'\n"
    )


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_a_local_task(
    exports: Path,
    small_data: Path,
    refused: Refused,
    tmp_path: Path,
    results: Callable[[], dict[str, Any]],
) -> None:
    """Runs the script, whose name is that of a package that lm-eval imports.

    The accuracy must equal a count in this test.
    """
    questions = [(f"The colour of number {n} is", n % 2) for n in range(12)]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in questions]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "test.jsonl").write_text("\n".join(lines))
    (tasks / "colours.yaml").write_text(TASK.format(data="test.jsonl"))
    models = ["--model", exports / "dense", "--model", exports / "heads"]
    out = [
        "--data",
        small_data,
        "--out",
        tmp_path / "out",
        "--task-folder",
        tasks,
        "--documents",
        0,
        "--needles",
        0,
    ]
    command = [
        sys.executable,
        ROOT / "tools" / "evaluate_models.py",
        *models,
        *out,
        "--task",
        "colours",
    ]
    ended = subprocess.run(
        [*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "colours (acc)" in ended.stdout
    assert (tmp_path / "out" / "evaluation.png").is_file()
    for name, record in results()["models"].items():
        model, tokenizer = load_exported(exports / name)
        right = 0
        for question, answer in questions:
            scores = []
            for choice in ("red", "blue"):
                asked = tokenizer(question).input_ids
                whole = tokenizer(f"{question} {choice}").input_ids
                with torch.no_grad():
                    logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                scores.append(
                    sum(float(logits[i - 1, whole[i]]) for i in range(len(asked), len(whole)))
                )
            right += int(np.argmax(scores)) == answer
        assert record["harness"]["colours"]["acc"]["value"] == pytest.approx(right / len(questions))
    ended = subprocess.run(
        [*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.stdout.count("harness is there already") == 2
    said = refused("evaluate", *models, *out, "--task", "shapes")
    assert said == f"error: --task shapes is not in {tasks}\n"
    bare = make_export(tmp_path / "bare", ALLOCATIONS["dense"], None)
    said = refused("evaluate", "--model", bare, *out, "--task", "colours")
    assert "--task needs a tokenizer" in said
    (tasks / "test.jsonl").unlink()
    said = refused(
        "evaluate", *models, *out[:2], "--out", tmp_path / "new", *out[4:], "--task", "colours"
    )
    assert "--task colours: data cannot be read" in said
    assert not (tmp_path / "new").exists()
