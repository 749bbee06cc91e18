"""A run is a function of its configuration.

It is the same twice, and the same whether or not it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.checkpoint import store
from megaconsa.config import build
from megaconsa.parallel import mesh
from megaconsa.reporting.metrics import computed, read_metrics
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from tests.support.interruptions import RULE, CrashAfter, StopAfter, contents, interrupted

MakeConfig = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.mark.parametrize("allocation", [{"source": "learn"}, RULE], ids=["learn", "train"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_stop_and_resume_equals_never_stopping(
    allocation: dict[str, Any],
    precision: str,
    make_config: MakeConfig,
    train: Train,
    tmp_path: Path,
) -> None:
    def config(name: str) -> dict[str, Any]:
        return make_config(
            run={"dir": str(tmp_path / name)},
            allocation=allocation,
            training={"precision": precision},
        )

    whole = train(config("whole"))
    again = train(config("again"))
    interrupted(config("stopped"), StopAfter(3))
    stopped = train(config("stopped"))
    interrupted(config("crashed"), CrashAfter(5))  # past the checkpoint of step 4
    crashed = train(config("crashed"))

    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    for rows, name in ((again, "again"), (stopped, "stopped"), (crashed, "crashed")):
        assert computed(rows) == computed(whole), name
        assert contents(config(name)["run"]["dir"]) == contents(config("whole")["run"]["dir"]), name


def test_resume_drops_rows_past_the_checkpoint_and_a_torn_line(
    make_config: MakeConfig, train: Train
) -> None:
    values = make_config()
    interrupted(values, CrashAfter(3))
    metrics = Path(values["run"]["dir"]) / "metrics.jsonl"
    # A line in the middle is not UTF-8 and the last one is torn. Neither may damage valid rows.
    first, *others = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + b"\xff\xfe\n" + b"".join(others) + b'{"step": 4, "lo')
    train(values)
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2, 3, 4, 5, 6]
    assert len(metrics.read_text().splitlines()) == 6


def test_checkpoints_by_the_clock(make_config: MakeConfig, train: Train) -> None:
    """Every step takes longer than the time between checkpoints.

    What the main rank asks for is done after the next step.
    """
    values = make_config(checkpoint={"every": 0, "minutes": 1e-6, "keep": 9})
    train(values)
    steps = sorted(
        int(path.name.removeprefix("step_")) for path in store.committed(Path(values["run"]["dir"]))
    )
    assert steps == [2, 4, 6]


def test_a_run_that_saves_at_its_end_only_says_so(
    make_config: MakeConfig, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    values = make_config(checkpoint={"every": 0, "minutes": 0})
    train(values)
    assert "no checkpoint before the last step" in caplog.text
    assert [path.name for path in store.committed(Path(values["run"]["dir"]))] == ["step_6"]


def test_activation_checkpointing_changes_nothing(
    make_config: MakeConfig, train: Train, tmp_path: Path
) -> None:
    plain = train(make_config(run={"dir": str(tmp_path / "plain")}))
    recomputed = train(
        make_config(
            run={"dir": str(tmp_path / "again")}, training={"activation_checkpointing": True}
        )
    )
    assert computed(recomputed) == computed(plain)


def test_accumulation_changes_nothing_but_rounding(
    make_config: MakeConfig, train: Train, tmp_path: Path
) -> None:
    """The loss is weighted by tokens.

    Micro-batches have different numbers of labelled tokens, so a mean of their means would differ.
    """
    one = train(make_config(run={"dir": str(tmp_path / "one")}, training={"micro_batch": 4}))
    four = train(make_config(run={"dir": str(tmp_path / "four")}, training={"micro_batch": 1}))
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_train_takes_over_from_learn(make_config: MakeConfig, train: Train, tmp_path: Path) -> None:
    learn = make_config(run={"dir": str(tmp_path / "learn")})
    train(learn)
    origin = store.resolve(tmp_path / "learn")
    values = make_config(
        run={"dir": str(tmp_path / "train")},
        model={"init_from": str(tmp_path / "learn")},
        allocation=RULE,
    )
    inputs = check_inputs(build(values))
    trainer = build_trainer(inputs, mesh.initialize())

    weights = origin.weights()
    moments = origin.moments()
    assert all((value == weights[name]).all() for name, value in trainer.engine.weights())
    assert all((value == moments[name]).all() for name, value in trainer.engine.moments())
    assert trainer.engine.optimizer_steps == origin.state["optimizer_steps"] == 6
    assert trainer.progress.step == 0
    assert trainer.progress.sequences == origin.state["sequences"] == 24
    expected = make_config(training={"steps": 7})
    reference = build_trainer(check_inputs(build(expected)), mesh.initialize())
    for _ in range(6):
        next(reference.steps)
    assert all(
        (a.tokens == b.tokens).all()
        for a, b in zip(next(trainer.steps), next(reference.steps), strict=True)
    )


def test_reset_optimizer_takes_weights_only(
    make_config: MakeConfig, train: Train, tmp_path: Path
) -> None:
    train(make_config(run={"dir": str(tmp_path / "learn")}))
    values = make_config(
        run={"dir": str(tmp_path / "train")},
        model={"init_from": str(tmp_path / "learn")},
        allocation=RULE,
        training={"reset_optimizer": True},
    )
    trainer = build_trainer(check_inputs(build(values)), mesh.initialize())
    assert trainer.engine.optimizer_steps == 0
    assert all(not value.any() for _, value in trainer.engine.moments())


def test_checkpoints_hold_canonical_names_and_no_pickle(
    make_config: MakeConfig, train: Train
) -> None:
    from megaconsa.huggingface.parameter_names import parameter_shapes

    values = make_config()
    train(values)
    checkpoint = store.resolve(Path(values["run"]["dir"]))
    assert checkpoint.weight_shapes() == parameter_shapes(checkpoint.model_config)
    assert {path.suffix for path in checkpoint.path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((checkpoint.path / "state.json").read_text())["step"] == 6
    gates = json.loads((Path(values["run"]["dir"]) / "gates.json").read_text())
    assert gates["step"] == 6
