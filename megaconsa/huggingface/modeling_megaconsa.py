"""Qwen3 with two kinds of KV heads in a layer: full attention, and a sliding window.

This file ships with every head-wise export of megaconsa. It needs only torch and transformers
(4.57 or later, 5.x).

A layer stores its full-attention KV heads first, `config.num_full_kv_heads[layer]` of them. The KV
heads of one kind and their query heads are a *head group*. A layer calls attention once per group.
Each group has its own cache layer, so that sliding heads keep only the window - 1 tokens that the
next query can still see. Everything else is transformers' Qwen3, including the parameter names.
"""

from __future__ import annotations

import inspect
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, Qwen3Config, StaticCache
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
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

FULL = "full_attention"
SLIDING = "sliding_attention"
POSITIONS = "positions"
ONE_CALL = "megaconsa"
"""Attention that takes both kinds of heads in one call, with a tuple of windows (None: full)."""
MASK_BUILDERS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
# transformers 5.24 renamed the argument in all layers of a model.
RENAMED = "cache" in inspect.signature(Qwen3Attention.forward).parameters
CACHE = "cache" if RENAMED else "past_key_values"
# transformers 5 keeps everything about the rotary embedding in one field. 4 ignores that field.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
IN_ONE_FIELD = hasattr(Qwen3Config(), "rope_parameters")


def rope_parameters(fields: dict[str, Any]) -> dict[str, Any]:
    """Reads the rotary embedding: `rope_type`, `rope_theta` and whatever else the type needs.

    fields: in the spelling of transformers 4 (`rope_theta`, `rope_scaling`), of 5
        (`rope_parameters`), or both.
    Raises ValueError if the fields contradict each other, since releases would pick different
    ones, or if Qwen3 cannot read them.
    """
    thetas = {"rope_theta": fields["rope_theta"]} if "rope_theta" in fields else {}
    found: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = fields.get(name)
        if given is None or given == {}:
            continue
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise ValueError(
                f"{name}={given!r} must be one flat mapping: "
                "Qwen3 has one rotary embedding for all layers"
            )
        parameters = dict(given)
        if "rope_theta" in parameters:
            thetas[f"{name}.rope_theta"] = parameters.pop("rope_theta")
        old_name = parameters.pop("type", None)
        rope_type = parameters.setdefault("rope_type", old_name or "default")
        if old_name and rope_type != old_name:
            raise ValueError(
                f"{name}={given!r} has a type and another rope_type; remove the wrong one"
            )
        found[name] = {key: value for key, value in parameters.items() if value is not None}
    for name, value in thetas.items():
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r} is not a positive number")
    first, *others = thetas.items() or [("rope_theta", 10_000.0)]  # Qwen3's own default
    theta = first[1]
    for name, other in others:
        if other != theta:
            raise ValueError(
                f"{first[0]}={theta!r} and {name}={other!r} contradict each other; "
                "keep the one the model was trained with"
            )
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        both = " and ".join(f"{name}={fields[name]!r}" for name in found)
        raise ValueError(f"{both} contradict each other; keep the one the model was trained with")
    return next(iter(found.values()), {"rope_type": "default"}) | {"rope_theta": theta}


