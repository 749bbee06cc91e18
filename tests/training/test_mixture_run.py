"""Training on a mixture: a loss for each source, the same after an interruption, refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.errors import InputError
from megaconsa.reporting.metrics import computed
from tests.support.interruptions import CrashAfter, contents, interrupted

MakeConfig = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture
def mixture(small_data: Path, tmp_path: Path) -> Path:
    """Python's sources, and a second folder that repeats one line."""
    text = tmp_path / "easy.jsonl"
    lines = [json.dumps({"text": f"{i % 7} again and again " * 40}) for i in range(200)]
    text.write_text("\n".join(lines))
    prepare(
        [str(text)],
        tmp_path / "easy",
        Options(sequence_length=64, validation_share=0.4),
        tokenizer=small_data / "tokenizer",
    )
    file = tmp_path / "mixture.yaml"
    file.write_text(
        "sources:\n"
        f"  code: {{path: {small_data}, weight: 3}}\n"
        "  easy: {path: easy, weight: 1}\n"
        "phases:\n"
        "  - {from_tokens: 1024, weights: {easy: 1}}\n"
    )
    return file


def test_a_run_on_a_mixture(
    mixture: Path,
    make_config: MakeConfig,
    train: Train,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def config(name: str) -> dict[str, Any]:
        return make_config(
            run={"dir": str(tmp_path / name)},
            data={"path": str(mixture)},
            training={"steps": 12},
            validation={"sequences": 8, "every": 3},
        )

    with caplog.at_level(logging.INFO, logger="megaconsa"):
        logging.getLogger("megaconsa").setLevel(logging.INFO)
        whole = train(config("whole"))
    rows = [row for row in whole if "validation_loss" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    for row in rows:
        mean = 0.75 * row["validation_loss_code"] + 0.25 * row["validation_loss_easy"]
        assert row["validation_loss"] == pytest.approx(mean)
    first, last = rows[0], rows[-1]
    learned = first["validation_loss_easy"] - last["validation_loss_easy"]
    assert learned > 2 * abs(first["validation_loss_code"] - last["validation_loss_code"])

    interrupted(config("crashed"), CrashAfter(5))
    assert computed(train(config("crashed"))) == computed(whole)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def test_another_mixture_is_another_run(
    mixture: Path, make_config: MakeConfig, train: Train
) -> None:
    values = make_config(data={"path": str(mixture)})
    interrupted(values, CrashAfter(4))
    content = mixture.read_text()
    mixture.write_text(content.replace("weight: 3", "weight: 2"))
    with pytest.raises(InputError, match="holds other data than run"):
        train(values)
    mixture.write_text(content)
    train(values)
