"""Loads an exported folder through transformers' Auto classes, and checks what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megaconsa.data.tokenizer_folder import TOKENIZER_CONFIG, check_vocabulary, load_pretrained
from megaconsa.errors import InputError
from megaconsa.files import parse_json
from megaconsa.huggingface.modeling_megaconsa import (
    MegaconsaConfig,
    MegaconsaForCausalLM,
    MegaconsaModel,
    native_rope,
    rope_parameters,
)


def register() -> None:
    """Makes the Auto classes of this process load head-wise exports without trust_remote_code."""
    AutoConfig.register(MegaconsaConfig.model_type, MegaconsaConfig, exist_ok=True)
    AutoModel.register(MegaconsaConfig, MegaconsaModel, exist_ok=True)
    AutoModelForCausalLM.register(MegaconsaConfig, MegaconsaForCausalLM, exist_ok=True)
    # With this, save_pretrained also writes the model file.
    MegaconsaConfig.register_for_auto_class()
    MegaconsaModel.register_for_auto_class("AutoModel")
    MegaconsaForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def load_exported(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Loads the model, in evaluation mode on the CPU, and the tokenizer.

    Nothing is downloaded. No code in the folder is run: megaconsa's own classes load a head-wise
    export, whatever model file is in the folder.

    Returns the model and the tokenizer, which is None if the export has none. Raises InputError if
    the folder is not an export, or if its tokenizer has more tokens than its model.
    """
    try:
        fields = parse_json((folder / "config.json").read_text())
        if not isinstance(fields, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} is not an exported model: config.json cannot be read ({error})"
        ) from None
    try:
        rope = native_rope(rope_parameters(fields))
    except ValueError as error:
        raise InputError(f"{folder}: in config.json, {error}") from None
    register()
    # trust_remote_code must be given: without it, transformers asks the user on the terminal.
    where = {"trust_remote_code": False, "local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **where)
    # transformers 4 does not read the rotary base where 5 saves it, and would use 10,000.
    for name, value in rope.items():
        setattr(config, name, value)
    tokenizer = None
    if (folder / TOKENIZER_CONFIG).is_file():
        tokenizer = load_pretrained(folder)
        check_vocabulary(folder, tokenizer, config.vocab_size)
    with without_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **where)
    return model.eval(), tokenizer


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Hides transformers' progress bars.

    transformers 5 draws one over the weights of even the smallest model, amid a command's messages.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@torch.no_grad()
def compare_logits(folder: Path, tokens: Tensor, logits: Tensor) -> float:
    """Compares the export's logits, computed in fp32, with the given ones.

    tokens: (B, S) int64, without padding.
    logits: (B, S, V) fp32.

    Returns the largest absolute difference, divided by the largest absolute value of `logits`.
    """
    model, _ = load_exported(folder)
    differences = []
    for row, given in zip(tokens, logits, strict=True):
        computed = model(row[None], use_cache=False).logits[0]
        differences.append((computed - given).abs().max())
    # Python's max may skip a NaN, torch's does not.
    return float(torch.stack(differences).max() / logits.abs().max())


@torch.no_grad()
def generate_line(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """Continues `prompt` greedily with the export, in fp32.

    Returns the continuation without the prompt and without special tokens. Raises InputError if the
    export has no tokenizer.
    """
    model, tokenizer = load_exported(folder)
    if tokenizer is None:
        raise InputError(f"{folder} was exported without a tokenizer, so it cannot continue a text")
    inputs = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    continuation = generated[0, inputs.input_ids.shape[1] :]
    return str(tokenizer.decode(continuation, skip_special_tokens=True))
