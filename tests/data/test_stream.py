"""The order of the data depends on seed and step only.

Interruptions, ranks, workers, and other work of the process do not change it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaconsa.data.compressed_shard import CompressedShard
from megaconsa.data.flat_shard import FlatShard
from megaconsa.data.packing import document_starts, mask_labels
from megaconsa.data.stream import Batch, BatchStream
from megaconsa.data.token_shards import TokenShards
from megaconsa.errors import InputError


def open_stream(path: Path, **options: Any) -> BatchStream:
    defaults = {"seed": 3, "global_batch": 12, "micro_batch": 2}
    return BatchStream(path, **(defaults | options))


def take(stream: BatchStream, start: int, count: int) -> list[list[Batch]]:
    return list(islice(stream.steps(start * stream.global_batch), count))


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in ("tokens", "labels", "documents", "sequences"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def global_tokens(steps: list[list[Batch]], global_batch: int) -> torch.Tensor:
    """Collects the tokens of one step from the micro-batches of all ranks.

    Returns (global_batch, S), in the order of `sequences`.
    """
    batches = [batch for rank in steps for batch in rank]
    order = torch.cat([batch.sequences for batch in batches])
    assert sorted(order.tolist()) == list(range(global_batch))
    return torch.cat([batch.tokens for batch in batches])[order.argsort()]


def test_workers_fork_whatever_started_this_process(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of a study inherits another default start method.

    With that method, each worker would import torch again.
    """
    monkeypatch.setattr(
        multiprocessing, "_default_context", multiprocessing.get_context("spawn"), raising=False
    )
    steps = open_stream(prepared, workers=2).steps()
    next(steps)
    kinds = [type(process).__name__ for process in multiprocessing.active_children()]
    steps.close()
    assert kinds.count("ForkProcess") == 2


@pytest.mark.parametrize("start", [0, 1, 17, 20, 100])
def test_resume_equals_never_stopping(prepared: Path, start: int) -> None:
    through = take(open_stream(prepared), 0, start + 5)[start:]
    resumed = take(open_stream(prepared), start, 5)
    for left, right in zip(through, resumed, strict=True):
        assert_equal(left, right)


@pytest.mark.parametrize(("ranks", "micro"), [(2, 2), (3, 4), (6, 2), (12, 1)])
def test_ranks_share_the_same_global_batch(prepared: Path, ranks: int, micro: int) -> None:
    whole = take(open_stream(prepared), 5, 20)
    parts = [
        take(open_stream(prepared, micro_batch=micro, dp_rank=rank, dp_size=ranks), 5, 20)
        for rank in range(ranks)
    ]
    for step in range(20):
        rank_steps = [part[step] for part in parts]
        assert torch.equal(global_tokens(rank_steps, 12), global_tokens([whole[step]], 12))
        for rank, batches in enumerate(rank_steps):
            for m, batch in enumerate(batches):
                assert batch.sequences.tolist() == [
                    m * ranks * micro + rank * micro + row for row in range(micro)
                ]


def test_workers_change_nothing(prepared: Path) -> None:
    for left, right in zip(
        take(open_stream(prepared), 3, 40),
        take(open_stream(prepared, workers=2), 3, 40),
        strict=True,
    ):
        assert_equal(left, right)


def test_each_epoch_holds_every_sequence_once(prepared: Path) -> None:
    shards = TokenShards(prepared, "train")
    known = sorted(shards[i][:-1].tolist() for i in range(len(shards)))
    stream = open_stream(prepared, global_batch=len(shards) * 2, micro_batch=1)
    (batches,) = take(stream, 0, 1)
    rows = [batch.tokens[0].tolist() for batch in batches]
    epochs = rows[: len(shards)], rows[len(shards) :]
    assert sorted(epochs[0]) == sorted(epochs[1]) == known
    assert epochs[0] != epochs[1]


def test_seed_matters_and_shuffle_can_be_off(prepared: Path) -> None:
    shards = TokenShards(prepared, "train")
    (one,) = take(open_stream(prepared), 0, 1)
    (other,) = take(open_stream(prepared, seed=4), 0, 1)
    assert not torch.equal(one[0].tokens, other[0].tokens)
    (plain,) = take(open_stream(prepared, shuffle=False), 0, 1)
    assert np.array_equal(
        torch.cat([batch.tokens for batch in plain]), [shards[i][:-1] for i in range(12)]
    )


