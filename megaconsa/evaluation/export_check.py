"""Checks that an exported folder computes the same as the checkpoint, from the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megaconsa.checkpoint.store import Checkpoint
from megaconsa.consa.allocation import Allocation
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.mixture_file import read_info
from megaconsa.data.token_mixture import open_sequences
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.data.tokenizer_folder import TOKENIZER_CONFIG
from megaconsa.errors import InputError, RunError
from megaconsa.huggingface.load import compare_logits, register
from megaconsa.model.config import ModelConfig
from megaconsa.model.qwen3 import Qwen3

REMEDY = (
    f"set tokenizer_class to PreTrainedTokenizerFast in the tokenizer's {TOKENIZER_CONFIG}, "
    "and export again"
)
TOLERANCE = 1e-5
"""Largest difference of fp32 logits that rounding explains, as a share of the largest logit."""


def held_out_tokens(checkpoint: Checkpoint, length: int) -> Tensor:
    """Returns the first tokens that the checkpoint's run held out, (1, S) int64.

    S is at most `length`, and at most the length of one sequence. Raises InputError if the run's
    data folder now holds tokens of another tokenizer.
    """
    folder = Path(checkpoint.state["config"]["data"]["path"])
    trained = checkpoint.state["data"]["tokenizer_fingerprint"]
    found = read_info(folder).tokenizer_fingerprint
    if not same_tokenizer(trained, found):
        raise InputError(
            f"data.path={folder} has come to hold data of another tokenizer (fingerprint {found}) "
            f"than the run was trained with ({trained}); restore the run's data, "
            "or give its tokenizer's folder with --tokenizer and leave --verify out"
        )
    sequences = open_sequences(folder, "validation")
    (row,) = sequences.rows(np.array([0]))
    return torch.from_numpy(row[:length].astype("int64"))[None]


@torch.no_grad()
def logit_difference(
    folder: Path,
    model_config: ModelConfig,
    weights: Mapping[str, Tensor],
    allocation: Allocation,
    tokens: Tensor,
) -> float:
    """Compares the logits of the export with those of megaconsa's own model, both in fp32.

    megaconsa's model uses the reference attention.

    folder: the export.
    weights: the checkpoint's. They are first rounded to the precision of the export.
    tokens: (B, S).

    Returns the largest absolute difference of the logits, divided by the largest logit. Raises
    RunError if it exceeds TOLERANCE.
    """
    config = json.loads((folder / "config.json").read_text())
    dtype = getattr(torch, config.get("dtype", config.get("torch_dtype")))
    model = Qwen3(model_config, allocation, "reference", separate=False)
    rounded = {name: value.to(dtype).float() for name, value in weights.items()}
    model.load_state_dict(rounded, strict=not model_config.tie_word_embeddings)
    difference = compare_logits(folder, tokens, model(tokens))
    if not difference <= TOLERANCE:  # not `>`, which would accept NaN
        raise RunError(
            f"{folder}: logits differ from the checkpoint's by {difference:.1e} "
            "of the largest logit: the export is wrong"
        )
    return difference


def check_ids(folder: Path, tokenizer: Path, tokens: Tensor) -> int:
    """Compares the ids that transformers gives with the export to those of the run's tokenizer.

    folder: the export. It is loaded by AutoTokenizer, as its users do.
    tokenizer: the folder of the run's tokenizer.
    tokens: (1, S) held-out tokens. Their text is encoded.

    Returns the number of ids that were compared. Raises RunError if they differ.
    """
    of_run = Tokenizer.load(tokenizer)
    text = of_run.decode(tokens[tokens != of_run.end_of_text].tolist())
    (expected,) = of_run.encode_batch([text])
    register()
    try:
        exported = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except ValueError as error:
        raise RunError(
            f"{folder}: AutoTokenizer of transformers {transformers.__version__} cannot load the "
            f"tokenizer ({str(error).splitlines()[0]}); {REMEDY}"
        ) from None
    if isinstance(exported, PreTrainedTokenizerFast):
        # The names of special tokens in a text are text, as in the run's data.
        exported.backend_tokenizer.encode_special_tokens = True
    if exported(text, add_special_tokens=False).input_ids != expected:
        raise RunError(
            f"{folder}: AutoTokenizer of transformers {transformers.__version__} gives a text "
            f"other ids than the run was trained with; {REMEDY}"
        )
    return len(expected)
