"""export-hf of runs as the trainer leaves them, and the resulting folder in transformers."""

from __future__ import annotations

import json
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaconsa.checkpoint import store
from megaconsa.checkpoint.writer import file_entry
from megaconsa.consa.allocation import Allocation
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.token_shards import TokenShards
from megaconsa.evaluation.export_check import TOLERANCE
from megaconsa.model.qwen3 import Qwen3

SEQUENCE_LENGTH = 64  # that of small_data

Done = Callable[..., str]
Finished = Callable[[str], Path]


@torch.no_grad()
def check_logits(folder: Path, run: Path, table: Allocation, data: Path) -> None:
    """Compares an export with megaconsa's own model.

    The export is loaded by transformers alone. Generation with and without a cache must agree.
    """
    checkpoint = store.resolve(run)
    model = Qwen3(checkpoint.model_config, table, "reference", separate=False)
    model.load_state_dict(dict(checkpoint.weights()), strict=False)
    sequence = TokenShards(data, "validation")[1][:SEQUENCE_LENGTH]
    tokens = torch.from_numpy(sequence.astype("int64"))[None]
    exported = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, local_files_only=True
    )
    expected = model(tokens)
    logits = exported(tokens).logits
    assert logits.shape == (1, SEQUENCE_LENGTH, checkpoint.model_config.vocab_size)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    inputs = tokenizer("def main(", return_tensors="pt")
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        exported.generate(**inputs, use_cache=True, **settings),
        exported.generate(**inputs, use_cache=False, **settings),
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("heads", "per-head model file"), ("layers", "stock Qwen3")]
)
def test_learning_run_with_its_table(
    name: str, kind: str, finished: Finished, done: Done, small_data: Path, tmp_path: Path
) -> None:
    run = finished(name)
    table = tmp_path / "allocation.json"
    out = tmp_path / "hf"
    done("finalize-masks", run, "--out", table)
    text = done(
        "export-hf",
        run,
        "--allocation",
        table,
        "--out",
        out,
        "--dtype",
        "float32",
        "--verify",
        SEQUENCE_LENGTH,
    )
    sparsity = Allocation.load(table).sparsity
    first, second, third = text.splitlines()[-3:]
    assert first == f"{out}: {kind}, float32, sparsity {sparsity:.4f}, window 8"
    match = re.fullmatch(
        re.escape(f"{out}: logits differ from the checkpoint's by ")
        + r"(\S+) of the largest logit, on 64 tokens",
        second,
    )
    assert match
    assert float(match[1]) <= TOLERANCE
    assert re.fullmatch(
        re.escape(f"{out}: transformers gives a held-out text the ")
        + r"\d+ ids that the run's tokenizer gives it",
        third,
    )
    assert (out / "modeling_megaconsa.py").exists() == (name == "heads")
    check_logits(out, run, Allocation.load(table), small_data)


@pytest.mark.parametrize(
    ("name", "kind"), [("trained", "per-head model file"), ("stock", "stock Qwen3")]
)
def test_training_run_knows_its_table(
    name: str, kind: str, finished: Finished, done: Done, small_data: Path, tmp_path: Path
) -> None:
    run = finished(name)
    out = tmp_path / "hf"
    text = done("export-hf", run, "--out", out, "--dtype", "float32")
    assert text.endswith(f"\n{out}: {kind}, float32, sparsity 0.5000, window 8\n")
    assert (out / "allocation.png").read_bytes().startswith(b"\x89PNG")
    table = store.resolve(run).allocation
    assert table is not None
    assert Allocation.load(out / "allocation.json") == table
    check_logits(out, run, table, small_data)