def native_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Spells the result of `rope_parameters` as this release of transformers expects it."""
    return {"rope_parameters": parameters} if IN_ONE_FIELD else old_rope(parameters)


def old_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Spells the result of `rope_parameters` as transformers 4 expects it."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = scaling == {"rope_type": "default"}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": None if plain else scaling}


class MegaconsaConfig(Qwen3Config):
    """Qwen3's fields and two more.

    num_full_kv_heads: KV heads with full attention in each layer, which the model stores first. The
        other heads see `sliding_window` keys, the query's own included. By default all are full.
    full_attention: (num_hidden_layers, num_key_value_heads) booleans, in the head order that the
        model was trained with. For people and tools: the model does not read it.

    `layer_types` is always `full_attention`, because the kind belongs to the head, not the layer.
    """

    model_type = "megaconsa"
    # Qwen3's plan splits heads evenly: a rank would get the wrong mixture of full and sliding ones.
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
        layers = self.num_hidden_layers
        heads = self.num_key_value_heads
        if num_full_kv_heads is None:
            num_full_kv_heads = [heads] * layers
        right_length = len(num_full_kv_heads) == layers
        if not right_length or not all(0 <= full <= heads for full in num_full_kv_heads):
            raise ValueError(
                f"num_full_kv_heads={num_full_kv_heads} must give a count from 0 to {heads} "
                f"for each of {layers} layers"
            )
        # With a window of 1, transformers' sliding cache layer keeps all tokens instead of none.
        some_slide = min(num_full_kv_heads) < heads
        if some_slide and (self.sliding_window is None or self.sliding_window < 2):
            raise ValueError(
                f"sliding_window={self.sliding_window} must be at least 2, as some heads use it"
            )
        self.num_full_kv_heads = num_full_kv_heads
        self.full_attention = full_attention
        self.layer_types = [FULL] * layers

    def to_dict(self) -> dict[str, Any]:
        """Adds the rotary embedding in both spellings: 4 would read 1e4 in what 5 writes."""
        fields: dict[str, Any] = super().to_dict()
        names = ("rope_parameters",) if IN_ONE_FIELD else ("rope_theta", "rope_scaling")
        parameters = rope_parameters({name: getattr(self, name) for name in names})
        return fields | {"rope_parameters": parameters} | old_rope(parameters)


class HeadGroup(NamedTuple):
    """The heads of one kind in one layer. A layer whose heads are all alike has one group."""

    kind: str
    kv_heads: slice
    query_heads: slice
    cache_index: int
    """Index of the cache layer that holds the group's keys and values."""


def head_groups(config: MegaconsaConfig) -> list[list[HeadGroup]]:
    """Returns each layer's groups, full attention first. Cache indices run through the model."""
    heads = config.num_key_value_heads
    ratio = config.num_attention_heads // heads
    cache_index = count()
    groups = []
    for full in config.num_full_kv_heads:
        layer = []
        for kind, start, stop in ((FULL, 0, full), (SLIDING, full, heads)):
            if start < stop:
                queries = slice(start * ratio, stop * ratio)
                layer.append(HeadGroup(kind, slice(start, stop), queries, next(cache_index)))
        groups.append(layer)
    return groups


def split_cache(cache: Cache | None, config: MegaconsaConfig) -> Cache:
    """Gives an empty cache one cache layer per head group, in place. None makes a new cache.

    A cache with this layout is returned as it is, filled or not. Raises ValueError for any other.
    """
    if cache is None:
        cache = DynamicCache()
    # The cache of ONE_CALL keeps heads of both kinds in one layer.
    if getattr(cache, "mixes_kinds", False):
        return cache
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        raise ValueError(
            f"{type(cache).__name__} is not supported, nor is offloading: sliding and full heads "
            "of a layer are cached apart, which needs a plain DynamicCache or StaticCache"
        )
    sliding = [group.kind == SLIDING for layer in head_groups(config) for group in layer]
    if [layer.is_sliding for layer in cache.layers] == sliding:
        return cache
    if cache.get_seq_length() > 0:
        raise ValueError(
            "past_key_values was filled by another model; "
            "pass an empty cache or one that this model returned"
        )
    window = config.sliding_window
    if type(cache) is StaticCache:
        # `layer_types` made all of its layers full-attention ones, so any of them has the length.
        length = cache.layers[0].max_cache_len
        cache.layers = [
            StaticSlidingWindowLayer(length, window) if slides else StaticLayer(length)
            for slides in sliding
        ]
    else:
        cache.layers = [
            DynamicSlidingWindowLayer(window) if slides else DynamicLayer() for slides in sliding
        ]
        # The layout is complete, so the cache must not add layers when they are first used.
        cache.layer_class_to_replicate = None
    return cache


