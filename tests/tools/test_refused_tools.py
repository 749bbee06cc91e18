"""What the tools refuse: one sentence, exit code 2, nothing written.

The refusals of `train` are in tests/training.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
import yaml

from megaconsa.consa import rules

Refused = Callable[..., str]
Finished = Callable[[str], Path]


@pytest.fixture
def untouched(refused: Refused, tmp_path: Path) -> Refused:
    """Like `refused`, and also checks that tmp_path has not changed."""

    def listing() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def run(*arguments: object) -> str:
        before = listing()
        message = refused(*arguments)
        assert listing() == before
        return message

    return run


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A learning run that the test may damage."""
    shutil.copytree(finished("heads"), tmp_path / "run")
    return tmp_path / "run"


def test_damaged_checkpoint(run: Path, untouched: Refused, tmp_path: Path) -> None:
    weights = run / "checkpoints" / "step_6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for command in ("finalize-masks", "export-hf"):
        message = untouched(command, weights.parent, "--out", tmp_path / "out")
        assert f"checkpoint is damaged: {weights} does not match its checksum" in message


def test_run_without_a_checkpoint(run: Path, untouched: Refused, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    for command in ("finalize-masks", "export-hf"):
        assert "holds no usable checkpoint" in untouched(command, run, "--out", tmp_path / "out")


def test_checkpoint_of_another_format(run: Path, untouched: Refused, tmp_path: Path) -> None:
    state = run / "checkpoints" / "step_6" / "state.json"
    state.write_text(state.read_text().replace('"version": 1', '"version": 2', 1))
    assert "has format version 2" in untouched(
        "finalize-masks", state.parent, "--out", tmp_path / "out"
    )


@pytest.mark.parametrize(
    "command",
    [("finalize-masks", "RUN"), ("rule-masks", "dense", "--preset", "tiny", "--window", "8")],
)
def test_table_in_the_place_of_a_folder(
    command: tuple[str, ...], finished: Finished, untouched: Refused, tmp_path: Path
) -> None:
    out = tmp_path / "folder"
    out.mkdir()
    arguments = [finished("heads") if word == "RUN" else word for word in command]
    assert str(out) in untouched(*arguments, "--out", out)


@pytest.mark.parametrize(
    "command",
    [("finalize-masks", "RUN"), ("rule-masks", "dense", "--preset", "tiny", "--window", "8")],
)
def test_table_below_a_file(
    command: tuple[str, ...], finished: Finished, untouched: Refused, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    arguments = [finished("heads") if word == "RUN" else word for word in command]
    assert str(tmp_path / "file") in untouched(
        *arguments, "--out", tmp_path / "file" / "allocation.json"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tallest", "--preset", "tiny"), "rule 'tallest' is unknown; choose one of dense"),
        (("dense", "--preset", "qwen9"), "--preset qwen9 is unknown; choose one of tiny"),
        (("dense",), "give either --preset or both --layers and --kv-heads"),
        (("dense", "--kv-heads", 4), "give either --preset or both"),
        (
            ("head-share", "--preset", "tiny", "--sparsity", 0.3),
            "possible are 0, 0.25, 0.5, 0.75, 1",
        ),
        (("bottom-swa", "--preset", "tiny", "--sparsity", 1.5), "must lie between 0 and 1"),
        (("interleaved", "--preset", "tiny", "--ratio", 0), "ratio=0"),
    ],
)
def test_rule_masks(
    arguments: tuple[object, ...], said: str, untouched: Refused, tmp_path: Path
) -> None:
    assert said in untouched(
        "rule-masks", *arguments, "--window", 8, "--out", tmp_path / "allocation.json"
    )


def test_export_of_a_learning_run_needs_a_table_that_fits(
    finished: Finished, untouched: Refused, tmp_path: Path
) -> None:
    export = ("export-hf", finished("heads"), "--out", tmp_path / "hf")
    out = tmp_path / "allocation.json"
    assert "was still learning its allocation; run finalize-masks" in untouched(*export)
    assert "does not exist" in untouched(*export, "--allocation", out)
    rules.dense(2, 4, 8).save(out)
    assert "made for 2 layers x 4 KV heads, but the model has 4 x 4" in untouched(
        *export, "--allocation", out
    )
    out.write_text("{}")
    assert str(out) in untouched(*export, "--allocation", out)


def test_export_never_overwrites(finished: Finished, untouched: Refused, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").touch()
    assert "is not an empty folder" in untouched(
        "export-hf", finished("trained"), "--out", tmp_path / "hf"
    )
    assert "is not an empty folder" in untouched(
        "export-hf", finished("trained"), "--out", tmp_path / "hf" / "precious"
    )


def test_export_without_its_tokenizer(
    run: Path, finished: Finished, untouched: Refused, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "hf")
    assert "is not a tokenizer folder" in untouched(
        "export-hf", finished("trained"), *out, "--tokenizer", tmp_path
    )
    moved = moved_data(finished("trained"), tmp_path)
    assert "is not there any more; give its folder with --tokenizer" in untouched(
        "export-hf", moved, *out
    )


def test_verify_without_held_out_data_writes_nothing(
    finished: Finished, small_data: Path, untouched: Refused, tmp_path: Path
) -> None:
    """What --verify needs is checked before the export is written."""
    moved = moved_data(finished("trained"), tmp_path)
    tokenizer = ("--tokenizer", small_data / "tokenizer")
    assert "no such folder" in untouched(
        "export-hf", moved, "--out", tmp_path / "hf", *tokenizer, "--verify", 64
    )


def moved_data(run: Path, folder: Path) -> Path:
    """Copies the run's newest checkpoint, with a data path that no longer exists."""
    checkpoint = folder / "moved"
    shutil.copytree(run / "checkpoints" / "step_6", checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["data"]["path"] = str(folder / "gone")
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = (checkpoint / "state.json").read_bytes()
    manifest["files"]["state.json"] = {
        "bytes": len(content),
        "xxh3_64": xxhash.xxh3_64(content).hexdigest(),
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint


def test_negative_number_of_tokens_to_verify(
    finished: Finished, megaconsa: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = megaconsa("export-hf", finished("stock"), "--out", tmp_path / "hf", "--verify", -1)
    assert outcome.code == 2
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("training.lerning_rate=1",), "did you mean training.learning_rate?"),
        (("training.steps",), "is not of the form section.field=value"),
        (("--gpu", "abacus"), "--gpu abacus"),
        (("--mfu", 1.5), "--mfu 1.5 must lie between 0 and 1"),
        (("--gpus", 3), "training.global_batch=4 must be a multiple"),
        (("--csv", "--markdown"), "choose one of them"),
        (
            ("allocation.source=file", "allocation.file=/dev/null"),
            "allocation file /dev/null cannot be read",
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_plan(
    arguments: tuple[object, ...],
    said: str,
    as_json: bool,
    make_config: Callable[..., Any],
    untouched: Refused,
    tmp_path: Path,
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(make_config()))
    assert said in untouched(
        "plan", tmp_path / "config.yaml", *arguments, *(["--json"] if as_json else [])
    )


@pytest.mark.parametrize("command", [("plan",), ("train",)])
@pytest.mark.parametrize("content", [None, "", "- 1", "run: [", "\x00"])
def test_no_configuration(
    command: tuple[str, ...], content: str | None, untouched: Refused, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    untouched(*command, config)
    untouched(*command, tmp_path)


def test_report(run: Path, untouched: Refused, tmp_path: Path) -> None:
    assert "does not exist" in untouched("report", tmp_path / "nowhere")
    assert "does not exist" in untouched("report", run / "metrics.jsonl")
    assert "is a folder" in untouched("report", run, "--out", tmp_path)
    assert "is not a run folder" in untouched("report", run / "checkpoints")


def test_report_below_a_file(run: Path, untouched: Refused, tmp_path: Path) -> None:
    assert str(run / "metrics.jsonl") in untouched(
        "report", run, "--out", run / "metrics.jsonl" / "page.html"
    )


def test_verify_data(untouched: Refused, tmp_path: Path) -> None:
    assert "no such folder" in untouched("verify-data", tmp_path / "nowhere")
    assert "it has no dataset.json" in untouched("verify-data", tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    assert str(tmp_path / "dataset.json") in untouched("verify-data", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give one of --tokenizer FOLDER and --train-tokenizer VOCAB"),
        (("--tokenizer", "nowhere", "--train-tokenizer", 512), "one of"),
        (("--tokenizer", "nowhere"), "nowhere"),
        (("--train-tokenizer", 3, "--validation-share", 0), "3"),
        (("--train-tokenizer", 512, "--validation-share", 1), "outside [0, 1)"),
        (("--train-tokenizer", 512, "--sequence-length", 0), "sequence-length"),
        (
            ("--train-tokenizer", 512, "--sequence-length", 100_000, "--validation-share", 0),
            "less than one sequence of 100000 tokens",
        ),
    ],
)
def test_prepare_data(
    arguments: tuple[object, ...], said: str, untouched: Refused, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(Path(argparse.__file__).read_text())
    assert said in untouched(
        "prepare-data", tmp_path / "text.txt", "--out", tmp_path / "data", *arguments
    )


def test_prepare_data_without_sources(untouched: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "data", "--train-tokenizer", 512)
    assert "no such file or folder" in untouched("prepare-data", tmp_path / "nowhere", *out)
    assert "holds no files of documents" in untouched("prepare-data", tmp_path / "empty", *out)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert str(tmp_path / "binary") in untouched("prepare-data", tmp_path / "binary", *out)
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    assert "lines.jsonl" in untouched("prepare-data", tmp_path / "lines.jsonl", *out)


@pytest.mark.parametrize(
    "arguments",
    [
        ("finalize-masks",),
        ("finalize-masks", "RUN", "--method", "best"),
        ("export-hf", "RUN"),
        ("export-hf", "RUN", "--out", "OUT", "--dtype", "int8"),
        ("rule-masks", "dense", "--preset", "tiny", "--window", "0", "--out", "OUT"),
        (
            "rule-masks",
            "dense",
            "--layers",
            "0",
            "--kv-heads",
            "2",
            "--window",
            "8",
            "--out",
            "OUT",
        ),
        ("plan", "RUN/config.yaml", "--gpus", "0"),
        ("plan", "RUN/config.yaml", "--gpu", "many"),
        ("report",),
        ("unknown",),
    ],
)
def test_arguments_that_do_not_parse(
    arguments: tuple[str, ...], finished: Finished, megaconsa: Callable[..., Any], tmp_path: Path
) -> None:
    run = str(finished("trained"))
    outcome = megaconsa(
        *[word.replace("RUN", run).replace("OUT", str(tmp_path / "out")) for word in arguments]
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.iterdir())
