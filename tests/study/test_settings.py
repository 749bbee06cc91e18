"""The YAML file of a study: what it expands to, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.errors import InputError
from megaconsa.study import checks, record, settings
from megaconsa.study.fields import Trial
from megaconsa.study.runs import Runs

DENSE = {"rule": "dense"}
LONG = {"rule": "dense", "whole_budget": True}


def scoring(**options: int) -> dict[str, Any]:
    return {"score": "leave-one-out", "options": options}


def test_trials_are_arms_by_sparsities_by_seeds_by_draws(make_runs: Callable[..., Runs]) -> None:
    arms = {
        "dense": {"rule": "dense", "seeds": [0, 1]},
        "drawn": {"rule": "random", "scope": "global", "seeds": [1], "draws": [3, 4]},
    }
    trials = make_runs(arms=arms, sparsities=[0.5, 0.75]).study.trials()
    assert [trial.name for trial in trials] == [
        "dense-seed0",
        "dense-seed1",
        "drawn-0.5-seed1-draw3",
        "drawn-0.5-seed1-draw4",
        "drawn-0.75-seed1-draw3",
        "drawn-0.75-seed1-draw4",
    ]


def test_the_reference_has_the_same_seed_and_budget(make_runs: Callable[..., Runs]) -> None:
    arms = {
        "dense": {"rule": "dense", "seeds": [0, 1]},
        "long": LONG,
        "learned": {"learn": {}, "seeds": [1]},
        "protocol": {"learn": {}, "whole_budget": True},
    }
    study = make_runs(arms=arms).study
    references = {trial.name: study.reference(trial) for trial in study.trials()}
    assert references["learned-0.5-seed1"] == Trial("dense", None, 1, None)
    assert references["protocol-0.5-seed0"] == Trial("long", None, 0, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsitys": [0.5]}, "unknown field sparsitys; did you mean sparsities?"),
        ({"arms": {"a": {"rul": "dense"}}}, "unknown field arms.a.rul; did you mean arms.a.rule?"),
        (
            {"arms": {"a": {"score": "gradient", "options": {"y": 1}}}},
            "unknown field arms.a.options.y; known are sequences, seed, z",
        ),
        ({"needles": {"number": 3}}, "unknown field needles.number; known are lengths, count"),
        ({"arms": {"a": {"rule": "densest"}}}, "arms.a.rule='densest' is refused"),
        ({"arms": {}}, "arms={} is refused"),
        (
            {"arms": {"a": {"scope": "global"}}},
            "arms.a needs exactly one of rule, score, learn and file, but has none",
        ),
        (
            {"arms": {"a": {"rule": "dense", "score": "gradient"}}},
            "arms.a needs exactly one of rule, score, learn and file, but has rule and score",
        ),
        ({"arms": {"a/b": DENSE}}, "arms.a/b: an arm names folders"),
        ({"arms": {"a": DENSE | {"draws": [0]}}}, "arms.a.draws=[0] needs a rule that is drawn"),
        (
            {"arms": {"a": DENSE | {"sparsities": [0.5]}}},
            "arms.a.sparsities=[0.5]: the arm has a single table",
        ),
        (
            {"arms": {"a": DENSE | {"options": {"z": 0.3}}}},
            "arms.a.options belong to an arm with score",
        ),
        (
            {"arms": {"a": {"score": "leave-one-out", "options": {"z": 0.3}}}},
            "arms.a.options.z=0.3 has no effect on score: leave-one-out; remove it",
        ),
        (
            {"arms": {"a": {"score": "calibrate", "options": {"sequences": 4}}}},
            "arms.a.options.sequences=4 has no effect on score: calibrate; remove it",
        ),
        ({"seeds": [0, 0]}, "seeds=[0, 0] holds 0 more than once; keep one of them"),
        ({"sparsities": [0.5, 0.75, 0.5]}, "sparsities=[0.5, 0.75, 0.5] holds 0.5 more than once"),
        ({"sparsities": [float("nan")]}, "sparsities.0=nan is refused"),
        (
            {"arms": {"a": {"learn": {}, "sparsities": [0.5, 0.5]}}},
            "arms.a.sparsities=[0.5, 0.5] holds 0.5 more than once",
        ),
        ({"arms": {"a": DENSE | {"seeds": [1, 1]}}}, "arms.a.seeds=[1, 1] holds 1 more than once"),
        (
            {"arms": {"a": {"rule": "random", "draws": [2, 3, 2]}}},
            "arms.a.draws=[2, 3, 2] holds 2 more than once",
        ),
        (
            {"arms": {"dense": DENSE, "x": {"learn": {}}, "x-0.5": {"rule": "all-swa"}}},
            "arms.x-0.5: its trial x-0.5-seed0 has the same folder as one of arms.x",
        ),
        ({"arms": {"a": {"learn": {}}}, "sparsities": []}, "arms.a has no sparsity"),
        (
            {"arms": {"dense": DENSE, "a": {"learn": {}, "seeds": [0, 7]}}},
            "has no dense arm to be compared with; give an arm {rule: dense, seeds: [..., 7]}",
        ),
        (
            {"arms": {"dense": DENSE, "a": {"learn": {}, "whole_budget": True}}},
            "give an arm {rule: dense, whole_budget: true, seeds: [..., 0]}",
        ),
    ],
)
def test_refused_by_the_file_alone(
    fields: dict[str, Any],
    message: str,
    write_study: Callable[..., Path],
) -> None:
    with pytest.raises(InputError) as refusal:
        settings.load(write_study(**fields))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learn": {"run.dir": "x"}}, "learn: run.dir=x is set by the study; remove it"),
        (
            {"arms": {"dense": DENSE, "a": {"learn": {"allocation.scope": "global"}}}},
            "arms.a.learn: allocation.scope=global is set by the study",
        ),
        ({"train": {"run.seed": 3}}, "train: run.seed=3 is set by the study"),
        (
            {"train": {"data.path": "x"}},
            "train: data.path=x must be the same in all runs; set it in",
        ),
        ({"learn": {"attention.window": 4}}, "learn: attention.window=4 must be the same"),
        ({"start": {"attention.window": 4}}, "start: attention.window=4 must be the same"),
        (
            {"arms": {"dense": DENSE, "a": {"learn": {"data.path": "x"}}}},
            "arms.a.learn: data.path=x must be the same",
        ),
        ({"train": {"training.step": 3}}, "unknown field training.step"),
        (
            {"needles": {"lengths": [8], "count": 1}},
            "needles.lengths: --needle-length 8 leaves no haystack",
        ),
        (
            {"arms": {"dense": DENSE, "a": scoring(sequences=2)}},
            "arms.a: options: --sequences 2: too few sequences for evidence",
        ),
        (
            {"arms": {"dense": DENSE, "a": scoring(sequences=5)}},
            "arms.a: options: --sequences 5 is not a multiple of the batch of 2",
        ),
        (
            {"arms": {"dense": DENSE, "a": scoring(sequences=100_000)}},
            "for training",
        ),
        (
            {"arms": {"dense": DENSE, "a": {"rule": "interleaved", "sparsities": [1.0]}}},
            "arms.a: rule interleaved keeps some layers full and cannot give a sparsity of 1",
        ),
        (
            {"arms": {"dense": DENSE, "a": {"learn": {"gates.warmup_steps": 20}}}},
            "arms.a: gates.warmup_steps=20 must be at most 18 of training.steps=24",
        ),
        (
            {
                "arms": {
                    "dense": DENSE,
                    "a": {"score": "gradient", "scope": "per_layer", "sparsities": [0.3]},
                }
            },
            "arms.a: allocation.sparsity=0.3 cannot be met by the 4 KV heads of a layer",
        ),
        (
            {"arms": {"dense": DENSE, "a": {"rule": "interleaved", "sparsities": [0.25]}}},
            "arms.a: rule interleaved gives a sparsity of 0.5 instead of 0.25",
        ),
        (
            {"arms": {"dense": DENSE, "a": {"learn": {"gates.warmup_steps": 24}}}},
            "arms.a: gates.warmup_steps=24 must be at most 18 of training.steps=24",
        ),
        (
            {
                "arms": {
                    "dense": DENSE,
                    "long": LONG,
                    "a": {"learn": {"training.steps": 30}, "whole_budget": True},
                }
            },
            "arms.a: learn.training.steps=30 is not the study's 24",
        ),
    ],
)
def test_refused_by_the_runs_configurations(
    fields: dict[str, Any],
    message: str,
    make_runs: Callable[..., Runs],
) -> None:
    runs = make_runs(**fields)
    with pytest.raises(InputError) as refusal:
        checks.check(runs)
    assert message in str(refusal.value)
    assert not runs.out.exists()


def test_needle_lengths_are_free_while_needles_are_off(make_runs: Callable[..., Runs]) -> None:
    checks.check(make_runs(needles={"lengths": [8], "count": 0}))


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        settings.load(tmp_path / "none.yaml")
    twice = tmp_path / "twice.yaml"
    twice.write_text("arms: {a: {rule: dense}, a: {rule: dense}}")
    with pytest.raises(InputError, match="a is given twice"):
        settings.load(twice)


def test_arms_may_be_added_but_not_changed(make_runs: Callable[..., Runs]) -> None:
    arms: dict[str, Any] = {"dense": DENSE, "a": {"learn": {"gates.warmup_steps": 3}}}
    record.save(make_runs(arms=arms))
    more = arms | {"b": {"rule": "random", "draws": [0]}}
    record.check(make_runs(arms=more, sparsities=[0.5, 0.75]))
    changed = arms | {"a": {"learn": {"gates.warmup_steps": 4}}}
    with pytest.raises(InputError, match=r"arms.a has changed .*gates.warmup_steps: 3 -> 4"):
        record.check(make_runs(arms=changed))
    with pytest.raises(InputError, match=r"the study of .* has changed .*training.steps: 4 -> 5"):
        record.check(make_runs(arms=arms, train={"training.steps": 5}))


def test_an_arm_that_was_left_out_is_still_on_record(make_runs: Callable[..., Runs]) -> None:
    record.save(make_runs(arms={"dense": DENSE, "a": {"learn": {}}}))
    record.save(make_runs(arms={"dense": DENSE}))
    with pytest.raises(InputError, match=r"arms.a has changed"):
        record.check(make_runs(arms={"dense": DENSE, "a": {"score": "gradient"}}))


def test_a_start_made_by_hand_must_have_the_studys_settings(make_runs: Callable[..., Runs]) -> None:
    """A start may be made by hand, for example on several GPUs with torchrun.

    The split into micro-batches does not change the result, but the learning rate does.
    """
    runs = make_runs()
    runs.start.mkdir(parents=True)
    values = runs.start_config.to_dict()
    values["training"]["micro_batch"] = 1
    (runs.start / "config.yaml").write_text(yaml.safe_dump(values))
    record.check(runs)
    values["training"]["learning_rate"] = 0.5
    (runs.start / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(
        InputError, match=r"was made with another configuration \(training\.learning_rate: 0\.5"
    ):
        record.check(runs)
