"""The run configuration: what is refused and how, overrides, and the way through a file and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.config import Config, build, differences, load
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.errors import InputError
from megaconsa.model.config import PRESETS, ModelConfig

STUDIES = {"study.yaml", "study_cpu.yaml"}
"""These name a run configuration, and are none."""
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if path.name not in STUDIES
]

PER_LAYER: dict[str, Any] = {"source": "learn", "scope": "per_layer"}
BASE: dict[str, Any] = {
    "run": {"dir": "runs/a"},
    "attention": {"window": 8},
    "allocation": PER_LAYER,
    "gates": {"warmup_steps": 3},
    "training": {
        "steps": 10,
        "micro_batch": 2,
        "global_batch": 4,
        "sequence_length": 32,
        "learning_rate": 0.001,
    },
    "data": {"path": "data/a"},
}


def changed(**fields: Any) -> dict[str, Any]:
    """BASE with `section__field=value`, or a whole section."""
    data = copy.deepcopy(BASE)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        if field:
            data.setdefault(section, {})[field] = value
        else:
            data[section] = value
    return data


def refusal(data: dict[str, Any]) -> str:
    """The message, which is one line."""
    with pytest.raises(InputError) as caught:
        build(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_loads(path: Path) -> None:
    config = load(path)
    assert build(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_there_are_configurations() -> None:
    assert CONFIGS


def test_the_smallest_configuration() -> None:
    config = build(changed(allocation={"source": "learn"}))
    assert config.learning
    assert config.shape() == PRESETS["tiny"]
    assert (config.allocation.sparsity, config.allocation.granularity, config.allocation.scope) == (
        0.5,
        "kv_head",
        "global",
    )
    assert not build(changed(allocation={"source": "rule"})).learning


def test_shape_fields_override_the_preset() -> None:
    fields = {
        "vocab_size": 99,
        "head_dim": 6,
        "tie_word_embeddings": False,
        "rope_theta": 5e3,
        "num_hidden_layers": 3,
    }
    shape = build(changed(model={"preset": "small", **fields})).shape()
    assert shape == ModelConfig(
        99, 512, 1408, 3, 16, 8, 6, False, 5e3, max_position_embeddings=32_768
    )


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
            "parallel.tensor=5 exceeds the model's 4 KV heads, which are not split further; use 4 or less",
        ),
        (
            {"parallel__tensor": 3},
            "parallel.tensor=3 does not divide model.num_key_value_heads=4; use a number that does",
        ),
        (
            {"parallel__tensor": 4, "model__intermediate_size": 90},
            "parallel.tensor=4 does not divide model.intermediate_size=90; use a number that does",
        ),
        (
            {"parallel__tensor": 2, "training__sequence_length": 33},
            "training.sequence_length=33 must be a multiple of parallel.tensor=2 to be divided over its ranks; or set "
            "parallel.sequence=false",
        ),
        (
            {"parallel__pipeline": 6},
            "parallel.pipeline=6 with parallel.schedule=1f1b needs 6 stages, but 4 layers and the output head",
        ),
        (
            {"parallel": {"pipeline": 3, "schedule": "dualpipev"}},
            "parallel.pipeline=3 with parallel.schedule=dualpipev needs 6 stages, but 4 layers and the output head make at most 5; "
            "use 2 or less",
        ),
        (
            {"parallel": {"schedule": "dualpipev"}},
            "parallel.schedule=dualpipev has nothing to schedule with parallel.pipeline=1; use 1f1b",
        ),
        (
            {"parallel__schedule": "gpipe"},
            "parallel.schedule='gpipe' is refused: input should be '1f1b' or 'dualpipev'",
        ),
        (
            {"training__micro_batch": 3},
            "training.global_batch=4 must be a multiple of training.micro_batch=3",
        ),
        (
            {"training__micro_batch": 8},
            "training.global_batch=4 must be a multiple of training.micro_batch=8",
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
            "allocation.sparsity=0.3 cannot be met by the 4 KV heads of a layer; possible are 0, 0.25",
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
            "gates.learning_rate=0.1 cannot bring the gates from gates.initial=2.5 to allocation.sparsity=0.5 in training.steps=10",
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
            "allocation.cache_share and allocation.attention_share are both given; keep one of them",
        ),
        (
            {"allocation": PER_LAYER | {"cache_share": 0.5, "context": 64, "sparsity": 0.5}},
            "allocation.sparsity=0.5 is given, but allocation.cache_share=0.5 at 64 tokens makes it 0.75; leave out one of the two",
        ),
        (
            {"allocation": {"source": "file", "file": "a.json", "cache_share": 0.5, "context": 64}},
            "allocation.cache_share=0.5 at 64 tokens is a target of learning and of the rules head-share, bottom-swa, middle, "
            "random; with allocation.source=file leave it and allocation.context out",
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
            "allocation.cache_share=0.1 at 64 tokens is a budget below 0.109375, what all-windowed costs with attention.window=8",
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


@pytest.mark.parametrize("quantity", ["cache_bytes", "cache_share", "attention_share"])
def test_a_budget_becomes_the_lowest_sparsity_that_keeps_it(quantity: str) -> None:
    """Tiny with a window of 1: at 31 tokens a windowed head caches nothing and sees a sixteenth of the pairs."""
    limit = {"cache_bytes": 4 * 4 * 128 // 2, "cache_share": 0.5, "attention_share": 0.53125}[
        quantity
    ]
    config = build(
        changed(attention__window=1, allocation=PER_LAYER | {quantity: limit, "context": 31})
    )
    assert config.allocation.sparsity == 0.5
    assert config.constraint() == Constraint(4, 4, 0.5)
    just_below = limit - 1 if quantity == "cache_bytes" else limit - 0.001
    less = build(
        changed(attention__window=1, allocation=PER_LAYER | {quantity: just_below, "context": 31})
    )
    assert less.allocation.sparsity == 0.75


def test_a_budget_on_a_model_that_the_default_sparsity_does_not_fit() -> None:
    shape = {"num_attention_heads": 6, "num_key_value_heads": 3}
    config = build(changed(model=shape, allocation=PER_LAYER | {"cache_share": 0.5, "context": 64}))
    assert config.constraint().windowed == 2


def test_a_resolved_budget_loads_again_and_is_held_to() -> None:
    config = build(changed(allocation=PER_LAYER | {"cache_share": 0.5, "context": 64}))
    written = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert (written["allocation"]["sparsity"], written["allocation"]["cache_share"]) == (0.75, 0.5)
    assert build(written) == config
    assert build(written).to_dict() == config.to_dict()
    written["attention"]["window"] = 1
    assert (
        "allocation.sparsity=0.75 is given, but allocation.cache_share=0.5 at 64 tokens makes it 0.5"
        in refusal(written)
    )


def test_an_override_replaces_a_sparsity_by_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(allocation__sparsity=0.25)))
    budget = ["allocation.cache_share=0.5", "allocation.context=64"]
    with pytest.raises(InputError, match=r"for example by allocation\.sparsity=null"):
        load(path, budget)
    assert load(path, [*budget, "allocation.sparsity=null"]).allocation.sparsity == 0.75
    assert load(path, ["allocation.sparsity=null"]).allocation.sparsity == 0.5


def test_a_sparsity_rounded_by_hand_agrees_with_its_budget() -> None:
    """The exact one is kept."""
    allocation = {
        "source": "learn",
        "granularity": "layer",
        "scope": "global",
        "cache_share": 0.5,
        "context": 64,
    }
    fields = {"model__num_hidden_layers": 7, "allocation": {**allocation, "sparsity": 0.5714286}}
    assert build(changed(**fields)).allocation.sparsity == 4 / 7


@pytest.mark.parametrize(
    ("rule", "sparsity"),
    [("head-share", 0.75), ("bottom-swa", 0.75), ("middle", 0.75), ("random", 0.5625)],
)
def test_budgets_of_rules_count_their_own_units(rule: str, sparsity: float) -> None:
    """Half of the cache at 64 tokens takes 9 of 16 heads, or 3 of each layer's 4, or 3 of 4 layers."""
    allocation = {
        "source": "rule",
        "rule": rule,
        "scope": "global",
        "cache_share": 0.5,
        "context": 64,
    }
    config = build(
        changed(model={"num_hidden_layers": 4, "num_key_value_heads": 4}, allocation=allocation)
    )
    table = config.fixed_allocation()
    assert table is not None
    assert table.sparsity == table.target_sparsity == config.allocation.sparsity == sparsity


