"""`megaconsa show-batch` shows the sequences that a step was really trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

from megaconsa.config import build
from megaconsa.data.dataset_info import DatasetInfo, Packing
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.shards import open_split
from megaconsa.data.stream import BatchStream
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.parallel import mesh
from megaconsa.reporting.metrics import read_metrics
from megaconsa.training import bad_steps
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.step_batch import StepBatch, step_batch
from megaconsa.training.trainer import Fetched, Trainer
from tests.support.spikes import spike_in

GLOBAL_BATCH = 4
MakeConfig = Callable[..., dict[str, Any]]
Rows = dict[int, np.ndarray]
RULE = {"source": "rule", "rule": "dense"}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """What each step was trained on last: its tokens, (G, S)."""
    found: Rows = {}
    work = Trainer._work

    def noting(trainer: Trainer, fetched: Fetched) -> dict[str, Any]:
        row = work(trainer, fetched)
        tokens = [batch.tokens.numpy().copy() for batch in fetched.batches]
        found[row["step"]] = np.concatenate(tokens)
        return row

    monkeypatch.setattr(Trainer, "_work", noting)
    return found


def trainer_of(values: dict[str, Any]) -> Trainer:
    return build_trainer(check_inputs(build(values)), mesh.initialize())


def shown_tokens(batch: StepBatch) -> np.ndarray:
    """Reads the rows that the command names, (G, S)."""
    folder = Path(batch.data)
    split = open_split(folder, DatasetInfo.load(folder), "train")
    files = [str(split.path(number).relative_to(folder)) for number in range(len(split))]
    rows = np.empty(
        (len(batch.sequences), DatasetInfo.load(folder).sequence_length + 1), split.id_type
    )
    for row, sequence in zip(rows, batch.sequences, strict=True):
        split.shard(files.index(sequence.file)).read(sequence.row, row)
    return rows[:, :-1]


def assert_shows(run: Path, trained: Rows) -> None:
    for step, tokens in trained.items():
        assert np.array_equal(shown_tokens(step_batch(run, step, None, 99)), tokens), step


def without_places(run: Path) -> None:
    """Makes the metrics those of a version that did not record `sequences`."""
    rows = read_metrics(run / "metrics.jsonl")
    lines = [{name: row[name] for name in row if name != "sequences"} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_step_of_a_run_and_of_the_next(
    trained: Rows, make_config: MakeConfig, train: Any, tmp_path: Path
) -> None:
    """The second run continues the data order of the first."""
    values = make_config(allocation=RULE, checkpoint={"every": 0})
    run = tmp_path / "run"
    train(values)
    assert_shows(run, trained)
    without_places(run)
    assert_shows(run, trained)
    trained.clear()
    further = tmp_path / "next"
    values = make_config(run={"dir": str(further)}, model={"init_from": str(run)}, allocation=RULE)
    train(values)
    assert_shows(further, trained)
    assert step_batch(further, 1, None, 1).first == 6 * GLOBAL_BATCH
    without_places(further)
    assert_shows(further, trained)


def test_a_run_that_went_back(
    trained: Rows,
    make_config: MakeConfig,
    train: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.setattr(bad_steps, "LEAST", 4)
    values = make_config(
        allocation=RULE,
        training={"steps": 10},
        checkpoint={"every": 4},
        bad_steps={"spikes": "rewind", "deviations": 50.0},
    )
    run = tmp_path / "run"
    with spike_in(7):
        assert not trainer_of(values).run()
    assert_shows(run, trained)
    to_come = step_batch(run, 9, None, 99)
    train(values)
    assert_shows(run, trained)
    assert np.array_equal(shown_tokens(to_come), trained[9])
    assert "is not trained yet (the newest is 7)" in to_come.notes[0]
    assert "went back after spikes in steps 7 and" in to_come.notes[1]
    without_places(run)
    shutil.rmtree(run / "checkpoints" / "step_10")
    assert_shows(run, {9: trained[9], 10: trained[10]})
    assert "nothing says where step 6 of " in refused("show-batch", run, 6)


def test_what_is_printed(
    finished: Callable[[str], Path], small_data: Path, done: Callable[..., str]
) -> None:
    run = finished("heads")
    found = json.loads(done("show-batch", run, 2, "--sequences", 3, "--json"))
    assert (found["first"], found["global_batch"], found["notes"]) == (4, GLOBAL_BATCH, [])
    assert [each["place"] for each in found["sequences"]] == [0, 1, 2]
    lines = done("show-batch", run, 2, "--sequences", 3).splitlines()
    assert lines[0] == f"step 2 of {run}: sequences 4 to 7 of the data order, from {small_data}"
    assert lines[-1] == "and 1 more; --sequences 4 shows all"
    first = found["sequences"][0]
    counted = f"{len(first['documents'])} document"
    assert lines[1].startswith(
        f"0: sequence {first['id']}, row {first['row']} of train/shard.00000.mds, {counted}"
    )
    beginning = " ".join(first["documents"][0]["text"].split())
    assert lines[2].startswith(f"       0  {beginning}"[:60])
    assert all(len(line) <= 80 for line in lines[2:-1] if line.startswith(" "))
    assert len(lines) == 2 + sum(1 + len(each["documents"]) for each in found["sequences"])


@pytest.mark.parametrize("packing", get_args(Packing))
def test_documents_in_several_epochs(
    packing: Packing, make_config: MakeConfig, small_data: Path, tmp_path: Path
) -> None:
    """Documents are short here. Nothing is trained, so the steps are all to come."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(200):
        (texts / f"{number}.txt").write_text(f"{number} is a number. " * (1 + number % 7))
    data = tmp_path / "data"
    tokenizer_folder = small_data / "tokenizer"
    options = Options(sequence_length=64, validation_share=0.1, packing=packing)
    prepare([str(texts)], data, options, tokenizer=tokenizer_folder)
    run = tmp_path / "run"
    run.mkdir()
    values = make_config(data={"path": str(data)}, training={"steps": 100})
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    stream = BatchStream(data, seed=0, global_batch=GLOBAL_BATCH, micro_batch=2)
    tokenizer = Tokenizer.load(tokenizer_folder)
    several = 0
    last_step = 3 * len(stream.shards) // GLOBAL_BATCH
    for step, batches in enumerate(islice(stream.steps(), last_step), 1):
        batch = step_batch(run, step, None, 99)
        trained_on = torch.cat([each.tokens for each in batches]).numpy()
        assert np.array_equal(shown_tokens(batch), trained_on)
        for sequence, tokens in zip(batch.sequences, trained_on, strict=True):
            ends = np.flatnonzero(tokens == tokenizer.end_of_text) + 1
            begins = [0, *ends[ends < len(tokens)].tolist()]
            begins = [each for each in begins if tokens[each] != tokenizer.end_of_text]
            assert [each.position for each in sequence.documents] == begins
            several += len(begins) > 2
            whole = tokenizer.decode(tokens[tokens != tokenizer.end_of_text])
            assert whole == "".join(each.text for each in sequence.documents)
    assert several


