"""Qwen3 in which some KV heads of a layer see everything before them and the others only a sliding window.

This file ships with every head-wise export of megaconsa and needs only torch and transformers (4.57 or later, 5.x).

The KV heads of a layer are stored with the full-attention ones first; `config.num_full_kv_heads[layer]` says how many they
are. Each kind, with its query heads, is a *head group*: a layer calls attention once per group, and each group has a cache
layer of its own, so that sliding heads keep only the window - 1 tokens that the next query can still see. All else, the
parameter names included, is transformers' Qwen3.
"""

from __future__ import annotations

import inspect
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

FULL, SLIDING, POSITIONS = "full_attention", "sliding_attention", "positions"
ONE_CALL = "megaconsa"
"""An attention implementation that takes heads of both kinds in one call, and their windows as a tuple (None is full attention)."""
MASK_BUILDERS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
# transformers 5.24 renamed the argument in all layers of a model.
CACHE = (
    "cache"
    if "cache" in inspect.signature(Qwen3Attention.forward).parameters
    else "past_key_values"
)
# transformers 5 keeps all that concerns the rotary embedding in one field; 4 ignores that field.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
IN_ONE_FIELD = hasattr(Qwen3Config(), "rope_parameters")


def rope_parameters(fields: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of the rotary embedding: `rope_type`, `rope_theta` and what else
    the type needs.

    fields: in the spelling of transformers 4 (`rope_theta`, `rope_scaling`), of 5
    (`rope_parameters`), or both. Raises ValueError where they contradict each other or are not what
    Qwen3 reads: releases would settle on different ones.
    """
    thetas = {"rope_theta": fields["rope_theta"]} if "rope_theta" in fields else {}
    found: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = fields.get(name)
        if given is None or given == {}:
            continue
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise ValueError(
                f"{name}={given!r} must be one flat mapping: Qwen3 has one rotary embedding for all layers"
            )
        parameters = dict(given)
        if "rope_theta" in parameters:
            thetas[f"{name}.rope_theta"] = parameters.pop("rope_theta")
        old_name = parameters.pop("type", None)
        if parameters.setdefault("rope_type", old_name or "default") != (
            old_name or parameters["rope_type"]
        ):
            raise ValueError(
                f"{name}={given!r} has a type and another rope_type; remove the wrong one"
            )
        found[name] = {key: value for key, value in parameters.items() if value is not None}
    for name, theta in thetas.items():
        if type(theta) not in (int, float) or not 0 < theta < float("inf"):
            raise ValueError(f"{name}={theta!r} is not a positive number")
    first, *others = thetas.items() or [("rope_theta", 10_000.0)]  # Qwen3's own default
    for name, theta in others:
        if theta != first[1]:
            raise ValueError(
                f"{first[0]}={first[1]!r} and {name}={theta!r} contradict each other; keep the one the model was trained with"
            )
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        both = " and ".join(f"{name}={fields[name]!r}" for name in found)
        raise ValueError(f"{both} contradict each other; keep the one the model was trained with")
    return next(iter(found.values()), {"rope_type": "default"}) | {"rope_theta": first[1]}


def native_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """The fields by which this release of transformers is told what `rope_parameters` returned."""
    return {"rope_parameters": parameters} if IN_ONE_FIELD else old_rope(parameters)


def old_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """As native_rope, the fields of transformers 4."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = scaling == {"rope_type": "default"}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": None if plain else scaling}