def test_a_checkpoint_in_bfloat16_with_a_tokenizer_of_ones_own(
    finished: Finished, done: Done, small_data: Path, tmp_path: Path
) -> None:
    """The folder has the given precision and checkpoint.

    --verify compares with the rounded weights.
    """
    out = tmp_path / "hf"
    checkpoint = finished("trained") / "checkpoints" / "step_4"
    text = done(
        "export-hf",
        checkpoint,
        "--out",
        out,
        "--tokenizer",
        small_data / "tokenizer",
        "--verify",
        32,
    )
    assert "on 32 tokens" in text
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert '"step": 4' in (out / "README.md").read_text()
    tokens = AutoTokenizer.from_pretrained(out, trust_remote_code=True)("import os").input_ids
    assert tokens == AutoTokenizer.from_pretrained(small_data / "tokenizer")("import os").input_ids


def test_verify_says_how_many_tokens_it_compared(
    finished: Finished, done: Done, tmp_path: Path
) -> None:
    """A sequence of the data may be shorter than the number asked for."""
    text = done(
        "export-hf",
        finished("stock"),
        "--out",
        tmp_path / "hf",
        "--dtype",
        "float32",
        "--verify",
        10_000,
    )
    assert "on 10000 tokens" not in text


def test_verify_finds_a_wrong_export(
    finished: Finished,
    megaconsa: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command prints one sentence and exits with 1, because the input was not at fault."""
    from megaconsa.huggingface import export

    real = export.reorder_weight
    monkeypatch.setattr(
        export,
        "reorder_weight",
        lambda name, tensor, model, order: real(name, tensor, model, order[::-1]),
    )
    outcome = megaconsa(
        "export-hf",
        finished("trained"),
        "--out",
        tmp_path / "hf",
        "--dtype",
        "float32",
        "--verify",
        64,
    )
    assert outcome.code == 1
    assert "the export is wrong" in outcome.err
    assert not (tmp_path / "hf").exists()
    assert outcome.err.count("\n") == 1


def test_another_tokenizer_than_the_runs_is_refused(
    make_config: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], Any],
    done: Done,
    refused: Callable[..., str],
    small_data: Path,
    tmp_path: Path,
) -> None:
    """The data folder may have been made again, for example.

    --verify compares logits, and these do not show the difference.
    """
    data = tmp_path / "data"
    run = tmp_path / "run"
    out = tmp_path / "hf"
    shutil.copytree(small_data, data)
    train(
        make_config(
            data={"path": str(data)},
            allocation={"source": "rule", "rule": "dense"},
            training={"steps": 2},
        )
    )
    words = shutil.copytree(data / "tokenizer", tmp_path / "words")
    trained = DatasetInfo.load(data).tokenizer_fingerprint
    shutil.rmtree(data)
    sources = [
        str(Path(sysconfig.get_paths()["stdlib"]) / name)
        for name in ("difflib.py", "pdb.py", "optparse.py")
    ]
    settings = (
        "--train-tokenizer",
        512,
        "--sequence-length",
        SEQUENCE_LENGTH,
        "--validation-share",
        0.2,
    )
    done("prepare-data", *sources, "--out", data, *settings)
    said = refused("export-hf", run, "--out", out)
    assert f"tokenizer={data / 'tokenizer'} has fingerprint" in said
    assert f"trained with {trained}" in said
    assert "--tokenizer" in said
    said = refused("export-hf", run, "--out", out, "--tokenizer", words, "--verify", 8)
    assert f"data.path={data} has come to hold data of another tokenizer" in said
    assert not out.exists()
    done("export-hf", run, "--out", out, "--tokenizer", words)
    assert (out / "tokenizer.json").read_bytes() == (words / "tokenizer.json").read_bytes()


def test_a_run_with_an_earlier_fingerprint_is_exported(
    finished: Finished,
    done: Done,
    tmp_path: Path,
) -> None:
    """An earlier fingerprint is the first of today's two parts."""
    checkpoint = shutil.copytree(store.resolve(finished("stock")).path, tmp_path / "checkpoint")
    state = json.loads((checkpoint / "state.json").read_text())
    first, second = state["data"]["tokenizer_fingerprint"].split("-")
    assert len(first) == len(second) == 16
    state["data"]["tokenizer_fingerprint"] = first
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] |= file_entry(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    done("export-hf", checkpoint, "--out", tmp_path / "hf", "--verify", 8)