def test_the_width_is_kept_and_the_terminal_too(
    finished: Any, done: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "a\n\tb \x1b[31mred " + 99 * "c")
    line = done("show-batch", finished("heads"), 1).splitlines()[2]
    assert line.startswith("       0  a b \ufffd[31mred ccc")
    assert len(line) == 80


def test_refusals(finished: Any, refused: Callable[..., str], tmp_path: Path) -> None:
    run = finished("heads")
    assert "nowhere is not a run folder: it holds no config.yaml" in refused(
        "show-batch", tmp_path / "nowhere", 1
    )
    assert "step 0 is below 1; steps count from 1" in refused("show-batch", run, 0)
    assert "step 7 is past the end of " in refused("show-batch", run, 7)
    assert "gone is not there; give the folder of the run's data with --data" in refused(
        "show-batch", run, 1, "--data", tmp_path / "gone"
    )


def test_moved_data(
    finished: Any,
    small_data: Path,
    refused: Callable[..., str],
    done: Callable[..., str],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("heads"), run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"data.path={tmp_path / 'gone'} of {run} is not there; give" in refused(
        "show-batch", run, 1
    )
    there = done("show-batch", run, 1, "--data", small_data)
    assert there == done("show-batch", finished("heads"), 1).replace(
        str(finished("heads")), str(run)
    )
    other = tmp_path / "other"
    shutil.copytree(small_data, other)
    info = json.loads((other / "dataset.json").read_text())
    info["source"]["digest"] = "another"
    (other / "dataset.json").write_text(json.dumps(info))
    assert f"data {other} are not those of {run}" in refused("show-batch", run, 1, "--data", other)


def test_a_run_without_a_step(
    make_config: MakeConfig, finished: Any, refused: Callable[..., str], tmp_path: Path
) -> None:
    """The run folder holds only its configuration, as after a crash in the first step."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(make_config()))
    batch = step_batch(run, 2, None, 1)
    assert (batch.first, len(batch.notes)) == (GLOBAL_BATCH, 1)
    values = make_config(model={"init_from": str(finished("heads"))})
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert "nothing says where " in refused("show-batch", run, 2)
