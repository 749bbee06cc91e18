"""Loggers never end a run.

W&B is tested in its offline mode and with servers that do not answer. Both are real.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megaconsa.config import build
from megaconsa.parallel import mesh
from megaconsa.training.callbacks import wandb as logger_module
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.trainer import Callback, Row, Trainer

MakeConfig = Callable[..., dict[str, Any]]
BLOCK = 32768
"""Bytes of a block in W&B's files. They have the format of LevelDB's logs."""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Returns the package, without the settings of the user who runs the tests."""
    package = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield package
    # The package keeps settings, key and a service for the process.
    with suppress(OSError):  # the service was killed
        package.teardown()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns our own errors. W&B logs errors too."""
    ours = [record for record in caplog.records if record.name.startswith("megaconsa")]
    return [record.getMessage() for record in ours if record.levelno >= logging.ERROR]


def logging_run(make_config: MakeConfig, **sections: Any) -> dict[str, Any]:
    return make_config(logging={"tensorboard": False, "wandb": "project"}, **sections)


def records(run: Path) -> Iterator[list[Any]]:
    """Yields what W&B stored offline, once for each start of the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(
        (run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        content = path.read_bytes()
        place = 7
        found = []
        part = b""
        while place + 7 <= len(content):
            if BLOCK - place % BLOCK < 7:
                place += BLOCK - place % BLOCK
                continue
            length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
            part += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                found.append(Record.FromString(part))
                part = b""
        yield found


def rows(found: list[Any]) -> list[dict[str, Any]]:
    def name(item: Any) -> str:
        return item.key or ".".join(item.nested_key)

    history = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{name(item): json.loads(item.value_json) for item in row.item} for row in history]


@pytest.mark.parametrize(
    ("project", "variables", "said"),
    [
        ("project", {}, "No API key"),
        (
            "project",
            {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40},
            "127.0.0.1:9",
        ),
        ("a:b#c", {"WANDB_MODE": "offline"}, "a:b#c"),
    ],
    ids=["key", "server", "project"],
)
def test_what_keeps_wandb_from_starting_is_one_error(
    project: str,
    variables: dict[str, str],
    said: str,
    wandb: Any,
    make_config: MakeConfig,
    train: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(logger_module.LIMITS, "init_timeout", 3)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    values = logging_run(make_config)
    values["logging"]["wandb"] = project
    assert [row["step"] for row in train(values)] == [1, 2, 3, 4, 5, 6]
    (error,) = errors(caplog)
    assert said in error
    assert "training continues" in error


class KillService(Callback):
    """Kills W&B's own process, which the run logs through."""

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if row["step"] == 2:
            children = subprocess.run(
                ["pgrep", "-P", str(os.getpid()), "-f", "wandb"], capture_output=True, text=True
            )
            assert children.stdout
            for child in children.stdout.split():
                os.kill(int(child), signal.SIGKILL)


def test_wandb_that_dies_on_the_way(
    wandb: Any,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = build_trainer(check_inputs(build(logging_run(make_config))), mesh.initialize())
    trainer.callbacks = [KillService(), *trainer.callbacks]
    assert trainer.run()
    (error,) = errors(caplog)
    assert re.search(r"W&B failed \(.*Connection", error)


def test_a_resumed_run_is_the_same_at_wandb_and_another_is_not(
    wandb: Any, make_config: MakeConfig, train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """W&B would refuse the names of these folders as an ID.

    They differ only in characters that it would replace.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    identities = []
    for name in ("a-b:#?", "a/b:#?"):
        values = logging_run(make_config, run={"dir": str(tmp_path / name)})
        trainer = build_trainer(check_inputs(build(values)), mesh.initialize())
        trainer.request_stop()
        assert not trainer.run()
        train(values)
        first, second = records(tmp_path / name)
        starts = [
            next(record.run for record in found if record.HasField("run"))
            for found in (first, second)
        ]
        kept = json.loads((tmp_path / name / "wandb.json").read_text())
        assert starts[0].run_id == starts[1].run_id == kept["id"]
        assert starts[0].display_name == str(tmp_path / name)
        steps = [row["step"] for found in (first, second) for row in rows(found)]
        assert steps == [1, 2, 3, 4, 5, 6]
        identities.append(starts[0].run_id)
    assert identities[0] != identities[1]


def test_rows_of_steps_that_come_again_are_not_hidden(
    wandb: Any, make_config: MakeConfig, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B drops rows whose own step is not above the last one.

    So W&B's step counts rows, and `step` is the x-axis.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    values = logging_run(make_config)
    train(values)
    (found,) = records(Path(values["run"]["dir"]))
    metrics = [record.metric for record in found if record.HasField("metric")]
    assert [(metric.glob_name, metric.step_metric) for metric in metrics if metric.glob_name] == [
        ("*", "step")
    ]
    logged = rows(found)
    assert [row["_step"] for row in logged] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert all("loss" in row for row in logged)


@pytest.mark.parametrize("disk", ["8m"], indirect=True)
def test_tensorboard_that_cannot_write(
    disk: Path, make_config: MakeConfig, train: Any, caplog: pytest.LogCaptureFixture
) -> None:
    values = make_config(run={"dir": str(disk / "run")}, logging={"tensorboard": True})
    (disk / "run").mkdir()
    (disk / "run" / "tensorboard").write_text("no folder")
    assert len(train(values)) == 6
    assert caplog.text.count("TensorBoard") == 1


def test_tensorboard_groups_scalars_and_shows_settings_and_gates(
    make_config: MakeConfig, train: Any
) -> None:
    from io import BytesIO

    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = make_config(logging={"tensorboard": True})
    train(values)
    events = EventAccumulator(str(Path(values["run"]["dir"]) / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss/loss", "optimizer/learning_rate", "speed/step_seconds"} <= set(tags["scalars"])
    assert "sparsity/expected_sparsity" in tags["scalars"]
    assert not [name for name in tags["scalars"] if name.startswith("other/")]
    assert len(events.Scalars("loss/loss")) == 6
    (text,) = events.Tensors("settings/text_summary")
    assert "    sequence_length: 64" in text.tensor_proto.string_val[0].decode()
    (image,) = events.Images("gates/probability_full")
    width, height = Image.open(BytesIO(image.encoded_image_string)).size
    assert min(width, height) >= 400