def test_constraint_of_learning_and_of_rules() -> None:
    section = {"source": "learn", "scope": "global", "sparsity": 0.5, "floor": 1}
    assert build(changed(allocation=section)).constraint() == Constraint(
        4, 4, 0.5, "kv_head", "global", 1
    )
    rule = {**section, "source": "rule"}
    assert build(changed(allocation={**rule, "rule": "middle"})).constraint() == Constraint(
        4, 4, 0.5, "layer", "global"
    )
    assert build(changed(allocation={**rule, "rule": "head-share"})).constraint() == Constraint(
        4, 4, 0.5
    )
    random = build(changed(allocation={**rule, "rule": "random"}))
    assert random.constraint() == Constraint(4, 4, 0.5, "kv_head", "global", 1)


def test_seeds_of_rules() -> None:
    def table(**fields: Any) -> Allocation:
        seed = fields.pop("run__seed", 0)
        allocation = build(
            changed(run__seed=seed, allocation={"source": "rule", **fields})
        ).fixed_allocation()
        assert allocation is not None
        return allocation

    assert table(rule="random", run__seed=5).origin == {"rule": "random", "seed": 5}
    assert table(rule="random", run__seed=5, seed=0).origin == {"rule": "random", "seed": 0}
    assert table(rule="head-share", run__seed=5).origin == {"rule": "head-share"}
    assert table(rule="head-share", run__seed=5, seed=1).origin == {"rule": "head-share", "seed": 1}