def test_batches_hold_what_they_say(prepared: Path) -> None:
    for separate in (True, False):
        stream = open_stream(prepared, separate_documents=separate)
        end = stream.info.end_of_text
        for batch in take(stream, 0, 1)[0]:
            assert batch.tokens.shape == batch.labels.shape == batch.documents.shape == (2, 32)
            assert batch.tokens.dtype == batch.labels.dtype == batch.sequences.dtype == torch.int64
            assert batch.documents.dtype == torch.int32
            tokens = batch.tokens.numpy()
            expected = document_starts(tokens, end) if separate else np.zeros((2, 32))
            assert np.array_equal(batch.documents, expected)
            extended = np.concatenate([tokens, batch.labels[:, -1:]], axis=1)
            labels = mask_labels(extended, end, separate)
            assert np.array_equal(batch.labels[:, :-1], labels[:, :-1])


def test_memory_is_bounded(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompressedShard, "loaded_at_once", 2)
    shards = TokenShards(compressed, "train")
    first = shards[0].copy()
    for i in range(0, len(shards), 7):
        assert len(shards[i]) == 33
        assert sum(shard._data is not None for shard in shards._split._records) <= 2
    assert np.array_equal(shards[0], first)


def test_open_files_are_bounded(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that was put away has closed its file."""
    monkeypatch.setattr(FlatShard, "loaded_at_once", 2)
    before = len(os.listdir("/proc/self/fd"))
    shards = TokenShards(prepared, "train")
    first = shards[0].copy()
    for i in range(0, len(shards), 7):
        assert len(shards[i]) == 33
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert np.array_equal(shards[0], first)


def test_both_versions_of_the_format_hold_the_same_rows(prepared: Path, compressed: Path) -> None:
    for split in ("train", "validation"):
        flat, old = TokenShards(prepared, split), TokenShards(compressed, split)
        assert len(flat) == len(old)
        assert all(np.array_equal(flat[i], old[i]) for i in range(len(flat)))


def test_fixed_batches_are_the_same_for_every_topology(prepared: Path) -> None:
    validation = TokenShards(prepared, "validation")
    for count in (10, 10_000):
        kept = min(count, len(validation))
        # Evenly spaced over the split.
        rows = [validation[i * len(validation) // kept] for i in range(kept)]
        expected = torch.tensor(np.stack(rows).astype(np.int64))
        for ranks, micro in ((1, 2), (2, 2), (3, 4)):
            found: dict[int, torch.Tensor] = {}
            lengths = set()
            for rank in range(ranks):
                options = {
                    "global_batch": 12,
                    "micro_batch": micro,
                    "dp_rank": rank,
                    "dp_size": ranks,
                    "shuffle": False,
                }
                batches = open_stream(prepared, split="validation", **options).fixed_batches(count)
                lengths.add(len(batches))
                for batch in batches:
                    assert batch.tokens.shape == (micro, 32)
                    for g, tokens, labels in zip(
                        batch.sequences.tolist(), batch.tokens, batch.labels, strict=True
                    ):
                        if g < kept:
                            found[g] = tokens
                        else:
                            assert (labels == -100).all()
            assert len(lengths) == 1
            assert torch.equal(torch.stack([found[g] for g in range(kept)]), expected[:, :-1])


def test_bad_batches_are_refused(prepared: Path) -> None:
    with pytest.raises(InputError, match="global batch 12 is not a multiple of micro batch 5"):
        open_stream(prepared, micro_batch=5)
    with pytest.raises(InputError, match="data rank 2 is outside"):
        open_stream(prepared, dp_rank=2, dp_size=2)
    with pytest.raises(InputError, match="seed -1"):
        open_stream(prepared, seed=-1)
    with pytest.raises(InputError, match="less than one micro batch"):
        open_stream(prepared).fixed_batches(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_random_state_is_left_alone(prepared: Path, workers: int) -> None:
    state = torch.get_rng_state()
    take(open_stream(prepared, workers=workers), 0, 2)
    assert torch.equal(torch.get_rng_state(), state)


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from typing import Any
from megaconsa.data.stream import BatchStream
steps = BatchStream(Path(sys.argv[1]), seed=3, global_batch=12, micro_batch=2, workers=2).steps()
next(steps)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: None)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(30):
    next(steps)
print("done", flush=True)
"""


def test_workers_outlive_the_job_signals_and_not_the_process(prepared: Path) -> None:
    """A scheduler sends signals to every process of a job.

    The run must still get its batches, and then it must end without hanging.
    """
    command = [sys.executable, "-c", SCRIPT, str(prepared)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.killpg(process.pid, number)
        time.sleep(0.2)
    output, _ = process.communicate("go\n", timeout=60)
    assert output == "done\n"
    assert process.returncode == 0
