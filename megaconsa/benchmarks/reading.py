"""Speed of reading prepared data, beside the formats of Megatron-Core and litdata.

    python -m megaconsa.benchmarks.reading --folder /fast/disk/reading --out reading.json

It writes the same random tokens in every format, for 2048, 8192 and 32768 tokens a row. Then it
reads rows in random order, in micro-batches, from a warm page cache, on one core. Each round opens
the data anew and reads a row at most once, as an epoch does. Last it starts as many readers as a
large run has ranks, each of which makes the whole batches of its own rank.

`memmap` is the least that a reader can do: a view of a mapped file and a copy, without any check.
Megatron-Core and litdata take part where they are installed. The folder must not exist. It is
removed at the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from megaconsa.data.dataset_info import INFO, TRAIN, DatasetInfo, SourceInfo, SplitInfo
from megaconsa.data.packing import cut_stream
from megaconsa.data.shards import SHARD_BYTES, write_split
from megaconsa.data.stream import BatchStream
from megaconsa.data.token_shards import TokenShards

LENGTHS = (2048, 8192, 32_768)
"""Tokens of a row."""
TOKENS = 2**27
"""Tokens in all, for each length."""
MICRO_BATCH = 8
ROUNDS = 9
RANKS = 64
RANK_STEPS = 8
"""Micro-batches of a rank in a step."""
RANK_SECONDS = 10.0
DOCUMENT = 700
"""Mean tokens of a document."""

Read = Callable[[np.ndarray], Any]
"""Reads the rows of some ids, (B,), and returns them, (B, S + 1)."""


class Megaconsa:
    """Our shards."""

    name = "megaconsa"

    @staticmethod
    def write(folder: Path, tokens: np.ndarray, length: int, vocab_size: int) -> None:
        write_split(folder, TRAIN, cut_stream([tokens], length), vocab_size, length)
        sequences = len(tokens) // length
        split = SplitInfo(sequences=sequences, tokens=sequences * length, documents=1)
        source = SourceInfo(
            names=["random"],
            digest="",
            documents=1,
            characters=0,
            validation_share=0,
            trained_vocabulary=None,
        )
        info = DatasetInfo(
            vocab_size=vocab_size,
            tokenizer_fingerprint="",
            end_of_text=0,
            sequence_length=length,
            unigram_entropy=0,
            splits={TRAIN: split},
            source=source,
        )
        (folder / INFO).write_text(info.model_dump_json())

    @staticmethod
    def open(folder: Path, length: int) -> Read:
        return TokenShards(folder, TRAIN).rows


class Memmap:
    """One file of ids, mapped into memory."""

    name = "memmap"

    @staticmethod
    def write(folder: Path, tokens: np.ndarray, length: int, vocab_size: int) -> None:
        np.save(folder / "tokens.npy", tokens)

    @staticmethod
    def open(folder: Path, length: int) -> Read:
        tokens = np.load(folder / "tokens.npy", mmap_mode="r").view(np.ndarray)
        return lambda ids: np.stack([tokens[k : k + length + 1] for k in (ids * length).tolist()])


class Megatron:
    """Megatron-Core's IndexedDataset, which maps its file.

    All tokens are one document. Its GPTDataset would also look up and join the documents of a row.
    """

    name = "megatron"
    package = "megatron.core"

    @staticmethod
    def write(folder: Path, tokens: np.ndarray, length: int, vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        stored = signed(tokens)
        builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=stored.dtype.type)
        builder.add_document(stored, [len(stored)])
        builder.finalize(str(folder / "tokens.idx"))

    @staticmethod
    def open(folder: Path, length: int) -> Read:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        get = IndexedDataset(str(folder / "tokens"), mmap=True).get
        return lambda ids: np.stack([get(0, k, length + 1) for k in (ids * length).tolist()])


class Litdata:
    """litdata's StreamingDataset with its loader of tokens."""

    name = "litdata"
    package = "litdata"

    @staticmethod
    def write(folder: Path, tokens: np.ndarray, length: int, vocab_size: int) -> None:
        from litdata import TokensLoader
        from litdata.streaming.cache import Cache

        loader = TokensLoader(block_size=length + 1)
        cache = Cache(str(folder), chunk_bytes=SHARD_BYTES, item_loader=loader)
        stored = torch.from_numpy(signed(tokens))
        for number, begin in enumerate(range(0, len(tokens) - 1, length)):
            cache[number] = stored[begin : begin + length + 1]
        cache.done()
        cache.merge()

    @staticmethod
    def open(folder: Path, length: int) -> Read:
        from litdata import StreamingDataset, TokensLoader

        loader = TokensLoader(block_size=length + 1)
        rows = StreamingDataset(str(folder), item_loader=loader)
        return lambda ids: torch.stack([rows[k] for k in ids.tolist()])


