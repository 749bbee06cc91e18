"""Continues texts with a model, and writes them as they grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchEncoding, GenerationConfig, TextStreamer

from megaconsa.errors import InputError
from megaconsa.evaluation.text_model import TextModel
from megaconsa.huggingface.decoding import KernelCache
from megaconsa.huggingface.modeling_megaconsa import CACHE

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Tokens are drawn from the most probable ones that together have this probability."""
    seed: int = 0
    """Of the draws. Each prompt begins with it anew."""


def encode(text_model: TextModel, prompts: Sequence[str]) -> list[BatchEncoding]:
    """Returns the ids of each prompt, (1, T).

    Raises InputError for an empty prompt.
    """
    encoded = []
    for prompt in prompts:
        # The data of the training has no special tokens at the head of a document either.
        inputs = text_model.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        if inputs.input_ids.shape[1] == 0:
            raise InputError("the prompt is empty; give at least one character to continue")
        encoded.append(inputs)
    return encoded


def room(text_model: TextModel, prompts: Sequence[BatchEncoding], wanted: int | None) -> int:
    """Returns the number of new tokens that every prompt has room for.

    wanted: the number that was asked for, or None for DEFAULT_NEW_TOKENS or as many as fit.

    Raises InputError if they do not fit into the model's context.
    """
    longest = max(inputs.input_ids.shape[1] for inputs in prompts)
    free = text_model.max_positions - longest
    if free < 1 or (wanted or 1) > free:
        raise InputError(
            f"the prompt has {longest} tokens, so that --max-new-tokens {wanted or 1} exceeds the "
            f"model's context of {text_model.max_positions}; "
            "shorten the prompt or ask for fewer tokens"
        )
    return wanted or min(DEFAULT_NEW_TOKENS, free)


def continue_text(
    text_model: TextModel,
    inputs: BatchEncoding,
    new_tokens: int,
    sampling: Sampling,
    write: Callable[[str], object],
) -> None:
    """Writes a prompt and its continuation, in pieces as soon as they are known.

    inputs: the ids of the prompt, (1, T).
    new_tokens: number of tokens after which the text ends if the model does not end it before.
    write: is called with each piece of text. Special tokens are left out.
    """
    model = text_model.model
    greedy = sampling.temperature == 0
    draws = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    # transformers fills what a call leaves open from the model's own settings, such as a top_k.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=not greedy,
        eos_token_id=text_model.end_ids or None,
        pad_token_id=text_model.end_ids[0] if text_model.end_ids else None,
        **({} if greedy else draws),
    )
    torch.manual_seed(sampling.seed)
    inputs = inputs.to(model.device)
    with torch.inference_mode():
        model.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            streamer=_Pieces(text_model.tokenizer, write),
            **{CACHE: KernelCache(model, inputs.input_ids.shape[1] + new_tokens)},
        )


class _Pieces(TextStreamer):
    """Hands pieces of text to a function. A piece ends where the next token cannot change it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)
