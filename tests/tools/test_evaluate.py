"""megaconsa evaluate, from exported folders to the figures, the table and the picture."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.exports import ALLOCATIONS, SHAPE, make_export
from huggingface.reference import random_weights
from PIL import Image

from megaconsa.data.prepare import prepare
from megaconsa.evaluation import perplexity
from megaconsa.huggingface.export import export
from megaconsa.huggingface.load import load_exported

ROOT = Path(__file__).parents[2]
Done, Refused = Callable[..., str], Callable[..., str]
SMALL = (
    "--documents",
    3,
    "--length",
    32,
    "--needle-length",
    80,
    "--needle-length",
    100,
    "--depth",
    0,
    "--depth",
    1,
    "--needles",
    2,
)
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


@pytest.fixture(scope="session")
def exports(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of each kind."""
    folder = tmp_path_factory.mktemp("exports")
    for name, allocation in ALLOCATIONS.items():
        make_export(folder / name, allocation, small_data / "tokenizer")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    return lambda: json.loads((tmp_path / "out" / "evaluation.json").read_text())


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
    """A command that was stopped goes on, models and parts can be added, and the figures are those of one go."""
    out = ["--data", small_data, "--out", tmp_path / "out", *SMALL]
    dense, heads = ["--model", exports / "dense"], ["--model", exports / "heads"]

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--length", 161),
            "--length 161 is more than {dense} has positions: max_position_embeddings=160",
        ),
        (("--length", 10**6), "--length 1000000 is more than the longest held-out document has: "),
        (("--needle-length", 161), "--needle-length 161 is more than {dense} has positions"),
        (
            ("--needle-length", 20),
            "--needle-length 20 leaves no haystack: needle, question and answer take ",
        ),
        (("--needle-length", 10**6), "--needle-length 1000000 is more than the "),
        (
            ("--documents", 0, "--needles", 0),
            "--documents 0 and --needles 0 without --task leave nothing to evaluate",
        ),
        (
            ("--model", "other={dense}/nowhere"),
            "model {dense}/nowhere is not there; give a folder that export-hf made",
        ),
        (
            ("--model", "{dense}"),
            "two models are called dense; give each a label of its own, --model LABEL={dense}",
        ),
        (("--model", "={dense}"), "--model ={dense} is neither LABEL=FOLDER nor FOLDER"),
        (("--model", "{data}"), "{data} is not a model folder: config.json cannot be read"),
        (("--device", "tpu"), "--device tpu is unknown; choose auto, cpu, cuda or cuda:N"),
        (("--device", "cuda:64"), "--device cuda:64 is not there: this machine has "),
        (
            ("--task-folder", "{data}"),
            "--task-folder {data} without --task NAME; name the tasks to run",
        ),
    ],
)
def test_refused(
    arguments: tuple[object, ...],
    said: str,
    exports: Path,
    small_data: Path,
    refused: Refused,
    tmp_path: Path,
) -> None:
    places = {"dense": exports / "dense", "data": small_data}
    command = ["--model", exports / "dense", "--data", small_data, "--out", tmp_path / "out"]
    error = refused(
        "evaluate", *command, *(str(argument).format(**places) for argument in arguments)
    )
    assert said.format(**places) in error
    assert not (tmp_path / "out").exists()


def test_needles_that_do_not_fit_the_data(
    exports: Path, small_data: Path, refused: Refused, tmp_path: Path
) -> None:
    """Its sequences of 64 tokens are too short for any of the default lengths."""
    error = refused(
        "evaluate", "--model", exports / "dense", "--data", small_data, "--out", tmp_path / "out"
    )
    assert "64 tokens are too few for needle, question and as much text" in error


def test_a_run_and_a_checkpoint(
    finished: Callable[[str], Path], small_data: Path, refused: Refused, tmp_path: Path
) -> None:
    run = finished("stock")
    for folder, kind in ((run, "a run"), (run / "checkpoints" / "step_6", "a checkpoint")):
        error = refused(
            "evaluate", "--model", folder, "--data", small_data, "--out", tmp_path / "out"
        )
        assert (
            f"{folder} is {kind}, not an exported model; export it first: megaconsa export-hf {folder} --out FOLDER"
            in error
        )


