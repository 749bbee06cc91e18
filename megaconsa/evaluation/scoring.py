"""Log-probabilities of given tokens under a loaded model, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGIT_BYTES = 256 << 20
"""Of fp32 logits at a time. Those of 32,768 positions over Qwen3's 151,936 tokens would take 20 GB."""


@torch.inference_mode()
def score(model: Any, tokens: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """How likely each token is after those before it, by teacher forcing: one forward pass for all positions.

    model: a Qwen3ForCausalLM or head-wise export. tokens: (B, S + 1) int64 on any device, without padding on the left. Returns, on the
    CPU, for positions first to S - 1 the log-probability of the next token, (B, S - first) fp32 in nats, and whether it is the
    likeliest of all, (B, S - first) booleans.

    No position sees those after it, so shorter sequences may be padded on the right with any token. Logits are of the model's
    precision, as transformers gives them; the softmax is computed in fp32.
    """
    tokens = tokens.to(model.device)
    labels = tokens[:, 1 + first :]
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[:, first:]
    shape, hidden = labels.shape, hidden.flatten(0, 1)
    positions = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    likelihoods, likeliest = [], []
    for part, label in zip(hidden.split(positions), labels.flatten().split(positions), strict=True):
        logits = model.lm_head(part).float()
        likelihoods.append(logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(dim=1))
        likeliest.append(logits.argmax(dim=1) == label)
    return torch.cat(likelihoods).view(shape).cpu(), torch.cat(likeliest).view(shape).cpu()
