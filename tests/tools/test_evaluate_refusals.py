"""What `megaconsa evaluate` refuses, and how it fails."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.huggingface.export import export
from tests.support.evaluations import SMALL, Done, Refused
from tests.support.exports import ALLOCATIONS, SHAPE, make_export
from tests.support.transformers_reference import random_weights


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
    """Sequences of 64 tokens are too short for all default lengths."""
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
        expected = (
            f"{folder} is {kind}, not an exported model; "
            f"export it first: megaconsa export-hf {folder} --out FOLDER"
        )
        assert expected in error


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
        Options(sequence_length=16, validation_share=0.3),
        train_tokenizer=512,
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
    assert error == (
        f"error: {tmp_path / 'out'} holds an evaluation with {said}; "
        "choose another --out, or remove it\n"
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
    """The weights overflow half precision."""
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
        "error: dense: out of GPU memory; "
        "the same command continues with a smaller --batch-tokens\n"
    )
    assert (outcome.code, outcome.err) == (1, said)
