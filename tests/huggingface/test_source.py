"""Reading a model folder of another origin.

A folder is refused if two readers would take it for different models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config

from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.huggingface.load import load_exported
from megaconsa.huggingface.source import INDEX, WEIGHTS, open_source
from tests.support.transformers_reference import HEAD_WISE, LAYER_WISE, MODEL, WINDOW, stock

Export = Callable[[Allocation], Path]
THETA = MODEL.rope_theta
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
PLAIN = {"rope_type": "default", "rope_theta": THETA}
ROPE_FIELDS = ("rope_theta", "rope_parameters", "rope_scaling")


@pytest.fixture(scope="session")
def saved(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL as this release of transformers saves it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    stock(weights, MODEL).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder: Path, removed: tuple[str, ...] = (), **fields: Any) -> Path:
    """Changes fields of config.json.

    If one field of the rotary embedding is given, all of its fields are replaced.
    """
    file = folder / "config.json"
    removed += ROPE_FIELDS if fields.keys() & set(ROPE_FIELDS) else ()
    config = {
        name: value for name, value in json.loads(file.read_text()).items() if name not in removed
    }
    file.write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": THETA},
        {"rope_theta": THETA, "rope_scaling": None},
        {"rope_parameters": PLAIN},
        {"rope_parameters": {"rope_theta": THETA}},
        {"rope_parameters": PLAIN, "rope_theta": THETA, "rope_scaling": {"type": "default"}},
        {"rope_scaling": PLAIN},
    ],
)
def test_every_spelling_of_the_base_is_read(
    folder: Path,
    weights: dict[str, Tensor],
    fields: dict[str, Any],
) -> None:
    """The import and the evaluation of a folder both read the base.

    They do so also where this release of transformers spells it differently.
    """
    change(folder, **fields)
    assert open_source(folder).model_config == MODEL
    tokens = torch.arange(2 * WINDOW)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            load_exported(folder)[0](tokens).logits, stock(weights, MODEL)(tokens).logits
        )


def test_a_folder_without_a_base_has_transformers_default(folder: Path) -> None:
    change(folder, removed=ROPE_FIELDS)
    config = Qwen3Config.from_pretrained(folder)
    base = (
        config.rope_parameters["rope_theta"]
        if hasattr(config, "rope_parameters")
        else config.rope_theta
    )
    assert open_source(folder).model_config.rope_theta == base


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"rope_parameters": PLAIN, "rope_scaling": YARN},
            "rope_parameters=.* and rope_scaling=.*yarn.* contradict",
        ),
        (
            {"rope_parameters": {"full_attention": YARN | {"rope_theta": THETA}}},
            "rope_parameters=.* one flat mapping",
        ),
        (
            {"rope_parameters": {"full_attention": PLAIN}, "rope_theta": THETA},
            "rope_parameters=.* one flat mapping",
        ),
        (
            {"rope_parameters": PLAIN, "rope_theta": 1e4},
            "rope_theta=10000.0 and rope_parameters.rope_theta=50000.0 contr",
        ),
        (
            {"rope_scaling": PLAIN, "rope_theta": 1e4},
            "rope_theta=10000.0 and rope_scaling.rope_theta=50000.0 contr",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "type": "yarn"}, "rope_theta": THETA},
            "a type and another rope_type",
        ),
        (
            {"rope_parameters": YARN | {"rope_theta": THETA}},
            "rope_parameters=.*yarn.* is not supported",
        ),
        ({"rope_scaling": YARN, "rope_theta": THETA}, "rope_scaling=.*yarn.* is not supported"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": THETA},
            "rope_scaling=.*linear.* not supported",
        ),
        (
            {"rope_parameters": PLAIN | {"factor": 4.0}},
            "rope_parameters=.*factor.* is not supported",
        ),
        (
            {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor.* is not supported",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            {"rope_parameters": PLAIN | {"rope_theta": None}},
            "rope_parameters.rope_theta=None is not a positive number",
        ),
        ({"rope_theta": True}, "rope_theta=True is not a positive number"),
        (
            {"rope_scaling": "yarn", "rope_theta": THETA},
            "rope_scaling='yarn' must be one flat mapping",
        ),
        ({"is_causal": False}, "is_causal=false"),
        ({"auto_map": {"AutoModelForCausalLM": "other.Model"}}, "auto_map="),
        (
            {"layer_types": ["chunked_attention"] * 4},
            "layer_types=.* must be full_attention or sliding_attention",
        ),
        ({"layer_types": ["full_attention"] * 3}, "layer_types=.* for each of 4 layers"),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "use_sliding_window=false and layer_types",
        ),
        ({"eos_token_id": 256}, "eos_token_id=256 is no token of a vocabulary of 256"),
        ({"eos_token_id": [3, 300]}, r"eos_token_id=\[3, 300\] is no token"),
        ({"bos_token_id": -1}, "bos_token_id=-1 is no token"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(
    folder: Path,
    fields: dict[str, Any],
    said: str,
) -> None:
    change(folder, **fields)
    with pytest.raises(InputError, match=said) as refusal:
        open_source(folder)
    assert "\n" not in str(refusal.value)


def test_an_unclear_base_is_not_evaluated(folder: Path) -> None:
    change(folder, rope_parameters=PLAIN, rope_theta=1e4)
    with pytest.raises(InputError, match="contradict each other"):
        load_exported(folder)


def test_a_table_in_the_configuration_alone_is_read(
    exported: Export,
    weights: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """transformers leaves allocation.json behind when it saves a folder again."""
    for allocation in (HEAD_WISE, LAYER_WISE):
        again = tmp_path / allocation.granularity
        load_exported(exported(allocation))[0].save_pretrained(again)
        assert not (again / "allocation.json").exists()
        source = open_source(again)
        assert source.model_config == MODEL
        assert source.allocation is not None
        assert (source.allocation.full, source.allocation.window) == (allocation.full, WINDOW)
        for name, tensor in weights.items():
            assert torch.equal(source.read(name), tensor), name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"full_attention": None}, "full_attention and sliding_window in config.json"),
        ({"full_attention": [[True] * 4] * 4}, r"num_full_kv_heads=\[2, 4, 0, 2\], full_attention"),
        ({"num_full_kv_heads": [2, 4, 0, 1]}, r"num_full_kv_heads=\[2, 4, 0, 1\], full_attention"),
        ({"sliding_window": None}, "window is None"),
        ({"use_sliding_window": False}, "use_sliding_window"),
    ],
)
def test_tables_that_contradict_are_refused(
    exported: Export,
    tmp_path: Path,
    fields: dict[str, Any],
    said: str,
) -> None:
    folder = Path(shutil.copytree(exported(HEAD_WISE), tmp_path / "model"))
    change(folder, **fields)
    for table in ("with allocation.json", "without"):
        if table == "without":
            (folder / "allocation.json").unlink()
        with pytest.raises(InputError, match=said):
            open_source(folder)


def sharded(folder: Path, weights: dict[str, Tensor]) -> dict[str, str]:
    """Splits the weights into two files with an index and removes the single file.

    Returns the map of the index.
    """
    names = sorted(load_file(folder / WEIGHTS))
    files = {
        name: f"model-{1 + (index % 2):05}-of-00002.safetensors" for index, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file(
            {name: weights[name] for name in names if files[name] == file},
            folder / file,
            {"format": "pt"},
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / WEIGHTS).unlink()
    return files


def test_weights_that_are_there_twice_are_refused(folder: Path, weights: dict[str, Tensor]) -> None:
    single = (folder / WEIGHTS).read_bytes()
    files = sharded(folder, weights)
    assert torch.equal(open_source(folder).read("model.norm.weight"), weights["model.norm.weight"])
    (folder / WEIGHTS).write_bytes(single)
    with pytest.raises(InputError, match=f"weights twice, {WEIGHTS} and the files of {INDEX}"):
        open_source(folder)
    # An index that names the single file does not make the weights ambiguous.
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(files, WEIGHTS)}))
    assert open_source(folder).model_config == MODEL


def test_an_index_that_does_not_fit_its_files_is_refused(
    folder: Path,
    weights: dict[str, Tensor],
) -> None:
    files = sharded(folder, weights)
    names = list(files)
    (folder / INDEX).write_text(json.dumps({"weight_map": files | {names[0]: files[names[1]]}}))
    with pytest.raises(InputError, match=f"{INDEX} says that {names[0]} is in {files[names[1]]}"):
        open_source(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    shutil.copyfile(folder / files[names[0]], folder / files[names[1]])
    with pytest.raises(InputError, match=r"is both in .*remove one of the two"):
        open_source(folder)


def test_a_list_of_ids_is_kept(folder: Path) -> None:
    change(folder, eos_token_id=[3, 255], bos_token_id=0)
    assert open_source(folder).token_ids == {"eos_token_id": [3, 255], "bos_token_id": 0}


def test_a_generation_config_that_does_not_fit_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [255, 256]}')
    with pytest.raises(
        InputError, match=r"generation_config.json: eos_token_id=\[255, 256\] is no token"
    ):
        open_source(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"generation_config.json is not a mapping"):
        open_source(folder)