def test_another_vocabulary(
    exports: Path, small_data: Path, refused: Refused, tmp_path: Path
) -> None:
    paragraphs = inspect.getsource(shutil).split("\n\n")
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in paragraphs)
    )
    prepare(
        [str(tmp_path / "text.jsonl")],
        tmp_path / "data",
        train_tokenizer=512,
        sequence_length=16,
        validation_share=0.3,
    )
    error = refused(
        "evaluate",
        "--model",
        exports / "dense",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
    )
    assert f"{exports / 'dense'} has another tokenizer than the data {tmp_path / 'data'}" in error
    smaller = make_export(
        tmp_path / "smaller", ALLOCATIONS["dense"], None, replace(SHAPE, vocab_size=256)
    )
    error = refused("evaluate", "--model", smaller, "--data", small_data, "--out", tmp_path / "out")
    assert (
        f"{smaller} has a vocabulary of 256 tokens, but the data {small_data} one of 512" in error
    )


def test_data_without_a_tokenizer(
    exports: Path, small_data: Path, refused: Refused, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(small_data, tmp_path / "data"))
    shutil.rmtree(data / "tokenizer")
    error = refused(
        "evaluate", "--model", exports / "dense", "--data", data, "--out", tmp_path / "out", *SMALL
    )
    assert f"tokenizer {data / 'tokenizer'}: no such folder" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--length", 16), "perplexity.length 32, not 16"),
        (("--seed", 1), "needle.seed 0, not 1"),
        (("--dtype", "bfloat16"), "dtype float32, not bfloat16"),
    ],
)
def test_a_different_evaluation(
    arguments: tuple[object, ...],
    said: str,
    exports: Path,
    small_data: Path,
    done: Done,
    refused: Refused,
    tmp_path: Path,
) -> None:
    command = [
        "evaluate",
        "--model",
        exports / "dense",
        "--data",
        small_data,
        "--out",
        tmp_path / "out",
        *SMALL,
    ]
    done(*command)
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    error = refused(*command, *arguments)
    assert (
        error
        == f"error: {tmp_path / 'out'} holds an evaluation with {said}; choose another --out, or remove it\n"
    )
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before


def test_a_folder_of_something_else(
    exports: Path, small_data: Path, refused: Refused, tmp_path: Path
) -> None:
    command = ["evaluate", "--model", exports / "dense", "--data", small_data, "--out"]
    assert f"out={exports} exists and is not an evaluation's folder" in refused(*command, exports)
    (tmp_path / "evaluation.json").write_text('{"version": 2}')
    assert f"{tmp_path / 'evaluation.json'}: version: " in refused(*command, tmp_path)


def test_a_model_that_gives_nothing_finite(
    small_data: Path, megaconsa: Callable[..., Any], tmp_path: Path
) -> None:
    """Weights that overflow half precision."""
    weights = {
        name: value * 3e4 if "mlp.down" in name or "mlp.up" in name else value
        for name, value in random_weights(SHAPE).items()
    }
    export(
        weights,
        SHAPE,
        ALLOCATIONS["dense"],
        tmp_path / "hf",
        tokenizer=None,
        dtype=torch.float32,
        origin=None,
    )
    command = [
        "--model",
        tmp_path / "hf",
        "--data",
        small_data,
        "--out",
        tmp_path / "out",
        *SMALL,
        "--dtype",
        "float16",
    ]
    outcome = megaconsa("evaluate", *command)
    assert outcome.code == 1
    assert (
        "losses are not finite; export an earlier checkpoint, or evaluate with --dtype float32"
        in outcome.err
    )


def test_out_of_gpu_memory(
    exports: Path,
    small_data: Path,
    megaconsa: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhaust(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("megaconsa.evaluation.needle.measure", exhaust)
    outcome = megaconsa(
        "evaluate",
        "--model",
        exports / "dense",
        "--data",
        small_data,
        "--out",
        tmp_path / "out",
        *SMALL,
    )
    said = (
        "error: dense: out of GPU memory; the same command goes on with a smaller --batch-tokens\n"
    )
    assert (outcome.code, outcome.err) == (1, said)


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
    assert (
        error == "error: --task needs lm-eval; install it with: pip install 'megaconsa[harness]'\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_a_local_task(
    exports: Path,
    small_data: Path,
    refused: Refused,
    tmp_path: Path,
    results: Callable[[], dict[str, Any]],
) -> None:
    """By the script, whose name is that of a package that lm-eval imports; accuracy as counted by hand."""
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
    command = [sys.executable, ROOT / "tools" / "evaluate.py", *models, *out, "--task", "colours"]
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
                asked, whole = (
                    tokenizer(text).input_ids for text in (question, f"{question} {choice}")
                )
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


def test_edges_reach_the_length() -> None:
    assert all(perplexity.bucket_edges(length)[-1] == length for length in range(1, 300))