class MegaconsaConfig(Qwen3Config):
    """Qwen3's fields and two more.

    num_full_kv_heads: per layer, how many KV heads have full attention. The model stores them first; the other heads see
        `sliding_window` keys, the query's own included. Left out, every head has full attention.
    full_attention: (num_hidden_layers, num_key_value_heads) booleans in the head order that the model was trained with. For
        people and tools; the model does not read it.

    `layer_types` is always `full_attention`: the kind is a matter of the head here, not of the layer.
    """

    model_type = "megaconsa"
    # Qwen3's plan cuts heads evenly over ranks, which would give a rank the wrong mixture of full and sliding ones.
    base_model_tp_plan = None

    def __init__(
        self,
        num_full_kv_heads: list[int] | None = None,
        full_attention: list[list[bool]] | None = None,
        use_sliding_window: bool = True,
        **kwargs: Any,
    ) -> None:
        rope = native_rope(rope_parameters(kwargs))
        others = {key: value for key, value in kwargs.items() if key not in ROPE_FIELDS}
        super().__init__(use_sliding_window=use_sliding_window, **others, **rope)
        layers, heads = self.num_hidden_layers, self.num_key_value_heads
        if num_full_kv_heads is None:
            num_full_kv_heads = [heads] * layers
        if len(num_full_kv_heads) != layers or not all(
            0 <= full <= heads for full in num_full_kv_heads
        ):
            raise ValueError(
                f"num_full_kv_heads={num_full_kv_heads} must give a count from 0 to {heads} for each of {layers} layers"
            )
        # transformers' sliding cache layer keeps all tokens, instead of none, for a window of 1.
        if min(num_full_kv_heads) < heads and (
            self.sliding_window is None or self.sliding_window < 2
        ):
            raise ValueError(
                f"sliding_window={self.sliding_window} must be at least 2, as some heads use it"
            )
        self.num_full_kv_heads = num_full_kv_heads
        self.full_attention = full_attention
        self.layer_types = [FULL] * layers

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with the rotary embedding in both spellings: 4 would read 1e4 in what 5
        writes.
        """
        fields: dict[str, Any] = super().to_dict()
        names = ("rope_parameters",) if IN_ONE_FIELD else ("rope_theta", "rope_scaling")
        parameters = rope_parameters({name: getattr(self, name) for name in names})
        return fields | {"rope_parameters": parameters} | old_rope(parameters)


class HeadGroup(NamedTuple):
    """The heads of one kind in one layer. There is no empty group: a layer of one kind has one group."""

    kind: str
    kv_heads: slice
    query_heads: slice
    cache_index: int
    """Which layer of the cache holds the group's keys and values."""


def head_groups(config: MegaconsaConfig) -> list[list[HeadGroup]]:
    """The groups of each layer, full attention first; cache indices count them through the whole model."""
    heads = config.num_key_value_heads
    queries_per_head = config.num_attention_heads // heads
    cache_index = count()
    return [
        [
            HeadGroup(
                kind,
                slice(start, stop),
                slice(start * queries_per_head, stop * queries_per_head),
                next(cache_index),
            )
            for kind, start, stop in ((FULL, 0, full), (SLIDING, full, heads))
            if start < stop
        ]
        for full in config.num_full_kv_heads
    ]


def split_cache(cache: Cache | None, config: MegaconsaConfig) -> Cache:
    """Lays out an empty cache (or a new one, for None) with a cache layer per head group, in place.

    A cache that has this layout already is returned as it is, filled or not. Raises ValueError for any other.
    """
    if cache is None:
        cache = DynamicCache()
    if getattr(
        cache, "mixes_kinds", False
    ):  # of ONE_CALL: it keeps heads of both kinds in one layer
        return cache
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        raise ValueError(
            f"{type(cache).__name__} is not supported, nor is offloading: sliding and full heads of a layer are cached apart, "
            "which needs a plain DynamicCache or StaticCache"
        )
    sliding = [group.kind == SLIDING for layer in head_groups(config) for group in layer]
    if [layer.is_sliding for layer in cache.layers] == sliding:
        return cache
    if cache.get_seq_length() > 0:
        raise ValueError(
            "past_key_values was filled by another model; pass an empty cache or one that this model returned"
        )
    window = config.sliding_window
    if type(cache) is StaticCache:
        length = cache.layers[
            0
        ].max_cache_len  # the configuration made full-attention layers of all
        cache.layers = [
            StaticSlidingWindowLayer(length, window) if slides else StaticLayer(length)
            for slides in sliding
        ]
    else:
        cache.layers = [
            DynamicSlidingWindowLayer(window) if slides else DynamicLayer() for slides in sliding
        ]
        cache.layer_class_to_replicate = (
            None  # the layout is complete: nothing is to be added when layers are first used
        )
    return cache


