"""The folder that an export writes, what it refuses, and loading it in a separate process."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError, RunError
from megaconsa.huggingface.export import export, export_bytes, reorder_weight
from megaconsa.huggingface.load import compare_logits, generate_line, load_exported, register
from megaconsa.huggingface.modeling_megaconsa import MegaconsaForCausalLM
from tests.support import ROOT
from tests.support.transformers_reference import (
    DENSE,
    HEAD_WISE,
    LAYER_WISE,
    MODEL,
    WINDOW,
    masked_logits,
    random_weights,
)

Export = Callable[[Allocation], Path]


def export_fp32(weights: Mapping[str, Tensor], out: Path, **changed: Any) -> None:
    settings = {
        "model": MODEL,
        "allocation": HEAD_WISE,
        "tokenizer": None,
        "dtype": torch.float32,
        "origin": None,
    } | changed
    export(weights, settings.pop("model"), settings.pop("allocation"), out, **settings)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_head_wise_folder(exported: Export) -> None:
    folder = exported(HEAD_WISE)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors",
        "modeling_megaconsa.py",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    }
    config = read_config(folder)
    assert config["model_type"] == "megaconsa"
    assert config["num_full_kv_heads"] == [2, 4, 0, 2]
    assert config["full_attention"] == [list(row) for row in HEAD_WISE.full]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 255
    assert Allocation.load(folder / "allocation.json") == HEAD_WISE
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    card = (folder / "README.md").read_text()
    assert "0 .F.F\n1 FFFF\n2 ....\n3 F..F" in card
    assert '"step": 3' in card


def test_layer_wise_and_dense_folders_are_stock_qwen3(exported: Export) -> None:
    layer_wise = read_config(exported(LAYER_WISE))
    dense = read_config(exported(DENSE))
    assert layer_wise["model_type"] == dense["model_type"] == "qwen3"
    assert layer_wise["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert (layer_wise["use_sliding_window"], layer_wise["sliding_window"]) == (True, WINDOW)
    assert (dense["use_sliding_window"], dense["sliding_window"]) == (False, None)
    for config in (layer_wise, dense):
        assert not {"auto_map", "num_full_kv_heads"} & config.keys()


def test_reordering_back_is_the_identity(exported: Export, weights: dict[str, Tensor]) -> None:
    stored = load_file(exported(HEAD_WISE) / "model.safetensors")
    assert stored.keys() == weights.keys()
    moved = 0
    for name, tensor in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            layer = int(name.split(".")[2])
            back = torch.tensor(HEAD_WISE.full_heads_first(layer)).argsort().tolist()
            moved += not torch.equal(stored[name], tensor)
            assert torch.equal(reorder_weight(name, stored[name], MODEL, back), tensor)
        else:
            assert torch.equal(stored[name], tensor)
    assert moved == 2 * 4  # layers 0 and 3


def test_shards_untied_embeddings_and_bfloat16(tmp_path: Path) -> None:
    model = replace(MODEL, tie_word_embeddings=False)
    weights = {name: tensor.bfloat16().float() for name, tensor in random_weights(model).items()}
    advanced: list[int] = []
    settings = {
        "model": model,
        "dtype": torch.bfloat16,
        "max_shard_size": "300KB",
        "advance": advanced.append,
    }
    export_fp32(weights, tmp_path / "out", **settings)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    files = {tmp_path / "out" / name for name in index["weight_map"].values()}
    assert len(files) > 2
    assert sum(advanced) == index["metadata"]["total_size"] == export_bytes(model, torch.bfloat16)
    for file in files:
        with safe_open(file, "pt") as held:
            assert file.stat().st_size < 310_000 or len(held.keys()) == 1
    assert load_exported(tmp_path / "out", torch.bfloat16)[0].dtype == torch.bfloat16
    tokens = torch.arange(3 * WINDOW)[None]
    assert (
        compare_logits(tmp_path / "out", tokens, masked_logits(weights, model, HEAD_WISE, tokens))
        <= 1e-5
    )


class OneAtATime(Mapping[str, Tensor]):
    """Weights that are made when they are read.

    `most` is the largest number of bytes that were held at once.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.held = 0
        self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name].clone()
        self.held += tensor.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(tensor, self._release, tensor.nbytes)
        return tensor

    def _release(self, count: int) -> None:
        self.held -= count

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_one_weight_is_held_at_a_time(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    lazy = OneAtATime(weights)
    export_fp32(lazy, tmp_path / "out")
    largest = sorted(tensor.nbytes for tensor in weights.values())[-2:]
    # The loop variable still holds a weight while the next one is read.
    assert lazy.most <= sum(largest)


def test_the_generation_config_of_the_tokenizer_folder_stays(
    tmp_path: Path, weights: dict[str, Tensor], tokenizer_folder: Path
) -> None:
    words = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, words)
    text = '{"eos_token_id": [255, 3],\n "do_sample": true, "temperature": 0.6}'
    (words / "generation_config.json").write_text(text)
    export_fp32(weights, tmp_path / "out", tokenizer=words)
    assert (tmp_path / "out" / "generation_config.json").read_text() == text
    assert load_exported(tmp_path / "out")[0].generation_config.eos_token_id == [255, 3]