FORMATS: tuple[Any, ...] = (Megaconsa, Memmap, Megatron, Litdata)


def draw(count: int, vocab_size: int) -> np.ndarray:
    """Random ids, (count,), of two bytes or four. Id 0 ends documents."""
    rng = np.random.default_rng(0)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    tokens = rng.integers(1, vocab_size, count, dtype=dtype)
    tokens[rng.integers(0, count, count // DOCUMENT)] = 0
    return tokens


def signed(tokens: np.ndarray) -> np.ndarray:
    """The tokens for libraries that have no unsigned type of four bytes."""
    return tokens.view(np.int32) if tokens.dtype == np.uint32 else tokens


def readers_speed(folder: Path, tokens: np.ndarray, length: int) -> dict[str, float]:
    """Tokens per second of one reader of each format in `folder`, the median of the rounds.

    Stops where a format gives other rows than were written.
    """
    sequences = len(tokens) // length
    formats = [each for each in FORMATS if (folder / each.name).exists()]
    speeds: dict[str, list[float]] = {each.name: [] for each in formats}
    for number in range(ROUNDS):
        order = np.random.default_rng(number).permutation(sequences)
        batches = order[: sequences // MICRO_BATCH * MICRO_BATCH].reshape(-1, MICRO_BATCH)
        for each in formats:
            read = each.open(folder / each.name, length)
            places = batches[0, :, None] * length + np.arange(length + 1)
            assert np.array_equal(np.asarray(read(batches[0])), tokens[places]), each.name
            started = time.perf_counter()
            for ids in batches:
                read(ids)
            speeds[each.name].append(batches.size * length / (time.perf_counter() - started))
    # The first round fills the page cache.
    return {name: median(values[1:]) for name, values in speeds.items()}


def stream_steps(folder: Path, rank: int, ranks: int) -> Iterator[Any]:
    """The steps of a rank's stream of whole batches."""
    stream = BatchStream(
        folder,
        seed=0,
        global_batch=ranks * MICRO_BATCH * RANK_STEPS,
        micro_batch=MICRO_BATCH,
        dp_rank=rank,
        dp_size=ranks,
    )
    return stream.steps()


def _rank(folder: Path, rank: int, ranks: int, barrier: Barrier, results: Any) -> None:
    """Reads for some seconds as one rank does, and sends its number of tokens per second."""
    torch.set_num_threads(1)
    steps = stream_steps(folder, rank, ranks)
    next(steps)
    barrier.wait()
    started = time.perf_counter()
    tokens = 0
    while time.perf_counter() - started < RANK_SECONDS:
        tokens += sum(batch.tokens.numel() for batch in next(steps))
    results.put(tokens / (time.perf_counter() - started))


def node_speed(folder: Path, ranks: int) -> float:
    """Tokens per second of whole batches, over processes that each read the rows of one rank."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(ranks)
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(folder, rank, ranks, barrier, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    total = sum(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--ranks", type=int, default=RANKS)
    settings = parser.parse_args()
    folder = settings.folder
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    absent = [each.name for each in FORMATS if not _is_installed(each)]
    print(f"million tokens/s; not installed: {', '.join(absent) or 'none'}", flush=True)
    tokens = draw(settings.tokens + 1, settings.vocab_size)
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        for each in FORMATS:
            if each.name not in absent:
                (folder / each.name).mkdir()
                each.write(folder / each.name, tokens, length, settings.vocab_size)
        speeds = readers_speed(folder, tokens, length)
        ours = folder / Megaconsa.name
        speeds["one rank's batches"] = node_speed(ours, 1)
        speeds[f"batches of {settings.ranks} ranks"] = node_speed(ours, settings.ranks)
        rows.append({"length": length, "tokens_per_s": speeds})
        figures = "  ".join(f"{name} {speed / 1e6:.0f}" for name, speed in speeds.items())
        print(f"{length:6d}  {figures}", flush=True)
        settings.out.write_text(json.dumps(rows, indent=1))
        for each in FORMATS:
            shutil.rmtree(folder / each.name, ignore_errors=True)
    folder.rmdir()


def _is_installed(contestant: Any) -> bool:
    """Whether the package of a format can be imported. Our own formats need none."""
    try:
        importlib.import_module(getattr(contestant, "package", "numpy"))
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
