"""generate continues texts with runs, checkpoints, imports and exports."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaconsa.evaluation.continuation import Sampling, continue_text, encode
from megaconsa.evaluation.text_model import open_text_model

pytestmark = pytest.mark.usefixtures("no_gpu")

PROMPTS = ("def main(", "import os\nclass A:")
NEW_TOKENS = 12

Finished = Callable[[str], Path]
Refused = Callable[..., str]


@pytest.fixture
def generated(megaconsa: Callable[..., Any]) -> Callable[..., str]:
    """Runs the command, which says on stderr what it loads. Returns its stdout."""

    def run(*arguments: object) -> str:
        outcome = megaconsa("generate", *arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.err.count("\n") == 1
        assert "float32 on cpu" in outcome.err
        return outcome.out

    return run


def truth(folder: Path, prompt: str) -> str:
    """What transformers alone generates with an export."""
    where: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    ids = model.generate(
        **tokenizer(prompt, return_tensors="pt"), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["trained", "stock", "heads"])
def test_a_run_gives_what_its_export_gives(
    name: str,
    finished: Finished,
    done: Callable[..., str],
    generated: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Head-wise, layer-wise, and a run that learns, with the table that it would end with."""
    run = finished(name)
    table = []
    if name == "heads":
        done("finalize-masks", run, "--out", tmp_path / "allocation.json")
        table = ["--allocation", tmp_path / "allocation.json"]
    out = tmp_path / "hf"
    done("export-hf", run, "--out", out, "--dtype", "float32", *table)
    expected = "\n\n".join(truth(out, prompt) for prompt in PROMPTS) + "\n"
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    asked += ["--max-new-tokens", str(NEW_TOKENS)]
    assert generated(run, *asked) == expected
    assert generated(out, *asked) == expected


def test_a_checkpoint_and_a_text_from_a_file_or_stdin(
    finished: Finished,
    generated: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = finished("stock") / "checkpoints" / "step_4"
    expected = generated(checkpoint, "--prompt", "import os\nx", "--max-new-tokens", 5)
    assert expected.startswith("import os\nx")
    (tmp_path / "start.py").write_text("import os\nx\n")
    asked = ("--max-new-tokens", 5)
    assert generated(checkpoint, "--file", tmp_path / "start.py", *asked) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\nx\n"))
    assert generated(checkpoint, *asked) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\nx"))
    assert generated(checkpoint, "--file", "-", *asked) == expected


def test_an_import_with_and_without_its_tokenizer(
    exports: Path,
    done: Callable[..., str],
    generated: Callable[..., str],
    refused: Refused,
    small_data: Path,
    tmp_path: Path,
) -> None:
    asked = ("--prompt", "import os", "--max-new-tokens", NEW_TOKENS)
    done("import-hf", exports / "heads", "--out", tmp_path / "import")
    expected = truth(exports / "heads", "import os") + "\n"
    assert generated(tmp_path / "import", *asked) == expected
    bare = shutil.copytree(exports / "heads", tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    done("import-hf", bare, "--out", tmp_path / "bare_import")
    words = ("--tokenizer", small_data / "tokenizer")
    for source in (bare, tmp_path / "bare_import"):
        assert "no tokenizer is there" in refused("generate", source, *asked)
        assert generated(source, *asked, *words) == expected


def test_draws_follow_the_seed(finished: Finished, generated: Callable[..., str]) -> None:
    def text(*more: object) -> str:
        return generated(finished("stock"), "--prompt", "x", "--max-new-tokens", 16, *more)

    drawn = text("--temperature", 1.5, "--seed", 1)
    assert text("--temperature", 1.5, "--seed", 1) == drawn
    assert text("--temperature", 1.5, "--seed", 2) != drawn
    assert text() != drawn
    # So few tokens are left that the most probable one is drawn.
    assert text("--temperature", 1.0, "--top-p", 1e-6) == text()


def test_text_comes_piece_by_piece(finished: Finished) -> None:
    cpu = torch.device("cpu")
    text_model = open_text_model(finished("stock"), None, cpu, torch.float32)
    (inputs,) = encode(text_model, ["import os, sys\n"])
    lengths = []
    text_model.model.register_forward_hook(lambda *_: lengths.append(len(pieces)))
    pieces: list[str] = []
    continue_text(text_model, inputs, 40, Sampling(), pieces.append)
    assert lengths[0] < lengths[-1]


def test_refusals(finished: Finished, refused: Refused, tmp_path: Path, small_data: Path) -> None:
    run = finished("stock")
    asked = ("--prompt", "x")
    assert "does not exist" in refused("generate", tmp_path / "nowhere", *asked)
    assert "keep one of them" in refused("generate", run, *asked, "--file", "-")
    assert "cannot be read: No such file" in refused("generate", run, "--file", tmp_path / "no")
    assert "--top-p 1.2 must lie" in refused("generate", run, *asked, "--top-p", 1.2)
    assert "add --temperature" in refused("generate", run, *asked, "--top-p", 0.5)
    assert "the prompt is empty" in refused("generate", run, "--prompt", "")
    said = refused("generate", run, *asked, "--max-new-tokens", 4096)
    assert "--max-new-tokens 4096 exceeds the model's context of 4096" in said
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "is not UTF-8 text" in refused("generate", run, "--file", tmp_path / "latin.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no usable checkpoint" in refused("generate", tmp_path / "empty", *asked)
    words = ("--tokenizer", tmp_path / "words")
    assert "no tokenizer is there" in refused("generate", run, *asked, *words)
    shutil.copytree(small_data / "tokenizer", tmp_path / "words")
    file = tmp_path / "words" / "tokenizer.json"
    file.write_text(
        file.read_text().replace('"isolated"', '"removed"', 1).replace("Isolated", "Removed")
    )
    assert "weights were trained with" in refused("generate", run, *asked, *words)
