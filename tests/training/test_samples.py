"""validation.prompts are continued at each validation, in every topology."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markupsafe
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaconsa.checkpoint import store
from megaconsa.checkpoint.gates import read_gates
from megaconsa.config import build
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import InputError
from megaconsa.model.qwen3 import Qwen3
from megaconsa.parallel import mesh
from megaconsa.report.page import write_report
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from tests.conftest import SEQUENCE_LENGTH
from tests.support.forked_ranks import launch
from tests.support.interruptions import StopAfter
from tests.support.topologies import (
    COMBINATIONS,
    CP2_TP2,
    PP2,
    PP2_DUALPIPEV,
    TABLE,
    TP2_PP2,
    TP2_SEQUENCE,
    Layout,
)

PROMPTS = ["def main(", "import os\nclass A:", "x"]
TRAINING = {"steps": 4, "micro_batch": 2, "global_batch": 8}
VALIDATION = {"every": 2, "sequences": 8, "prompts": PROMPTS}
LARGE = {"initializer_range": 0.15}
"""Of weights with which a text does not repeat one token."""

MakeConfig = Callable[..., dict[str, Any]]


def read_samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@torch.no_grad()
def truth(run: Path, prompt: str, tokenizer: Tokenizer) -> str:
    """The most probable continuation of the run's last checkpoint, by the reference attention."""
    checkpoint = store.resolve(run)
    table = checkpoint.allocation or read_gates(checkpoint).allocation()
    model = Qwen3(checkpoint.model_config, table, "reference", separate=False)
    model.load_state_dict(dict(checkpoint.weights()), strict=False)
    (ids,) = tokenizer.encode_batch([prompt])
    begin = len(ids)
    while len(ids) < SEQUENCE_LENGTH:
        following = int(model(torch.tensor([ids]))[0, -1].argmax())
        if following == tokenizer.end_of_text:
            break
        ids.append(following)
    return tokenizer.decode(ids[begin:])


@pytest.mark.parametrize("source", ["learn", "rule"])
def test_samples_are_the_models_own_text(
    source: str, make_config: MakeConfig, train: Any, small_data: Path
) -> None:
    allocation = {"source": "learn"}
    if source == "rule":
        allocation = {"source": "rule", "rule": "head-share", "sparsity": 0.5}
    values = make_config(
        training=TRAINING,
        validation=VALIDATION,
        allocation=allocation,
        model=LARGE,
        logging={"tensorboard": True},
    )
    train(values)
    run = Path(values["run"]["dir"])
    first, last = read_samples(run)
    assert (first["step"], last["step"]) == (2, 4)
    assert last["tokens"] == 4 * 8 * SEQUENCE_LENGTH
    tokenizer = Tokenizer.load(small_data / "tokenizer")
    expected = [{"prompt": text, "text": truth(run, text, tokenizer)} for text in PROMPTS]
    assert last["samples"] == expected
    assert len({sample["text"] for sample in expected}) == len(PROMPTS)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = events.Tensors("samples/1/text_summary")
    assert [event.step for event in shown] == [2, 4]
    text = shown[1].tensor_proto.string_val[0].decode()
    assert text.startswith("    def main(")
    page = write_report(run).read_text()
    shown_text = str(markupsafe.escape(expected[1]["text"]))
    assert f"<b>import os\nclass A:</b>{shown_text}</pre>" in page
    assert page.count("<td>step 2</td>") == len(PROMPTS)


def test_sampling_changes_nothing_else(make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
    """A resumed run has each validation once."""
    plain = train(make_config(training=TRAINING, validation=VALIDATION | {"prompts": []}))
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    values = make_config(
        run={"dir": str(tmp_path / "sampling")}, training=TRAINING, validation=VALIDATION
    )
    trainer = build_trainer(check_inputs(build(values)), mesh.initialize())
    trainer.callbacks = [*trainer.callbacks, StopAfter(3)]
    trainer.run()
    rows = train(values)
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    assert [row["step"] for row in read_samples(tmp_path / "sampling")] == [2, 4]


def test_refusals(make_config: MakeConfig) -> None:
    with pytest.raises(InputError, match="an empty prompt has nothing to continue"):
        build(make_config(validation={"prompts": ["x", ""]}))
    long = make_config(validation={"prompts": ["x y " * SEQUENCE_LENGTH]})
    with pytest.raises(InputError, match="which leaves no room to continue it within"):
        check_inputs(build(long))


def check_layout(layout: Layout, make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
    """Compares the samples of a layout with those of one process.

    More prompts than sequences in a micro-batch, tied and untied heads, a vocabulary that is not a
    multiple of the tensor ranks.
    """
    TABLE.save(tmp_path / "table.json")
    file = {"source": "file", "file": str(tmp_path / "table.json")}
    cases = {
        "learn": {"allocation": {"source": "learn"}, "model": LARGE},
        "train": {
            "allocation": file,
            "model": LARGE | {"tie_word_embeddings": False, "vocab_size": 515},
        },
    }
    jobs = []
    for name, sections in cases.items():
        shared = sections | {"training": TRAINING | {"precision": "fp32"}, "validation": VALIDATION}
        train(make_config(run={"dir": str(tmp_path / f"{name}-one")}, **shared))
        many = {"dir": str(tmp_path / f"{name}-many")}
        values = make_config(run=many, parallel=layout.parallel, **shared)
        jobs.append({"config": values, "fault": None, "kernels": False, "stop": None})
    launch(layout.processes, jobs)
    for name in cases:
        found = read_samples(tmp_path / f"{name}-many")
        assert found == read_samples(tmp_path / f"{name}-one")
        assert len(found) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [TP2_SEQUENCE, PP2, PP2_DUALPIPEV, TP2_PP2, CP2_TP2], ids=lambda layout: layout.name
)
def test_topologies(layout: Layout, make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
    check_layout(layout, make_config, train, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", COMBINATIONS, ids=lambda layout: layout.name)
def test_combinations(layout: Layout, make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
    check_layout(layout, make_config, train, tmp_path)
