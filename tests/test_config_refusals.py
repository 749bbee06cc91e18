"""What the run configuration refuses. The message names field, value and fix."""

from __future__ import annotations

from typing import Any

import pytest

from megaconsa.config import build
from tests.support.config_cases import BASE, PER_LAYER, changed, refusal


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainning": {}}, "unknown field trainning; did you mean training?"),
        ({"zebra": {}}, "unknown field zebra; known are run, model, attention"),
        (
            {"training__step": 3},
            "unknown field training.step in section training; did you mean training.steps?",
        ),
        (
            {"attention__zebra": 3},
            "unknown field attention.zebra in section attention; known are window, backend",
        ),
        ({"data": {}}, "field data.path is missing; give it in the file or as data.path=VALUE"),
        ({"allocation": {"sparsity": 0.5}}, "field allocation.source is missing"),
        (
            {"training__steps": "many"},
            "training.steps='many' is refused: input should be a valid integer",
        ),
        (
            {"training__steps": 10.5},
            "training.steps=10.5 is refused: input should be a valid integer",
        ),
        ({"training__steps": None}, "training.steps=None is refused"),
        (
            {"training__steps": 0},
            "training.steps=0 is refused: input should be greater than or equal to 1",
        ),
        ({"training__sequence_length": 1}, "training.sequence_length=1 is refused"),
        ({"training__learning_rate": 0}, "training.learning_rate=0 is refused"),
        ({"training__learning_rate": float("nan")}, "training.learning_rate=nan is refused"),
        ({"training__learning_rate": float("inf")}, "training.learning_rate=inf is refused"),
        ({"gates__initial": float("nan")}, "gates.initial=nan is refused"),
        ({"gates__initial": float("-inf")}, "gates.initial=-inf is refused"),
        ({"model__rope_theta": float("inf")}, "model.rope_theta=inf is refused"),
        (
            {"training__precision": "fp16"},
            "training.precision='fp16' is refused: input should be 'auto', 'bf16' or 'fp32'",
        ),
        (
            {"attention__backend": "cudnn"},
            "attention.backend='cudnn' is refused: input should be 'auto'",
        ),
        (
            {"allocation__source": "learned"},
            "allocation.source='learned' is refused: input should be 'learn', 'file' or 'rule'",
        ),
        ({"allocation__granularity": "head"}, "allocation.granularity='head' is refused"),
        ({"allocation__ratio": 0}, "allocation.ratio=0 is refused"),
        ({"run__seed": 2**32}, "run.seed=4294967296 is refused"),
        ({"run__seed": -1}, "run.seed=-1 is refused"),
        ({"checkpoint__keep": 0}, "checkpoint.keep=0 is refused"),
        ({"training": None}, "field training is missing; give it in the file"),
        ({"training": [1]}, "training=[1] is refused"),
        ({"data__path": 7}, "data.path=7 is refused"),
        ({"training__betas": [0.9, 0.95, 0.99]}, "training.betas=[0.9, 0.95, 0.99] is refused"),
        ({"training__betas": [0.9, "x"]}, "training.betas.1='x' is refused"),
        ({"training__betas": [0.9, 1.0]}, "training.betas=[0.9, 1.0] must lie in [0, 1)"),
        ({"model__preset": "qwen9"}, "model.preset=qwen9 is unknown; choose one of tiny, small"),
        (
            {"model__num_attention_heads": 6},
            "model.num_attention_heads=6 must be a multiple of model.num_key_value_heads=4",
        ),
        ({"model__head_dim": 7}, "model.head_dim=7 must be even"),
        (
            {"attention__window": 0},
            "attention.window=0 must lie between 1 and training.sequence_length=32",
        ),
        (
            {"attention__window": 33},
            "attention.window=33 must lie between 1 and training.sequence_length=32",
        ),
        (
            {"model__max_position_embeddings": 31},
            "training.sequence_length=32 exceeds model.max_position_embeddings=31",
        ),
        (
            {"parallel__tensor": 5},
            "parallel.tensor=5 exceeds the model's 4 KV heads, "
            "which are not split further; use 4 or less",
        ),
        (
            {"parallel__tensor": 3},
            "parallel.tensor=3 does not divide model.num_key_value_heads=4; use 2 or 4",
        ),
        (
            {"parallel__tensor": 4, "model__intermediate_size": 90},
            "parallel.tensor=4 does not divide model.intermediate_size=90; use 2",
        ),
        (
            {"parallel__context": 3},
            "training.sequence_length=32 must be a multiple of 6, two chunks for each rank of "
            "parallel.context=3; use 30 or 36",
        ),
        (
            {"parallel": {"context": 3, "tensor": 4}, "training__sequence_length": 30},
            "training.sequence_length=30, the 10 tokens of a context rank, must be a multiple of "
            "parallel.tensor=4 to be divided over its ranks; use 24 or 36",
        ),
        (
            {"parallel__tensor": 2, "training__sequence_length": 33},
            "training.sequence_length=33 must be a multiple of parallel.tensor=2 "
            "to be divided over its ranks; use 32 or 34, or set parallel.sequence=false",
        ),
        (
            {"parallel__pipeline": 6},
            "parallel.pipeline=6 with parallel.schedule=1f1b needs 6 stages, "
            "but 4 layers and the output head",
        ),
        (
            {"parallel": {"pipeline": 3, "schedule": "dualpipev"}},
            "parallel.pipeline=3 with parallel.schedule=dualpipev needs 6 stages, "
            "but 4 layers and the output head make at most 5; use 2 or less",
        ),
        (
            {"parallel": {"schedule": "dualpipev"}},
            "parallel.schedule=dualpipev has nothing to schedule with parallel.pipeline=1; "
            "use 1f1b",
        ),
        (
            {"parallel__schedule": "gpipe"},
            "parallel.schedule='gpipe' is refused: input should be '1f1b', 'interleaved' or "
            "'dualpipev'",
        ),
        (
            {"training__micro_batch": 3},
            "training.global_batch=4 must be a multiple of training.micro_batch=3; use 3 or 6",
        ),
        (
            {"training__micro_batch": 8},
            "training.global_batch=4 must be a multiple of training.micro_batch=8; use 8",
        ),
        (
            {"training__warmup_steps": 11},
            "training.warmup_steps=11 and training.decay_steps=0 do not fit into training.steps=10",
        ),
        (
            {"training__schedule": "wsd"},
            "training.schedule=wsd needs training.decay_steps of at least 1",
        ),
        ({"training__decay_steps": 2}, "training.decay_steps=2 belongs to training.schedule=wsd"),
        (
            {"training__min_learning_rate": 0.01},
            "training.min_learning_rate=0.01 exceeds training.learning_rate=0.001",
        ),
        (
            {"allocation__sparsity": 0.3},
            "allocation.sparsity=0.3 cannot be met by the 4 KV heads of a layer; "
            "possible are 0, 0.25",
        ),
        ({"allocation__sparsity": 1.5}, "allocation.sparsity=1.5 is refused"),
        ({"allocation__sparsity": float("nan")}, "allocation.sparsity=nan is refused"),
        (
            {"allocation__granularity": "layer"},
            "allocation.scope=per_layer cannot hold with allocation.granularity=layer",
        ),
        (
            {"gates__warmup_steps": 10},
            "gates.warmup_steps=10 must be at most 7 of training.steps=10",
        ),
        (
            {"gates__controller": "paper", "gates__learning_rate": 0.1},
            "gates.learning_rate=0.1 cannot bring the gates from gates.initial=2.5 "
            "to allocation.sparsity=0.5 in training.steps=10",
        ),
        (
            {"allocation": PER_LAYER | {"floor": 1}},
            "allocation.floor=1 needs allocation.scope=global and allocation.granularity=kv_head",
        ),
        (
            {"allocation__floor": -1},
            "allocation.floor=-1 is refused: input should be greater than or equal to 0",
        ),
        ({"allocation__seed": 2**32}, "allocation.seed=4294967296 is refused"),
        (
            {"allocation__cache_bytes": 0.5, "allocation__context": 64},
            "allocation.cache_bytes=0.5 is refused",
        ),
        (
            {"allocation__cache_share": 0, "allocation__context": 64},
            "allocation.cache_share=0 is refused",
        ),
        ({"allocation__cache_share": 0.5}, "allocation.cache_share=0.5 needs allocation.context"),
        (
            {"allocation__context": 64},
            "allocation.context=64 belongs to a budget, but there is none; leave it out",
        ),
        (
            {"allocation": PER_LAYER | {"cache_share": 0.5, "attention_share": 0.5, "context": 64}},
            "allocation.cache_share and allocation.attention_share are both given; "
            "keep one of them",
        ),
        (
            {"allocation": PER_LAYER | {"cache_share": 0.5, "context": 64, "sparsity": 0.5}},
            "allocation.sparsity=0.5 is given, but allocation.cache_share=0.5 at 64 tokens "
            "makes it 0.75; leave out one of the two",
        ),
        (
            {"allocation": {"source": "file", "file": "a.json", "cache_share": 0.5, "context": 64}},
            "allocation.cache_share=0.5 at 64 tokens is a target of learning and of the rules "
            "head-share, bottom-swa, middle, random; with allocation.source=file "
            "leave it and allocation.context out",
        ),
        (
            {
                "allocation": {
                    "source": "rule",
                    "rule": "interleaved",
                    "cache_share": 0.5,
                    "context": 64,
                }
            },
            "with allocation.rule=interleaved leave it and allocation.context out",
        ),
        (
            {"allocation": PER_LAYER | {"cache_share": 0.1, "context": 64}},
            "allocation.cache_share=0.1 at 64 tokens is a budget below 0.109375, "
            "what all-windowed costs with attention.window=8",
        ),
        (
            {
                "allocation": {"source": "learn", "cache_bytes": 513, "context": 64},
                "model__num_hidden_layers": 1,
            },
            "allocation.cache_bytes=513 at 64 tokens is above 512, the cost of the dense model",
        ),
        ({"allocation__source": "file"}, "allocation.source=file needs allocation.file"),
        (
            {"allocation__file": "a.json"},
            "allocation.file=a.json is given, but allocation.source is learn; set it to file",
        ),
        (
            {"allocation": {"source": "rule", "file": "a.json"}},
            "allocation.source is rule; set it to file",
        ),
    ],
)
def test_refusals_name_field_value_and_mend(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(changed(**fields))


def test_warmup_and_decay_must_fit_together() -> None:
    fields = {"training__schedule": "wsd", "training__decay_steps": 6}
    assert build(changed(**fields, training__warmup_steps=4)).training.decay_steps == 6
    assert "training.warmup_steps=5 and training.decay_steps=6 do not fit" in refusal(
        changed(**fields, training__warmup_steps=5)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"attention__window": 1},
        {"attention__window": 32},
        {"model__max_position_embeddings": 32},
        {"training__warmup_steps": 10},
        {"parallel__tensor": 4},
        {"parallel": {"tensor": 2, "sequence": False}, "training__sequence_length": 33},
        {"training__sequence_length": 33},
        {"parallel": {"context": 4, "tensor": 4}},
        {"parallel__pipeline": 5},
        {"parallel": {"pipeline": 2, "schedule": "dualpipev"}},
        {"training__min_learning_rate": 0.001},
        {"training__micro_batch": 4},
        {"gates__warmup_steps": 7},
        {"allocation__sparsity": 0},
        {"allocation__sparsity": 1},
        {"allocation": {"source": "file", "file": "a.json"}},
        {
            "allocation": {
                "source": "learn",
                "granularity": "layer",
                "scope": "global",
                "sparsity": 0.25,
            }
        },
        {"allocation": {"source": "rule", "rule": "dense"}, "gates__warmup_steps": 100},
    ],
)
def test_the_limits_themselves_are_accepted(fields: dict[str, Any]) -> None:
    build(changed(**fields))


@pytest.mark.parametrize("section", ["run", "attention", "allocation", "training", "data"])
def test_a_missing_section_is_named_with_a_mend_that_works(section: str) -> None:
    """An override is section.field=value, so the fix `run=VALUE` would be refused too."""
    message = refusal({name: fields for name, fields in BASE.items() if name != section})
    assert section in message
    assert "missing" in message
    assert f"{section}=VALUE" not in message


def test_a_missing_item_is_not_offered_as_an_override() -> None:
    message = refusal(changed(training__betas=[0.9]))
    assert "training.betas" in message
    assert "training.betas.1=VALUE" not in message


@pytest.mark.parametrize(
    "field", ["training__steps", "run__seed", "training__learning_rate", "attention__window"]
)
def test_booleans_are_no_numbers(field: str) -> None:
    assert "a boolean does not fit" in refusal(changed(**{field: True}))