@pytest.mark.parametrize("section", ["run", "attention", "allocation", "training", "data"])
def test_a_missing_section_is_named_with_a_mend_that_works(section: str, file: Path) -> None:
    """An override is section.field=value, so `run=VALUE` would be refused in its turn."""
    message = refusal({name: fields for name, fields in BASE.items() if name != section})
    assert section in message
    assert "missing" in message
    assert f"{section}=VALUE" not in message


def test_a_missing_item_is_not_offered_as_an_override() -> None:
    message = refusal(changed(training__betas=[0.9]))
    assert "training.betas" in message
    assert "training.betas.1=VALUE" not in message


def test_sections_are_frozen() -> None:
    config = build(BASE)
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3


def test_overrides_apply_typed_values(file: Path) -> None:
    config = load(
        file,
        [
            "training.steps=20",
            "training.learning_rate=3e-4",
            "training.betas=[0.8, 0.9]",
            "training.activation_checkpointing=true",
            "model.tie_word_embeddings=false",
            "model.init_from=runs/b=c",
            "logging.wandb=null",
            "checkpoint.every=5",
            "training.steps=30",
        ],
    )
    assert config.training.steps == 30
    assert config.training.learning_rate == 3e-4
    assert config.training.betas == (0.8, 0.9)
    assert config.training.activation_checkpointing is True
    assert config.shape().tie_word_embeddings is False
    assert config.model.init_from == Path("runs/b=c")
    assert config.logging.wandb is None
    assert config.checkpoint.every == 5
    assert config.training.global_batch == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "override 'training.steps' is not of the form section.field=value"),
        ("steps=3", "is not of the form section.field=value"),
        ("training.=3", "is not of the form section.field=value"),
        (".steps=3", "is not of the form section.field=value"),
        ("a.b.c=3", "is not of the form section.field=value"),
        ("=3", "is not of the form section.field=value"),
        ("training.betas=[0.9", "override 'training.betas=[0.9': the value is not YAML"),
        ("training.steps=", "training.steps=None is refused"),
        ("training.steps=ten", "training.steps='ten' is refused"),
        ("trainnig.steps=3", "unknown field trainnig; did you mean training?"),
        (
            "training.stpes=3",
            "unknown field training.stpes in section training; did you mean training.steps?",
        ),
        ("attention.window=64", "attention.window=64 must lie between 1 and"),
    ],
)
def test_overrides_that_are_refused(override: str, message: str, file: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is not a mapping of sections"),
        (b"- run\n- model\n", "is not a mapping of sections"),
        (b"run: {dir: a\nmodel:", "cannot be read"),
        (b"run:\n\t- dir", "cannot be read"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b"run: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_files_that_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(path)
    assert f"configuration {path} {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)


def test_an_override_of_what_is_no_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | {"training": 3}))
    with pytest.raises(InputError, match="section training of the configuration is not a mapping"):
        load(path, ["training.steps=3"])