class MegaconsaAttention(Qwen3Attention):
    """Qwen3's attention, with one call of the attention function per head group."""

    def __init__(self, config: MegaconsaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.groups = head_groups(config)[layer_idx]
        full = config.num_full_kv_heads[layer_idx]
        sliding = config.num_key_value_heads - full
        self.windows = (None,) * full + (config.sliding_window,) * sliding

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: dict[str, Tensor | None],
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: (batch, length, hidden). attention_mask: one per kind, and POSITIONS."""
        cache = kwargs.pop(CACHE, None)
        batch, length = hidden_states.shape[:2]
        by_head = (batch, length, -1, self.head_dim)
        # (batch, heads, length, head_dim) each
        query = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        implementation = self.config._attn_implementation
        if implementation == "eager":
            attend = eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[implementation]
        groups = self.groups
        windows: dict[str, Any] = {FULL: None, SLIDING: self.config.sliding_window}
        if implementation == ONE_CALL:
            groups = [HeadGroup(FULL, slice(None), slice(None), self.layer_idx)]
            windows = {FULL: self.windows}
        outputs = []
        for group in groups:
            keys = key[:, group.kv_heads]
            values = value[:, group.kv_heads]
            if cache is not None:
                # Static caches need the positions before transformers 5.
                place = {"cache_position": attention_mask[POSITIONS]}
                keys, values = cache.update(keys, values, group.cache_index, place)
            output, _ = attend(
                self,
                query[:, group.query_heads],
                keys,
                values,
                attention_mask[group.kind],
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=windows[group.kind],
                **kwargs,
            )
            outputs.append(output)  # (batch, length, the group's query heads, head_dim)
        return self.o_proj(torch.cat(outputs, dim=2).reshape(batch, length, -1)), None


class MegaconsaPreTrainedModel(Qwen3PreTrainedModel):
    """Declares what two attention calls a layer do not support, so that transformers refuses it."""

    config_class = MegaconsaConfig
    _supports_attention_backend = False  # serving engines keep one cache per layer
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    # A plain attribute, as transformers has it.
    _can_record_outputs = {"hidden_states": Qwen3DecoderLayer}  # noqa: RUF012


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
        """Runs Qwen3Model.forward.

        attention_mask: the padding mask, (batch, past + length), or None.
        past_key_values, cache: two names of one argument, up to transformers 5.23 and since.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions is not supported: "
                "full and sliding heads attend to different numbers of keys"
            )
        cache = past_key_values if cache is None else cache
        if self.training and self.gradient_checkpointing:
            use_cache = False
            cache = None
        elif use_cache is None:
            use_cache = self.config.use_cache
        if use_cache or cache is not None:
            cache = split_cache(cache, self.config)
        if attention_mask is not None and (
            isinstance(attention_mask, dict) or attention_mask.dim() != 2
        ):
            raise ValueError(
                "attention_mask must be a (batch, length) mask of padding: "
                "one over keys would undo the sliding window"
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
        one_call = self.config._attn_implementation == ONE_CALL
        masks: dict[str, Any] = {POSITIONS: positions}
        for kind in {FULL} if one_call else self.kinds:
            build = MASK_BUILDERS[kind]
            accepted = inspect.signature(build).parameters
            masks[kind] = build(**{k: value for k, value in arguments.items() if k in accepted})
        # Qwen3Model gives each layer the mask of its layer type. All layers have one type here, so
        # each layer gets both masks.
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
        """Keeps the padding mask as it is."""
        # With a static cache, generate would turn it into a mask over keys, for one kind of head.
        return attention_mask

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refuses a paged cache early: later failures are only logged, and nothing is generated."""
        raise ValueError(
            "a paged cache (continuous batching) is not supported: "
            "sliding and full heads are cached apart"
        )