def test_the_model_card(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    table = replace(HEAD_WISE, target_sparsity=0.5, origin={"tokens": 56_789})
    drawn: list[Path] = []

    def heat_map(path: Path) -> None:
        drawn.append(path)
        path.write_bytes(b"png")

    origin = {"run": "runs/test", "step": 3, "tokens": 1_234_567, "sequence_length": 4096}
    origin |= {"loss": 2.5, "validation_loss": 2.75, "data": "data/corpus"}
    export_fp32(weights, tmp_path / "out", allocation=table, origin=origin, heat_map=heat_map)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| training tokens | 1,234,567, after 56,789 that gave the allocation |" in card
    parameters = sum(tensor.numel() for tensor in weights.values())
    assert f"| parameters | {parameters:,} |" in card
    assert "| length of the training sequences | 4,096 tokens |" in card
    assert "| loss, validation loss at the end, in nats a token | 2.5000, 2.7500 |" in card
    assert "| training data | `data/corpus` |" in card
    assert "Apache License 2.0" in card
    assert "eprint = {2606.18056}" in card
    assert (
        "| sparsity, the fraction of KV heads with the window: target, reached | 0.5, 0.5 |" in card
    )
    # Keys and values of 32 numbers in fp32: 8 full heads with 2048 tokens and 8 sliding heads with
    # 7. The dense model has 16 heads with 2048 tokens.
    assert "| 2,048 | 4.014 MiB | 8 MiB | 50.2% |" in card
    assert f"![The allocation, layer by KV head]({drawn[0].name})" in card
    assert (tmp_path / "out" / drawn[0].name).read_bytes() == b"png"


def broken(weights: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    """The weights with one tensor replaced, or removed if it is None."""
    others = {key: weights[key] for key in weights if key != name}
    return others if tensor is None else others | {name: tensor}


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "changed", "message"),
    [
        (NORM, None, {}, "lack model.norm.weight"),
        ("lm_head.weight", torch.zeros(256, 128), {}, "unknown lm_head.weight"),
        (NORM, torch.zeros(127), {}, r"model.norm.weight has shape \(127,\)"),
        (NORM, torch.full((128,), float("nan")), {}, "model.norm.weight holds NaN"),
        (NORM, torch.full((128,), float("-inf")), {}, "model.norm.weight holds NaN or infinity"),
        (
            NORM,
            torch.full((128,), -1e5),
            {"dtype": torch.float16},
            "model.norm.weight holds 100000, which overflows",
        ),
        (NORM, torch.ones(128), {"max_shard_size": "-1GB"}, "max_shard_size=-1GB is not a size"),
        (NORM, torch.ones(128), {"max_shard_size": "5"}, "max_shard_size=5 is not a size"),
        (NORM, torch.ones(128), {"dtype": torch.int8}, "dtype=torch.int8 cannot be exported"),
        (
            NORM,
            torch.ones(128),
            {"allocation": replace(HEAD_WISE, full=HEAD_WISE.full[:3])},
            "made for 3 layers x 4 KV heads",
        ),
        (
            NORM,
            torch.ones(128),
            {"allocation": replace(HEAD_WISE, window=1)},
            "window=1 cannot be exported",
        ),
        (
            NORM,
            torch.ones(128),
            {"tokenizer": Path("nowhere")},
            "nowhere is not a tokenizer folder",
        ),
    ],
)
def test_refused_inputs_leave_nothing(
    tmp_path: Path,
    weights: dict[str, Tensor],
    name: str,
    tensor: Tensor | None,
    changed: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        export_fp32(broken(weights, name, tensor), tmp_path / "out", **changed)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    model = replace(MODEL, vocab_size=255)
    with pytest.raises(InputError, match="has a token 255, but the model's vocab_size is 255"):
        export_fp32(
            random_weights(model), tmp_path / "out", model=model, tokenizer=tokenizer_folder
        )


def test_an_existing_folder_is_kept(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        export_fp32(weights, tmp_path / "out")
    (tmp_path / "out" / "precious").unlink()
    export_fp32(weights, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(InputError, match=r"needs 3\.693 MiB, but 976\.6 KiB are free"):
        export_fp32(weights, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    def full_disk(count: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="could not be written: No space left on device"):
        export_fp32(weights, tmp_path / "out", advance=full_disk)
    assert not list(tmp_path.iterdir())


def test_what_is_no_export_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="is not an exported model"):
        load_exported(tmp_path)
    export_fp32(weights, tmp_path / "out")
    with pytest.raises(InputError, match="without a tokenizer"):
        generate_line(tmp_path / "out", "a", 1)


def test_register_loads_without_trusting_the_folder(exported: Export, tmp_path: Path) -> None:
    register()
    register()
    model = AutoModelForCausalLM.from_pretrained(exported(HEAD_WISE), trust_remote_code=False)
    assert type(model) is MegaconsaForCausalLM
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_megaconsa.py").is_file()


def test_code_in_the_folder_is_not_run(exported: Export, tmp_path: Path) -> None:
    """A folder from somebody else may contain anything."""
    folder = tmp_path / "hf"
    shutil.copytree(exported(HEAD_WISE), folder)
    mark = tmp_path / "was_run"
    with (folder / "modeling_megaconsa.py").open("a") as file:
        file.write(f"\nopen({str(mark)!r}, 'w').close()\n")
    model, tokenizer = load_exported(folder)
    assert type(model) is MegaconsaForCausalLM
    assert tokenizer is not None
    assert not mark.exists()


LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without its model file")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("abc", return_tensors="pt")
generated = model.generate(
    inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=8, do_sample=False
)
print(generated[0].tolist())
"""


# transformers looks for a package named `kernels`. It finds the folder of that name in the root of
# the checkout.
CHECKOUT = """
import importlib.util, pathlib
found = pathlib.Path(importlib.util.find_spec("kernels").origin)
assert found.parent == pathlib.Path.cwd() / "kernels"
"""
NO_MEGACONSA = """
import sys
sys.modules["megaconsa"] = None  # importing it fails
"""


@pytest.mark.parametrize("place", ["in the checkout", "without megaconsa"])
def test_loads_and_generates_in_a_process_of_its_own(
    exported: Export, tmp_path: Path, place: str
) -> None:
    folder = exported(HEAD_WISE)
    if place == "in the checkout":
        before = CHECKOUT
        where = ROOT
    else:
        before = NO_MEGACONSA
        where = tmp_path
    command = [sys.executable, "-c", before + LOAD, str(folder)]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    model, tokenizer = load_exported(folder)
    inputs = tokenizer("abc", return_tensors="pt")
    ids = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=8, do_sample=False
    )
    # The output holds nothing else, such as a question to the user.
    assert json.loads(result.stdout) == ids[0].tolist()
