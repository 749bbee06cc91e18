"""Fast decoding of an export on a GPU: megaconsa's kernels under transformers' own `generate`.

    model = use_kernels(model)
    cache = KernelCache(model, capacity=prompt_length + max_new_tokens)
    model.generate(**inputs, past_key_values=cache)

This works for dense, layer-wise and head-wise models. `hybrid_attention` computes the prompt, and
`decode_attention` each new token. On a GPU, a decoding step is one replayed CUDA graph. Without
usable kernels, their plain versions in torch run instead.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.huggingface.kernel_layer import KernelLayer, attend_whole, layer_windows
from megaconsa.huggingface.modeling_megaconsa import CACHE, ONE_CALL

PLAIN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "cache_position",
    "logits_to_keep",
    "return_dict",
    "use_cache",
}
"""Arguments that a captured decoding step may get. Its result depends only on the token, its
position and the cache."""


def use_kernels(model: Any) -> Any:
    """Switches a loaded model to megaconsa's kernels, in place.

    model: a Qwen3ForCausalLM or a head-wise export. Afterwards, its cache must be a `KernelCache`
        if it uses one.

    Returns the same model.
    """
    AttentionInterface.register(ONE_CALL, _attention)
    AttentionMaskInterface.register(ONE_CALL, _padding)
    model.set_attn_implementation(ONE_CALL)
    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm):
            # One kernel instead of seven: with one token per step, a step's time is the number of
            # its kernels.
            module.forward = types.MethodType(_norm, module)
    if not getattr(model, "steps_by_graph", False):
        model.__class__ = _stepping(type(model))  # type: ignore[arg-type]  # a class can be hashed
    return model


@lru_cache
def _stepping(kind: type) -> type:
    """Returns a subclass of the model's class that runs KernelCache's decoding steps on a GPU.

    It is a subclass so that a copy of the model is independent of the original.
    """
    plain = kind.forward  # type: ignore[attr-defined]

    # The cache marks tensors and counts on the host, which cannot be traced.
    @torch.compiler.disable
    @wraps(plain)
    def forward(self: Any, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        given = {name: value for name, value in arguments.items() if value is not None}
        # transformers calls the argument past_key_values up to 5.23, and cache since.
        caches = [given.pop(name) for name in ("cache", "past_key_values") if name in given]
        cache = caches[0] if caches else None
        if (
            isinstance(cache, KernelCache)
            and input_ids is not None
            and input_ids.is_cuda
            and input_ids.shape[1] == 1
            and given.keys() <= PLAIN_ARGUMENTS
            and given.get("return_dict", True)
            and not torch.is_grad_enabled()
        ):
            logits = cache.step(partial(plain, self), input_ids, given.get("position_ids"))
            return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})
        if caches:
            given[CACHE] = cache
        return plain(self, input_ids=input_ids, **given)

    members = {"forward": forward, "steps_by_graph": True, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replaces Qwen3RMSNorm.forward by torch's fused kernel."""
    return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class KernelCache(Cache):
    """The KV cache of a model that `use_kernels` has switched.

    Sliding-window heads hold W tokens each, full-attention heads up to `capacity`. The first call
    allocates the cache for its batch. The cache never grows: more than `capacity` tokens raise
    ValueError. Beam search, left padding, prompts in pieces and continued conversations work.
    Shortening the cache, which assisted decoding needs, is refused.
    """

    mixes_kinds = True
    """Tells `split_cache` of a head-wise export to leave this cache as it is."""

    def __init__(self, model: Any, capacity: int) -> None:
        """capacity: tokens of a sequence, prompt and answer together."""
        config = model.config
        layers = [
            KernelLayer(config, layer_windows(config, layer), capacity)
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = self._positions = self._logits = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not. 0 before the first call."""
        return sum(layer.held.nbytes for layer in self.layers if layer.held is not None)

    def step(
        self, forward: Callable[..., Any], input_ids: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        """Decodes one more token of each sequence.

        forward: the model's own forward.
        input_ids, position_ids: (B, 1). The default position is the length of the cache.

        The first step runs without a graph, which compiles and tunes the kernels. The second step
        is captured, and replayed from then on. Returns logits, (B, 1, V).
        """
        if position_ids is None:
            position_ids = torch.full_like(input_ids, self.get_seq_length())
        position_ids = position_ids.expand_as(input_ids)
        if self._graph is None and self._ids.numel() == 0:
            self._ids = input_ids.clone()
            self._positions = position_ids.clone()
            return self._plain_step(forward)
        for layer in self.layers:
            layer.check_room(1)
        self._ids.copy_(input_ids)
        self._positions.copy_(position_ids)
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                # Capturing counts the token on the host, but computes nothing yet.
                self._logits = self._plain_step(forward)
            self._graph = graph
        else:
            # A replay does not run the host's code, which counts the tokens.
            for layer in self.layers:
                layer.held.length += 1
        self._graph.replay()
        return self._logits.clone()

    def _plain_step(self, forward: Callable[..., Any]) -> Tensor:
        output = forward(
            input_ids=self._ids, position_ids=self._positions, use_cache=True, **{CACHE: self}
        )
        logits: Tensor = output.logits
        return logits


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | tuple[int | None, ...] | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes attention with the interface that transformers calls.

    query, key, value: (B, heads, T, D). attention_mask: the result of `_padding`.

    Returns (B, T, heads, D) and None in place of attention weights.
    """
    cache: KernelLayer | None = getattr(key, "megaconsa_cache", None)
    if cache is not None:
        if cache.windows != layer_windows(module.config, module.layer_idx):
            raise ValueError(
                "the KernelCache was made for a model with other windows; make one for this model"
            )
        # Without this, the cache and the keys would keep each other alive.
        del key.megaconsa_cache  # type: ignore[attr-defined]
        return cache.attend(query, key, value, attention_mask, scaling), None
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "megaconsa's attention keeps its own cache: "
            "pass past_key_values=KernelCache(model, capacity)"
        )
    if (
        module.layer_idx == 0
        and attention_mask is None
        and position_ids is not None
        and bool((position_ids.diff(dim=-1) != 1).any())
    ):
        raise ValueError(
            "megaconsa's attention takes no packed sequences, as positions that start again tell; "
            "pass them apart"
        )
    if not isinstance(sliding_window, tuple):
        sliding_window = (sliding_window,) * key.shape[1]
    windows = tuple(window or FULL_WINDOW for window in sliding_window)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend_whole(q, k, v, windows, attention_mask, scaling), None


def _padding(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Builds the mask with the interface that transformers calls.

    Returns the padding mask, (B, past + T) booleans, or None if every token is text. Raises
    ValueError for padding anywhere but on the left.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError(
            "megaconsa's attention takes padding on the left only; "
            "set tokenizer.padding_side to left"
        )
    return mask
