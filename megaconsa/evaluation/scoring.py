"""Scores given tokens under a loaded model, without ever holding all logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGIT_BYTES = 256 << 20
"""Bytes of fp32 logits at a time. The logits of 32,768 positions over Qwen3's 151,936 tokens would
take 20 GB."""


@torch.inference_mode()
def score(model: Any, tokens: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Computes how likely each token is after those before it, by teacher forcing.

    One forward pass serves all positions. No position sees those after it, so shorter sequences may
    be padded on the right with any token. Logits have the model's precision, as transformers gives
    them. The softmax is computed in fp32.

    model: a Qwen3ForCausalLM or a head-wise export.
    tokens: (B, S + 1) int64 on any device, without padding on the left.
    first: the first position to score.

    Returns two tensors on the CPU for the positions first to S - 1: the log-probability of the next
    token, (B, S - first) fp32 in nats, and whether it is the likeliest of all tokens,
    (B, S - first) booleans.
    """
    tokens = tokens.to(model.device)
    labels = tokens[:, 1 + first :]
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[:, first:]
    positions = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    parts = hidden.flatten(0, 1).split(positions)
    part_labels = labels.flatten().split(positions)
    likelihoods = []
    likeliest = []
    for part, label in zip(parts, part_labels, strict=True):
        logits = model.lm_head(part).float()
        likelihoods.append(logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(dim=1))
        likeliest.append(logits.argmax(dim=1) == label)
    shape = labels.shape
    return torch.cat(likelihoods).view(shape).cpu(), torch.cat(likeliest).view(shape).cpu()
