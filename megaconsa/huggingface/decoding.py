"""Fast decoding of an export on a GPU: megaconsa's kernels under transformers' own `generate`.

    model = use_kernels(model)
    model.generate(**inputs, past_key_values=KernelCache(model, capacity=prompt_length + max_new_tokens))

Dense, layer-wise and head-wise models alike. The prompt goes through `hybrid_attention`, each new token through `decode_attention`,
and on a GPU a decoding step is one replayed CUDA graph. Where the kernels do not serve, their plain versions in torch run.
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
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.huggingface.modeling_megaconsa import CACHE, ONE_CALL, SLIDING
from megaconsa.kernels import KVCache, decode_attention, hybrid_attention

PLAIN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "cache_position",
    "logits_to_keep",
    "return_dict",
    "use_cache",
}
"""Arguments of a decoding step that change nothing of what it computes beside the token, its position and the cache."""


def use_kernels(model: Any) -> Any:
    """Switches a loaded Qwen3ForCausalLM or head-wise export to megaconsa's kernels, in place, and returns it.

    From then on a cache, if there is one, must be a `KernelCache`.
    """
    AttentionInterface.register(ONE_CALL, _attention)
    AttentionMaskInterface.register(ONE_CALL, _padding)
    model.set_attn_implementation(ONE_CALL)
    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm):
            # One kernel instead of seven: at a token a step their number is what a step takes.
            module.forward = types.MethodType(_norm, module)
    if not getattr(model, "steps_by_graph", False):
        model.__class__ = _stepping(type(model))  # type: ignore[arg-type]  # a class can be hashed
    return model


@lru_cache
def _stepping(kind: type) -> type:
    """The model's class with KernelCache's decoding steps on a GPU. A subclass, so that a copy of a model is a model of its own."""
    plain = kind.forward  # type: ignore[attr-defined]

    @torch.compiler.disable  # a cache that marks tensors and counts on the host cannot be traced
    @wraps(plain)
    def forward(self: Any, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        given = {name: value for name, value in arguments.items() if value is not None}
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
        return plain(self, input_ids=input_ids, **({CACHE: cache} if caches else {}), **given)

    return type(
        kind.__name__,
        (kind,),
        {"forward": forward, "steps_by_graph": True, "__module__": kind.__module__},
    )


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class KernelCache(Cache):
    """The KV cache of a model of `use_kernels`: sliding-window heads hold W tokens each, full-attention heads up to `capacity`.

    It is allocated at the first call, for the batch that comes, and not enlarged: ValueError where more tokens come than `capacity`.
    Beam search, left padding, prompts in pieces and continued conversations work; shortening it (assisted decoding) is refused.
    """

    mixes_kinds = True

    def __init__(self, model: Any, capacity: int) -> None:
        """capacity: tokens of a sequence, prompt and answer together."""
        super().__init__(
            layers=[
                KernelLayer(model.config, _windows(model.config, layer), capacity)
                for layer in range(model.config.num_hidden_layers)
            ]
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = self._positions = self._logits = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not; 0 before the first call."""
        return sum(layer.held.nbytes for layer in self.layers if layer.held is not None)

    def step(
        self, forward: Callable[..., Any], input_ids: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        """Logits (B, 1, V) for one more token of each sequence, (B, 1).

        The first step runs as it is, which compiles and tunes what it needs; the second is captured, and replayed from then on.
        """
        if position_ids is None:
            position_ids = torch.full_like(input_ids, self.get_seq_length())
        position_ids = position_ids.expand_as(input_ids)
        if self._graph is None and self._ids.numel() == 0:
            self._ids, self._positions = input_ids.clone(), position_ids.clone()
            return self._plain_step(forward)
        for layer in self.layers:
            layer.check_room(1)
        self._ids.copy_(input_ids)
        self._positions.copy_(position_ids)
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._plain_step(
                    forward
                )  # counts the token on the host, and computes nothing yet
            self._graph = graph
        else:
            for layer in self.layers:
                layer.held.length += 1
        self._graph.replay()
        return self._logits.clone()

    def _plain_step(self, forward: Callable[..., Any]) -> Tensor:
        logits: Tensor = forward(
            input_ids=self._ids, position_ids=self._positions, use_cache=True, **{CACHE: self}
        ).logits
        return logits


class KernelLayer(CacheLayerMixin):
    """Keys and values of a layer; `windows` are those of its KV heads."""

    is_compileable = False
    is_sliding = False

    def __init__(self, config: Any, windows: tuple[int, ...], capacity: int) -> None:
        super().__init__()
        self.config, self.windows, self.capacity = config, windows, capacity
        self.held: KVCache | None = None
        self._waiting = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch, _, _, dim = key_states.shape
        with torch.inference_mode(
            False
        ):  # what is made in inference mode could not be written to outside of it
            self.held = KVCache(
                batch,
                self.capacity,
                self.windows,
                dim,
                dtype=key_states.dtype,
                device=key_states.device,
            )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Marks the new keys (B, heads, T, D), by which `_attention`, called with them next, finds this cache."""
        if self.config._attn_implementation != ONE_CALL:
            raise ValueError(
                f"a KernelCache needs megaconsa's attention, but the model has {self.config._attn_implementation}: call use_kernels"
            )
        if self._waiting:
            raise RuntimeError(
                "keys did not reach megaconsa's attention as the cache gave them: the model's code copies them"
            )
        if self.held is None:
            self.lazy_initialization(key_states)
        self.check_room(key_states.shape[2])
        self._waiting = True
        key_states.megaconsa_cache = self  # type: ignore[attr-defined]
        return key_states, value_states

    def check_room(self, tokens: int) -> None:
        if self.get_seq_length() + tokens > self.capacity:
            raise ValueError(
                f"{tokens} more tokens do not fit: the cache holds {self.get_seq_length()} of capacity={self.capacity}"
            )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float
    ) -> Tensor:
        """Adds the new tokens and attends to all that is visible: (B, heads, T, D) each, returns (B, T, heads, D).

        padding: (B, past + T) booleans, False on the left of a sequence that is shorter than others; None if nothing is said of it.
        """
        self._waiting = False
        held = self.held
        assert held is not None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if padding is not None:
            held.start.copy_((~padding).sum(dim=1))
        if q.shape[1] == 1:
            held.append(k, v)
            return decode_attention(q, held, scale=scale)
        out = (
            _whole(q, k, v, self.windows, padding, scale)
            if held.length == 0
            else self._piece(query, key, value, scale)
        )
        held.append(k, v)
        return out

    def _piece(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Several tokens after earlier ones, by torch's attention with a mask."""
        held = self.held
        assert held is not None
        past, tokens, queries_per_head = held.length, key.shape[2], query.shape[1] // key.shape[1]
        new = torch.arange(past, past + tokens, device=key.device)
        out = torch.empty_like(query)
        for group in held.groups:
            heads = torch.tensor(group.heads, device=key.device)
            query_heads = (
                heads[:, None] * queries_per_head
                + torch.arange(queries_per_head, device=key.device)
            ).flatten()
            old = torch.arange(max(past - group.slots, 0), past, device=key.device)
            keys, values = (
                torch.cat([store[:, :, old % group.slots], x[:, heads]], dim=2)
                for store, x in ((group.keys, key), (group.values, value))
            )
            position = torch.cat([old, new])
            distance = new[:, None] - position
            visible = (distance >= 0) & (distance < held.windows[group.heads[0]])
            # Padding sees itself: a row without any key would be NaN, which a weight of 0 does not silence further on.
            visible = visible & ((position >= held.start[:, None, None, None]) | (distance == 0))
            out[:, query_heads] = functional.scaled_dot_product_attention(
                query[:, query_heads], keys, values, attn_mask=visible, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2)

    def get_seq_length(self) -> int:
        return 0 if self.held is None else self.held.length

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """Length and offset of the keys, whose padding `_padding` is asked for."""
        return self.get_seq_length() + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.24

    def reset(self) -> None:
        if self.held is not None:
            self.held.position.zero_()
            self.held.start.zero_()
            self.held.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place: a captured step keeps the addresses."""
        if self.held is not None:
            for store in (
                self.held.start,
                *(x for group in self.held.groups for x in (group.keys, group.values)),
            ):
                store.copy_(store.index_select(0, beam_idx.to(store.device)))

    def crop(self, *_: Any) -> None:
        raise ValueError(
            "a KernelCache cannot be shortened, as assisted decoding asks: sliding heads have dropped earlier tokens"
        )


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
    """As transformers calls attention; attention_mask is what `_padding` gave."""
    cache: KernelLayer | None = getattr(key, "megaconsa_cache", None)
    if cache is not None:
        if cache.windows != _windows(module.config, module.layer_idx):
            raise ValueError(
                "the KernelCache was made for a model with other windows; make one for this model"
            )
        del key.megaconsa_cache  # type: ignore[attr-defined]  # or cache and keys would keep each other
        return cache.attend(query, key, value, attention_mask, scaling), None
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "megaconsa's attention keeps its own cache: pass past_key_values=KernelCache(model, capacity)"
        )
    if (
        module.layer_idx == 0
        and attention_mask is None
        and position_ids is not None
        and bool((position_ids.diff(dim=-1) != 1).any())
    ):
        raise ValueError(
            "megaconsa's attention takes no packed sequences, as positions that start again tell; pass them apart"
        )
    windows = (
        sliding_window if isinstance(sliding_window, tuple) else (sliding_window,) * key.shape[1]
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return _whole(
        q, k, v, tuple(window or FULL_WINDOW for window in windows), attention_mask, scaling
    ), None


def _whole(
    q: Tensor, k: Tensor, v: Tensor, windows: tuple[int, ...], padding: Tensor | None, scale: float
) -> Tensor:
    """A prompt. Padding is a document of its own, which the text after it does not see."""
    documents = None if padding is None else padding.to(torch.int32)
    return hybrid_attention(q, k, v, window=windows, documents=documents, scale=scale)


def _windows(config: Any, layer: int) -> tuple[int, ...]:
    """Window of each KV head of a layer, in the order in which the export stores them."""
    heads = config.num_key_value_heads
    if hasattr(config, "num_full_kv_heads"):
        full = config.num_full_kv_heads[layer]
    else:
        full = 0 if config.layer_types and config.layer_types[layer] == SLIDING else heads
    return (FULL_WINDOW,) * full + (config.sliding_window,) * (heads - full)


def _padding(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """As transformers asks for masks: the padding, (B, past + T) booleans; None if every token is text.

    ValueError where there is padding elsewhere than on the left.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError(
            "megaconsa's attention takes padding on the left only; set tokenizer.padding_side to left"
        )
    return mask