class MegaconsaAttention(Qwen3Attention):
    """Qwen3's attention, with one call of the attention function per head group."""

    def __init__(self, config: MegaconsaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.groups = head_groups(config)[layer_idx]
        full = config.num_full_kv_heads[layer_idx]
        self.windows = (None,) * full + (config.sliding_window,) * (
            config.num_key_value_heads - full
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: dict[str, Tensor | None],
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: (batch, length, hidden), as is what returns; attention_mask: one for each kind of head, and the positions."""
        cache = kwargs.pop(CACHE, None)
        batch, length = hidden_states.shape[:2]
        by_head = (batch, length, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(
            1, 2
        )  # (batch, query heads, length, head_dim)
        key = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(
            1, 2
        )  # (batch, KV heads, length, head_dim)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        implementation = self.config._attn_implementation
        attend = (
            eager_attention_forward
            if implementation == "eager"
            else ALL_ATTENTION_FUNCTIONS[implementation]
        )
        groups, windows = self.groups, {FULL: None, SLIDING: self.config.sliding_window}
        if implementation == ONE_CALL:
            groups, windows = (
                [HeadGroup(FULL, slice(None), slice(None), self.layer_idx)],
                {FULL: self.windows},
            )
        outputs = []
        for group in groups:
            group_key, group_value = key[:, group.kv_heads], value[:, group.kv_heads]
            if cache is not None:
                place = {
                    "cache_position": attention_mask[POSITIONS]
                }  # asked for by static caches before transformers 5
                group_key, group_value = cache.update(
                    group_key, group_value, group.cache_index, place
                )
            output, _ = attend(
                self,
                query[:, group.query_heads],
                group_key,
                group_value,
                attention_mask[group.kind],
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=windows[group.kind],
                **kwargs,
            )
            outputs.append(output)  # (batch, length, the group's query heads, head_dim)
        return self.o_proj(torch.cat(outputs, dim=2).reshape(batch, length, -1)), None


class MegaconsaPreTrainedModel(Qwen3PreTrainedModel):
    """What of Qwen3's abilities does not hold with two attention calls in a layer, so that transformers refuses it."""

    config_class = MegaconsaConfig
    _supports_attention_backend = False  # serving engines keep one cache per layer
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": Qwen3DecoderLayer}  # noqa: RUF012 (transformers declares it so)


class MegaconsaModel(MegaconsaPreTrainedModel, Qwen3Model):
    def __init__(self, config: MegaconsaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = MegaconsaAttention(config, index)
        self.kinds = {group.kind for layer in head_groups(config) for group in layer}
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Qwen3Model.forward; attention_mask is the padding mask, (batch, past + length), or None.

        The cache is called past_key_values up to transformers 5.23, cache since; either name serves.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions is not supported: full and sliding heads attend to different numbers of keys"
            )
        cache = past_key_values if cache is None else cache
        if self.training and self.gradient_checkpointing:
            use_cache, cache = False, None
        elif use_cache is None:
            use_cache = self.config.use_cache
        if use_cache or cache is not None:
            cache = split_cache(cache, self.config)
        if attention_mask is not None and (
            isinstance(attention_mask, dict) or attention_mask.dim() != 2
        ):
            raise ValueError(
                "attention_mask must be a (batch, length) mask of padding: one over keys would undo the sliding window"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
        if position_ids is None:
            position_ids = positions[None]

        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "input_embeds": inputs_embeds,  # the name in 4.57
            "attention_mask": attention_mask,
            "cache_position": positions,  # in 4.57 only
            CACHE: cache,
            "position_ids": position_ids,
        }
        masks: dict[str, Any] = {POSITIONS: positions}
        for kind in {FULL} if self.config._attn_implementation == ONE_CALL else self.kinds:
            build = MASK_BUILDERS[kind]
            accepted = inspect.signature(build).parameters
            masks[kind] = build(
                **{name: argument for name, argument in arguments.items() if name in accepted}
            )
        # Qwen3Model hands each layer the mask of its layer type. All have the same type here, so each gets both masks.
        return super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask={FULL: masks},
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )


class MegaconsaForCausalLM(MegaconsaPreTrainedModel, Qwen3ForCausalLM):
    def __init__(self, config: MegaconsaConfig) -> None:
        super().__init__(config)
        self.model = MegaconsaModel(config)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """The padding mask as it is: with a static cache, generate would make a mask over keys, for one kind of head, of it."""
        return attention_mask

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refused here, where generate's paged cache begins: what fails later on is only logged, and nothing is generated."""
        raise ValueError(
            "a paged cache (continuous batching) is not supported: sliding and full heads are cached apart"
        )
