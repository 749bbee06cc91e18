"""The Python snippets of README.md, of docs/ and of model cards run on every kind of export."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaconsa.consa.allocation import Allocation
from tests.support import ROOT
from tests.support.transformers_reference import DENSE, HEAD_WISE, LAYER_WISE

EXPORT = ROOT / "docs" / "export.md"
DECODING = ROOT / "docs" / "decoding.md"
KINDS = {"dense": DENSE, "layer-wise": LAYER_WISE, "head-wise": HEAD_WISE}

Export = Callable[[Allocation], Path]

every_kind = pytest.mark.parametrize("allocation", KINDS.values(), ids=KINDS)


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs a snippet, on the CPU where there is no GPU. Returns its variables."""
    if not torch.cuda.is_available():
        code = code.replace(".cuda()", "").replace('device="cuda"', 'device="cpu"')
    exec(code, names)
    return names


def test_every_page_with_a_snippet_is_tested_here() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert {page for page in pages if snippets(page)} == {EXPORT, DECODING}


@every_kind
def test_the_standard_idiom(allocation: Allocation, exported: Export) -> None:
    """The tokenizer returns nothing that the model refuses."""
    folder = exported(allocation)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer("def main(", return_tensors="pt")
    assert list(inputs) == ["input_ids", "attention_mask"]
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert generated.shape == (1, inputs.input_ids.shape[1] + 4)


@every_kind
def test_the_page_on_exports(allocation: Allocation, exported: Export) -> None:
    """One snippet builds on the next, as for a reader who follows the page."""
    names: dict[str, Any] = {"folder": exported(allocation)}
    for code in snippets(EXPORT):
        run(code, names)
    assert names["generated"].shape[1] > names["inputs"].input_ids.shape[1]


@every_kind
def test_the_model_card(allocation: Allocation, exported: Export) -> None:
    folder = exported(allocation)
    codes = snippets(folder / "README.md")
    assert codes
    names: dict[str, Any] = {}
    for code in codes:
        run(code.replace('"PATH"', repr(str(folder))), names)
    assert type(names["model"]).__name__.endswith("ForCausalLM")


def test_the_page_on_decoding() -> None:
    (code,) = snippets(DECODING)
    windows = (4, 4, 32, 32, 4, 32, 4, 4)
    prompt = {
        "q": torch.randn(2, 16, 16, 128, dtype=torch.bfloat16),
        "k": torch.randn(2, 16, 8, 128, dtype=torch.bfloat16),
        "v": torch.randn(2, 16, 8, 128, dtype=torch.bfloat16),
    }
    if torch.cuda.is_available():
        prompt = {name: tensor.cuda() for name, tensor in prompt.items()}
    before, after = code.split("    # Then for every new token")
    names = run(before, {"windows": windows, **prompt})
    assert names["out"].shape == (2, 16, 16, 128)
    names |= {name: tensor[:, -1:] for name, tensor in prompt.items()}
    token = "with torch.inference_mode():\n    # Then for every new token" + after
    assert run(token, names)["out"].shape == (2, 1, 16, 128)
