"""One layer of a `KernelCache`: it keeps keys and values, and attends to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.huggingface.modeling_megaconsa import ONE_CALL, SLIDING
from megaconsa.kernels import KVCache, decode_attention, hybrid_attention


class KernelLayer(CacheLayerMixin):
    """Keys and values of one layer."""

    is_compileable = False
    is_sliding = False

    def __init__(self, config: Any, windows: tuple[int, ...], capacity: int) -> None:
        """windows: of each KV head of the layer, in tokens. capacity: tokens of a sequence."""
        super().__init__()
        self.config = config
        self.windows = windows
        self.capacity = capacity
        self.held: KVCache | None = None
        self._waiting = False
        """True from `update` until `attend` gets the keys."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch, _, _, dim = key_states.shape
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
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
        """Marks the new keys, (B, heads, T, D), with this cache.

        transformers calls `_attention` with these keys next. It finds the cache by the mark.

        Raises ValueError if the model does not use megaconsa's attention, and RuntimeError if the
        keys before did not reach it.
        """
        if self.config._attn_implementation != ONE_CALL:
            raise ValueError(
                "a KernelCache needs megaconsa's attention, "
                f"but the model has {self.config._attn_implementation}: call use_kernels"
            )
        if self._waiting:
            raise RuntimeError(
                "keys did not reach megaconsa's attention as the cache gave them: "
                "the model's code copies them"
            )
        if self.held is None:
            self.lazy_initialization(key_states)
        self.check_room(key_states.shape[2])
        self._waiting = True
        key_states.megaconsa_cache = self  # type: ignore[attr-defined]
        return key_states, value_states

    def check_room(self, tokens: int) -> None:
        """Raises ValueError if `tokens` more tokens do not fit."""
        if self.get_seq_length() + tokens > self.capacity:
            raise ValueError(
                f"{tokens} more tokens do not fit: "
                f"the cache holds {self.get_seq_length()} of capacity={self.capacity}"
            )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float
    ) -> Tensor:
        """Adds the new tokens to the cache and attends to all visible ones.

        query, key, value: (B, heads, T, D) each, of the new tokens.
        padding: (B, past + T) booleans, False for padding, which is on the left. None keeps what
            the cache knows of padding.

        Returns (B, T, heads, D).
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
        if held.length == 0:
            out = attend_whole(q, k, v, self.windows, padding, scale)
        else:
            out = self._piece(query, key, value, scale)
        held.append(k, v)
        return out

    def _piece(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attends from several new tokens to earlier and new ones, with torch's masked attention.

        query, key, value: (B, heads, T, D) each, of the new tokens. Returns (B, T, heads, D).
        """
        held = self.held
        assert held is not None
        past = held.length
        tokens = key.shape[2]
        queries_per_head = query.shape[1] // key.shape[1]
        new = torch.arange(past, past + tokens, device=key.device)
        out = torch.empty_like(query)
        for group in held.groups:
            heads = torch.tensor(group.heads, device=key.device)
            first_query = heads[:, None] * queries_per_head
            offsets = torch.arange(queries_per_head, device=key.device)
            query_heads = (first_query + offsets).flatten()
            # The cache is a ring: token j is in slot j modulo the number of slots.
            old = torch.arange(max(past - group.slots, 0), past, device=key.device)
            slots = old % group.slots
            keys = torch.cat([group.keys[:, :, slots], key[:, heads]], dim=2)
            values = torch.cat([group.values[:, :, slots], value[:, heads]], dim=2)
            position = torch.cat([old, new])
            distance = new[:, None] - position
            visible = (distance >= 0) & (distance < held.windows[group.heads[0]])
            # Padding sees itself. A row without any key would be NaN, and later layers would spread
            # it, because a weight of 0 does not remove a NaN.
            visible = visible & ((position >= held.start[:, None, None, None]) | (distance == 0))
            out[:, query_heads] = functional.scaled_dot_product_attention(
                query[:, query_heads], keys, values, attn_mask=visible, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2)

    def get_seq_length(self) -> int:
        return 0 if self.held is None else self.held.length

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """Returns length and offset of the keys. transformers asks `_padding` for their padding."""
        tokens = query if isinstance(query, int) else query.shape[0]
        return self.get_seq_length() + tokens, 0

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # the name before transformers 5.24

    def reset(self) -> None:
        if self.held is not None:
            self.held.position.zero_()
            self.held.start.zero_()
            self.held.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders sequences in place, because a captured step keeps the addresses."""
        if self.held is None:
            return
        stores = [self.held.start]
        for group in self.held.groups:
            stores += [group.keys, group.values]
        for store in stores:
            store.copy_(store.index_select(0, beam_idx.to(store.device)))

    def crop(self, *_: Any) -> None:
        raise ValueError(
            "a KernelCache cannot be shortened, as assisted decoding asks: "
            "sliding heads have dropped earlier tokens"
        )


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, windows: tuple[int, ...], padding: Tensor | None, scale: float
) -> Tensor:
    """Attends within a prompt, (B, T, heads, D) each.

    Padding is a separate document, which the text after it does not see.
    """
    documents = None if padding is None else padding.to(torch.int32)
    return hybrid_attention(q, k, v, window=windows, documents=documents, scale=scale)


def layer_windows(config: Any, layer: int) -> tuple[int, ...]:
    """Returns the window of each KV head of a layer, in the order of the export's weights."""
    heads = config.num_key_value_heads
    if hasattr(config, "num_full_kv_heads"):
        full = config.num_full_kv_heads[layer]
    elif config.layer_types and config.layer_types[layer] == SLIDING:
        full = 0
    else:
        full = heads
    return (FULL_WINDOW,) * full + (config.sliding_window,) * (heads - full)