def test_dictionary_goes_through_yaml_and_back(file: Path) -> None:
    config = load(
        file,
        [
            "training.learning_rate=1e-05",
            "model.init_from=runs/b",
            "training.betas=[0.8, 0.9]",
            "model.vocab_size=7",
        ],
    )
    text = yaml.safe_dump(config.to_dict())
    assert build(yaml.safe_load(text)) == config
    assert differences(config.to_dict(), yaml.safe_load(text)) == []
    assert config.to_dict().keys() == Config.model_fields.keys()


def test_differences_name_each_field_once() -> None:
    old = build(BASE).to_dict()
    new = build(changed(training__steps=20, model__vocab_size=99, run__dir="runs/b")).to_dict()
    assert differences(old, new) == [
        "model.vocab_size: None -> 99",
        "run.dir: runs/a -> runs/b",
        "training.steps: 10 -> 20",
    ]
    assert differences(old, copy.deepcopy(old)) == []


def test_differences_see_fields_that_one_side_lacks() -> None:
    assert differences({"a": {"b": 1}}, {"a": {}, "c": 2}) == ["a.b: 1 -> None", "c: None -> 2"]
    assert differences({"a": {"b": 1}}, {"a": 3}) == ["a: {'b': 1} -> 3"]


def test_a_section_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training: {steps: 1}\ntraining: {steps: 2}\n")
    with pytest.raises(InputError, match="training is given twice"):
        load(path)


def test_a_section_without_fields_takes_the_defaults() -> None:
    assert build(changed(model=None)).model.preset == "tiny"


@pytest.mark.parametrize(
    "field", ["training__steps", "run__seed", "training__learning_rate", "attention__window"]
)
def test_booleans_are_no_numbers(field: str) -> None:
    assert "a boolean does not fit" in refusal(changed(**{field: True}))


def test_paths_are_expanded(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is really called ~ or $SCRATCH is nobody's wish."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(
        file, ["run.dir=$SCRATCH/runs/a", "model.init_from=~/runs/b", "data.path=${SCRATCH}/data"]
    )
    assert config.run.dir == tmp_path / "runs" / "a"
    assert config.model.init_from == Path("/home/someone/runs/b")
    assert config.data.path == tmp_path / "data"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.dir=$NOT_SET_ANYWHERE/a", "the environment has no variable $NOT_SET_ANYWHERE"),
        ("run.dir=~nobody_of_this_name/a", "there is no user ~nobody_of_this_name"),
        ("run.seed=010", "010 is not a plain decimal number, and YAML would read it as 8"),
        ("training.steps=1:30", "1:30 is not a plain decimal number, and YAML would read it as 90"),
        ("training.steps=0x10", "0x10 is not a plain decimal number"),
        ("logging.wandb=None", "write null where nothing is meant"),
        ("model.init_from=None", "write null where nothing is meant"),
    ],
)
def test_what_yaml_or_a_path_would_take_for_something_else(
    override: str, said: str, file: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load(file, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_numbers_may_be_grouped(file: Path) -> None:
    assert load(file, ["training.steps=1_000"]).training.steps == 1000
