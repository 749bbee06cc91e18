"""Exports of the tiny model of tests/support/transformers_reference.py, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.huggingface.export import export
from tests.support.transformers_reference import MODEL, random_weights


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower with several threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    return random_weights(MODEL)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one token per byte, except for one byte.

    With the end of text, these are the 256 tokens of the model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(
    weights: dict[str, Tensor], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Allocation], Path]:
    """Exports MODEL in fp32 with an allocation, once per session."""
    done: dict[object, Path] = {}

    def folder(allocation: Allocation) -> Path:
        key = allocation.full
        if key not in done:
            done[key] = tmp_path_factory.mktemp("exports") / "model"
            origin = {"run": "runs/test", "step": 3}
            export(
                weights,
                MODEL,
                allocation,
                done[key],
                tokenizer=tokenizer_folder,
                dtype=torch.float32,
                origin=origin,
            )
        return done[key]

    return folder
