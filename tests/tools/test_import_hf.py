"""import-hf: Qwen3 folders as transformers saves them, into checkpoints that train and export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megaconsa.checkpoint import store
from megaconsa.config import build
from megaconsa.data.stream import BatchStream
from megaconsa.data.tokenizer_folder import TOKENIZER_FILES, copy_tokenizer
from megaconsa.huggingface.load import load_exported

VOCABULARY = 512  # that of small_data
SEQUENCE_LENGTH = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 8,
}

Done = Callable[..., str]
Refused = Callable[..., str]


def save_qwen3(
    folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB"
) -> Path:
    """Writes a random model of the preset `tiny` with SHAPE, using transformers."""
    torch.manual_seed(0)
    sizes = SHAPE | {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
    }
    config = Qwen3Config(
        **sizes, max_position_embeddings=4096, tie_word_embeddings=tied, initializer_range=0.02
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_bytes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def contents(path: Path) -> dict[str, bytes]:
    """Returns the contents of a file, or of all files of a folder.

    The result is empty if there is neither.
    """
    return {
        str(each.relative_to(path)): each.read_bytes()
        for each in (path, *path.rglob("*"))
        if each.is_file()
    }


@pytest.mark.parametrize(
    ("tied", "dtype", "shard"),
    [
        (True, torch.bfloat16, "5GB"),
        (False, torch.float32, "40KB"),
        (False, torch.bfloat16, "20KB"),
    ],
    ids=["tied-bf16", "untied-fp32-sharded", "untied-bf16-sharded"],
)
def test_round_trip(
    tied: bool, dtype: torch.dtype, shard: str, done: Done, small_data: Path, tmp_path: Path
) -> None:
    folder = save_qwen3(tmp_path / "hf", tied=tied, dtype=dtype, shard=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard != "5GB")
    copy_tokenizer(small_data / "tokenizer", folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    assert (folder / "generation_config.json").exists()
    done("import-hf", folder, "--out", tmp_path / "import")
    assert_same_bytes(store.resolve(tmp_path / "import").weights(), tensors(folder))
    done("verify", tmp_path / "import")
    done("export-hf", tmp_path / "import", "--out", tmp_path / "export")
    assert_same_bytes(tensors(tmp_path / "export"), tensors(folder))
    for name in TOKENIZER_FILES:
        assert contents(tmp_path / "export" / name) == contents(folder / name)
    ids = torch.randint(0, VOCABULARY, (1, 50))
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (folder, tmp_path / "export")
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "full",
    [[[False, True, False, True], [True, False, False, True]] * 2, [[False] * 4, [True] * 4] * 2],
    ids=["head-wise", "layer-wise"],
)
def test_exports_come_back(full: list[list[bool]], done: Done, tmp_path: Path) -> None:
    """Heads come back in their original order, with the table.

    Exporting again gives the same folder.
    """
    folder = save_qwen3(tmp_path / "hf", dtype=torch.float32)
    done("import-hf", folder, "--out", tmp_path / "import")
    table = {
        "version": 1,
        "num_layers": 4,
        "num_kv_heads": 4,
        "window": 8,
        "scope": "per_layer",
        "target_sparsity": 0.5,
    }
    table |= {"granularity": "kv_head", "full": full}
    (tmp_path / "table.json").write_text(json.dumps(table))
    done(
        "export-hf",
        tmp_path / "import",
        "--out",
        tmp_path / "export",
        "--allocation",
        tmp_path / "table.json",
    )
    done("import-hf", tmp_path / "export", "--out", tmp_path / "again")
    again = store.resolve(tmp_path / "again")
    assert_same_bytes(again.weights(), tensors(folder))
    assert again.allocation is not None
    assert [list(row) for row in again.allocation.full] == full
    done("export-hf", tmp_path / "again", "--out", tmp_path / "once more")
    assert_same_bytes(tensors(tmp_path / "once more"), tensors(tmp_path / "export"))


def test_a_head_wise_model_that_transformers_saved_again_comes_back(
    done: Done,
    tmp_path: Path,
) -> None:
    """It has no allocation.json. The table is in its configuration."""
    folder = save_qwen3(tmp_path / "hf", dtype=torch.float32)
    done("import-hf", folder, "--out", tmp_path / "import")
    table = {
        "version": 1,
        "num_layers": 4,
        "num_kv_heads": 4,
        "window": 8,
        "scope": "per_layer",
        "target_sparsity": 0.5,
    }
    table |= {
        "granularity": "kv_head",
        "full": [[False, True, False, True], [True, False, False, True]] * 2,
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    done(
        "export-hf",
        tmp_path / "import",
        "--out",
        tmp_path / "export",
        "--allocation",
        tmp_path / "table.json",
    )
    load_exported(tmp_path / "export")[0].save_pretrained(tmp_path / "saved")
    done("import-hf", tmp_path / "saved", "--out", tmp_path / "again")
    again = store.resolve(tmp_path / "again")
    assert_same_bytes(again.weights(), tensors(folder))
    assert again.allocation is not None
    assert [list(row) for row in again.allocation.full] == table["full"]


@pytest.mark.parametrize("words", [False, True], ids=["without a tokenizer", "with one"])
@pytest.mark.parametrize(
    "generation", [False, True], ids=["without a generation config", "with one"]
)
def test_ids_of_special_tokens_stay_as_they_are(
    words: bool, generation: bool, done: Done, small_data: Path, tmp_path: Path
) -> None:
    """Lists stay lists.

    Without a generation config, transformers generates with the ids of the model.
    """
    folder = save_qwen3(tmp_path / "hf")
    ids = {"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": 9}
    change_config(**ids)(folder)
    generating = folder / "generation_config.json"
    generating.unlink()
    if generation:
        generating.write_text('{"eos_token_id": [7, 8, 10],   "do_sample": true}')
    if words:
        copy_tokenizer(small_data / "tokenizer", folder)
    done("import-hf", folder, "--out", tmp_path / "import")
    done("verify", tmp_path / "import")
    done("export-hf", tmp_path / "import", "--out", tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {name: config.get(name) for name in ids} == ids
    written = tmp_path / "export" / "generation_config.json"
    if generation:
        assert written.read_bytes() == generating.read_bytes()
    else:
        assert ids.items() <= json.loads(written.read_text()).items()
    assert (tmp_path / "export" / "tokenizer.json").exists() == words
    if words:
        # The tokenizer folder passes them on to the data, and to models trained on it.
        passed_on = tmp_path / "import" / "tokenizer" / "generation_config.json"
        assert passed_on.read_bytes() == written.read_bytes()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    refused: Refused,
    small_data: Path,
    tmp_path: Path,
) -> None:
    """The largest id decides.

    If ids have a hole, there are no more ids than embeddings.
    """
    folder = save_qwen3(tmp_path / "hf")
    copy_tokenizer(small_data / "tokenizer", folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = VOCABULARY
    file.write_text(json.dumps(content))
    said = refused("import-hf", folder, "--out", tmp_path / "import")
    assert f"its tokenizer has a token {VOCABULARY}, but vocab_size={VOCABULARY}" in said


def test_a_stored_copy_of_the_tied_output_layer_is_dropped(
    done: Done, refused: Refused, tmp_path: Path
) -> None:
    folder = save_qwen3(tmp_path / "hf")
    weights = tensors(folder)
    copy = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": copy}, folder / "model.safetensors", {"format": "pt"})
    done("import-hf", folder, "--out", tmp_path / "import")
    assert_same_bytes(store.resolve(tmp_path / "import").weights(), weights)
    save_file(
        weights | {"lm_head.weight": copy * 2}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "lm_head.weight differs" in refused("import-hf", folder, "--out", tmp_path / "other")


@pytest.mark.parametrize("source", ["learn", "dense"])
def test_the_first_loss_is_that_of_transformers(
    source: str,
    done: Done,
    make_config: Callable[..., dict[str, Any]],
    train: Callable[..., list[dict[str, Any]]],
    small_data: Path,
    tmp_path: Path,
) -> None:
    """This holds for a learning run too.

    If the window covers the sequence, gates change nothing. The shape comes from the import.
    """
    folder = save_qwen3(tmp_path / "hf")
    copy_tokenizer(small_data / "tokenizer", folder)
    done("import-hf", folder, "--out", tmp_path / "import")
    allocation = {"source": "learn"} if source == "learn" else {"source": "rule", "rule": "dense"}
    values = make_config(
        attention={"window": SEQUENCE_LENGTH, "separate_documents": False},
        allocation=allocation,
        gates={"warmup_steps": 0},
        training={"steps": 2, "precision": "fp32"},
    )
    values["model"] = {"init_from": str(tmp_path / "import")}
    loss = train(values)[0]["loss"]
    config = build(values)
    stream = BatchStream(
        small_data,
        "train",
        seed=config.run.seed,
        global_batch=config.training.global_batch,
        micro_batch=config.training.global_batch,
        dp_rank=0,
        dp_size=1,
        workers=0,
        separate_documents=False,
    )
    (batch,) = next(iter(stream.steps(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(batch.tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)


def change_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        weights = tensors(folder)
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return changed


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change_config(model_type="llama"), "model of type llama"),
        (change_config(model_type="qwen2"), "model of type qwen2"),
        (
            change_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_parameters=None),
            "rope_scaling",
        ),
        (change_config(attention_bias=True), "attention_bias=true"),
        (change_config(use_sliding_window=True, sliding_window=8), "use_sliding_window"),
        (change_config(hidden_size=48), "has shape"),
        (change_config(num_key_value_heads=3), "not a multiple"),
        (change_config(vocab_size="many"), "vocab_size='many'"),
        (change_config(rope_theta=None), "rope_theta=None"),
        (change_config(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6'"),
        (change_config(tie_word_embeddings="yes"), "tie_word_embeddings='yes'"),
        (change_config(layer_types=5), "layer_types=5"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors are missing"),
        (truncate, "cannot be read"),
        (change_weights(lambda weights: weights.pop(NORM)), f"lack {NORM}"),
        (
            change_weights(lambda weights: weights.update(more=torch.ones(1))),
            "have the unknown more",
        ),
        (change_weights(lambda weights: weights[NORM].fill_(float("nan"))), f"{NORM} holds NaN"),
        (
            change_weights(lambda weights: weights.update({NORM: weights[NORM].float()})),
            "weights are BF16 and F32",
        ),
    ],
)
def test_refused(
    damage: Callable[[Path], object], said: str, refused: Refused, tmp_path: Path
) -> None:
    folder = save_qwen3(tmp_path / "hf")
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    assert said in refused("import-hf", folder, "--out", tmp_path / "import")
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written is left


def test_a_missing_shard_is_named(refused: Refused, tmp_path: Path) -> None:
    folder = save_qwen3(tmp_path / "hf", shard="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused("import-hf", folder, "--out", tmp_path / "import")


def test_what_an_import_cannot_do(done: Done, refused: Refused, tmp_path: Path) -> None:
    done("import-hf", save_qwen3(tmp_path / "hf"), "--out", tmp_path / "import")
    assert "exists" in refused("import-hf", tmp_path / "hf", "--out", tmp_path / "import")
    assert "learned no allocation" in refused(
        "finalize-masks", tmp_path / "import", "--out", tmp_path / "a.json"
    )
    assert "no held-out tokens" in refused(
        "export-hf", tmp_path / "import", "--out", tmp_path / "e", "--verify", "8"
    )
